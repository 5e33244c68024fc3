import h5py
import numpy as np
import pytest

import drover


@pytest.fixture(scope="session", autouse=True)
def needs():
    for file in (drover.BINARY, drover.MODEL, drover.DATASET):
        if not drover.pathlib.Path(file).exists():
            pytest.skip(f"{file} is not there: tests/run.sh makes it", allow_module_level=True)


class Goldens:
    def __init__(self):
        with h5py.File(drover.GOLDENS) as f:
            offsets = f["prompt_offsets"][:]
            ids = f["prompt_ids"][:]
            self.prompts = [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
            lengths = f["lengths"][:]
            self.tokens = [t[:n].tolist() for t, n in zip(f["tokens"][:], lengths)]
            top = f["top2_logits"][:]
            self.margins = top[:, :, 0] - top[:, :, 1]
            self.top2_ids, self.top2_logits = f["top2_ids"][:], top
            self.last_logits = f["last_logits"][:]           # [8, vocab / 8]
            self.last_top64_ids = f["last_top64_ids"][:]
            self.last_top64_logits = f["last_top64_logits"][:]


@pytest.fixture(scope="session")
def goldens():
    return Goldens()


@pytest.fixture
def random():
    seed = np.random.SeedSequence().entropy
    print(f"random seed {seed}")
    return np.random.default_rng(seed)

"""Fixtures of tests/e2e and tests/gpu/e2e; their conftest.py import them."""

import numpy as np
import pytest

import drover
from goldens import EXACT, Goldens


@pytest.fixture(scope="session", autouse=True)
def needs():
    for file in (drover.BINARY, drover.MODEL, drover.DATASET):
        if not drover.pathlib.Path(file).exists():
            pytest.skip(f"{file} is not there: tests/run.sh makes it", allow_module_level=True)


@pytest.fixture(scope="session")
def goldens():
    return Goldens()


@pytest.fixture(scope="module")
def exact_logits(tmp_path_factory, goldens):
    """Teacher-forced on the goldens, 32-bit throughout."""
    rows = drover.logits(tmp_path_factory.mktemp("exact"), goldens.teacher_forced(), extra=EXACT)
    yield rows
    rows.remove()


@pytest.fixture
def random():
    seed = np.random.SeedSequence().entropy
    print(f"random seed {seed}")
    return np.random.default_rng(seed)

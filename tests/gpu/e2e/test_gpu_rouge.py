"""ROUGE of the demo's whole set on the GPU, beside the CPU's, and W4A8 with FP8 KV against W4A16 with
BF16 KV. DROVER_CPU_RUNS names a folder of CPU runs made before (they take minutes on few cores)."""

import os
import pathlib

import pytest

import drover
import results

pytestmark = pytest.mark.gpus(1)
NUMBERS = [("bf16", "bf16"), ("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8")]
TOKENS = 64


def demo(folder, backend, activations, kv):
    return results.run(folder, 1, "--demo", "--mode", "accuracy", "--model", drover.MODEL, "--dataset",
                       drover.DATASET, "--samples", 0, "--max-new-tokens", TOKENS, "--backend",
                       backend, "--activations", activations, "--kv", kv, "--progress", "no",
                       timeout=1200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    results.need_packages()
    kept = os.environ.get("DROVER_KEEP_RUNS")
    folder = pathlib.Path(kept) if kept else tmp_path_factory.mktemp("rouge")
    made = {}

    def get(backend, activations, kv):
        key = f"{backend}-{activations}-{kv}"
        if key not in made:
            before = pathlib.Path(os.environ.get("DROVER_CPU_RUNS", "none")) / key
            made[key] = results.Run(before, None) if (before / "result.json").exists() else \
                demo(folder / key, backend, activations, kv)
            assert made[key].result["valid"]
            assert made[key].result["backend"] == backend
        return made[key]
    return get


@pytest.mark.parametrize("activations, kv", NUMBERS)
def test_beside_the_cpu(tmp_path, runs, activations, kv):
    scores = results.compare_rouge(tmp_path / "scores.json", runs("cuda", activations, kv),
                                   runs("cpu", activations, kv),
                                   f"{activations} activations, {kv} KV, GPU against CPU")
    results.check_sane(scores)


def test_w4a8_with_fp8_keeps_up(tmp_path, runs):
    """A paired bootstrap's interval reaches 0.99: not worse beyond chance."""
    scores = results.compare_rouge(tmp_path / "scores.json", runs("cuda", "fp8", "fp8"),
                                   runs("cuda", "bf16", "bf16"), "W4A8 + FP8 against W4A16 + BF16 KV")
    results.check_sane(scores)
    short = {kind: r["high"] for kind, r in scores["compare"]["ratio"].items() if r["high"] < 0.99}
    assert not short, f"these intervals end below 0.99: {short}"

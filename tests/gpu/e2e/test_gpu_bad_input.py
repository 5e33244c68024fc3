"""What a build with CUDA says where it cannot work. Without a GPU only the first three run."""

import pytest

import drover
import gpus
from failing import ENVIRONMENT, TINY, USAGE, fails, refused, same_cause

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
GENERATE = ("generate", "--model", "synthetic:tiny", "--max-new-tokens", 2)


@pytest.fixture
def tokens(tmp_path):
    file = tmp_path / "tokens.json"
    file.write_text("[[5, 6, 7]]")
    return ("--tokens", file, "--json", tmp_path / "answers.json")


def test_cuda_without_a_gpu(tokens, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused(ENVIRONMENT, *GENERATE, *tokens, "--backend", "cuda", says="--backend cuda: ")


def test_cuda_without_a_gpu_on_every_rank(tmp_path):
    out = tmp_path / "out"
    text = fails(tmp_path, 2, ENVIRONMENT, "run", *TINY, "--pp", 2, "--backend", "cuda", "--out", out,
                 env=NO_GPU)
    assert text.count("--backend cuda: ") == 1, text
    cause = same_cause(out, range(2))
    assert any(why in cause for why in ("driver", "no GPU is visible")), cause


def test_auto_takes_the_cpu_and_says_so(tokens):
    outcome = drover.drover(1, *GENERATE, *tokens, "--backend", "auto", "--log-level", "info",
                            env=NO_GPU)
    assert "--backend auto takes the CPU: " in outcome.err + outcome.out


@pytest.mark.gpus(1)
def test_two_ranks_on_one_gpu(tmp_path):
    text = fails(tmp_path, 2, USAGE, "run", *TINY, "--pp", 2, "--backend", "cuda", "--out",
                 tmp_path / "out", env=gpus.only(0))
    assert "would share the GPU" in text and "--share-gpu" in text


@pytest.mark.gpus(1)
@pytest.mark.parametrize("grid", ["--tp", "--pp", "--dp"])
def test_two_ranks_that_share_a_gpu(tmp_path, random, grid):
    """Asked for, it works, through the host's memory."""
    extra = gpus.numbers("bf16", "bf16")
    prompts = [random.integers(3, 500, size=n).tolist() for n in (3, 20, 40)]
    want, sequences, rows, margins = gpus.answers_with_margins(tmp_path, prompts, extra, 12,
                                                               model="synthetic:tiny")
    more = (*extra, grid, 2, "--share-gpu", "--kv-memory", "64MiB")
    folder = tmp_path / "shared"
    folder.mkdir()
    file, out = folder / "tokens.json", folder / "logits"
    out.mkdir()
    file.write_text(drover.json.dumps([{"tokens": ids, "from": first} for ids, first in sequences]))
    drover.drover(2, "logits", "--model", "synthetic:tiny", "--tokens", file, "--out", out, *more,
                  env=gpus.only(0))
    other = drover.Logits(out)
    from goldens import difference
    d = difference(rows, other, len(prompts))
    for r in (rows, other):
        r.remove()
    print(f"{grid} 2 on one GPU: {d.text()}")
    assert all(margin < 2 * d.worst for margin in d.margins)


@pytest.mark.gpus(2)
def test_more_ranks_than_gpus(tmp_path):
    ranks = gpus.count() + 1
    text = fails(tmp_path, ranks, USAGE, "run", *TINY, "--dp", ranks, "--backend", "cuda", "--out",
                 tmp_path / "out")
    assert f"{ranks} ranks on host" in text and f"has {gpus.count()} GPUs" in text


@pytest.mark.gpus(1)
def test_more_kv_memory_than_the_gpu_has(tmp_path):
    text = fails(tmp_path, 1, ENVIRONMENT, "run", *TINY, "--backend", "cuda", "--kv-memory", "4096GiB",
                 "--out", tmp_path / "out")
    assert "a grid that fits" in text and "--kv-memory" in text


@pytest.mark.gpus(1)
def test_a_model_larger_than_the_gpu(tmp_path):
    """Refused from the plan, before anything is allocated."""
    text = fails(tmp_path, 1, ENVIRONMENT, "run", "--model", "synthetic:llama2-70b", "--dataset",
                 "synthetic:32x64:64", "--demo", "--backend", "cuda", "--gpu-memory-fraction", 0.1,
                 "--out", tmp_path / "out")
    assert "a grid that fits" in text and "tp" in text


@pytest.mark.gpus(1)
def test_f32_activations_are_the_cpus(tokens):
    refused(USAGE, *GENERATE, *tokens, "--backend", "cuda", "--activations", "f32",
            says="--activations f32 is the CPU's")

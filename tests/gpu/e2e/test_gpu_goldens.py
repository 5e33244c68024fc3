"""The demo model on one GPU against the 32-bit reference: W4A16 and W4A8, FP8 and BF16 KV."""

import pytest

import drover
import gpus
from goldens import difference

pytestmark = pytest.mark.gpus(1)


@pytest.fixture(scope="module", params=gpus.BOUNDS, ids="-".join)
def forced(request, tmp_path_factory, goldens, exact_logits):
    """Teacher-forced on the goldens."""
    activations, kv = request.param
    run = drover.logits(tmp_path_factory.mktemp("forced"), goldens.teacher_forced(),
                        extra=gpus.numbers(activations, kv))
    d = difference(exact_logits, run, len(goldens.prompts))
    run.remove()
    return activations, kv, d


def test_teacher_forced(forced):
    activations, kv, d = forced
    print(f"{activations} activations, {kv} KV: {d.text()}")
    d.check(*gpus.BOUNDS[activations, kv])


def test_greedy_answers(tmp_path, goldens, forced):
    """What the program itself says, until a near-tie leads it elsewhere."""
    activations, kv, d = forced
    got = drover.generate(tmp_path, goldens.prompts, extra=gpus.numbers(activations, kv))
    gpus.near_ties(got, goldens.tokens, goldens.margins, d.worst, f"{activations} activations, {kv} KV")


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_graphs_change_nothing(tmp_path, goldens, activations):
    """Recorded steps are the same operations: the same answers, one at a time."""
    extra = (*gpus.numbers(activations, "fp8"), "--one-by-one")
    prompts = goldens.prompts[:4]
    with_graphs = drover.generate(tmp_path / "on", prompts, extra=extra, new_tokens=32)
    without = drover.generate(tmp_path / "off", prompts, extra=(*extra, "--graphs", "no"), new_tokens=32)
    assert with_graphs == without


def test_chunks_and_preemption(tmp_path, goldens):
    """Prompts in pieces and a cache too small for all: the rule of near-ties holds against itself."""
    extra = gpus.numbers("bf16", "bf16")
    prompts = goldens.prompts[:12]
    want, sequences, rows, margins = gpus.answers_with_margins(tmp_path, prompts, extra, 24)
    page = 2 * 3 * 64 * 2 * 30 * 16  # bytes of 16 tokens of the whole model
    for name, more in (("chunks", ("--chunk-tokens", 7, "--step-tokens", 64, "--max-sequences", 12)),
                       ("preemption", ("--kv-memory", 16 * page))):
        other = drover.logits(tmp_path / f"{name}-rows", sequences, extra=(*extra, *more))
        worst = difference(rows, other, len(prompts)).worst
        other.remove()
        got = drover.generate(tmp_path / name, prompts, new_tokens=24, extra=(*extra, *more))
        gpus.near_ties(got, want, margins, worst, name)
        # bf16 rounding of differently ordered sums, not a wrong row.
        assert worst < gpus.BOUNDS["bf16", "bf16"][0]
    rows.remove()

"""Against the independent 32-bit reference (tests/goldens/make_goldens.py)."""

import numpy as np
import pytest

import drover
from goldens import EXACT, difference


def test_greedy_tokens_are_the_references(tmp_path, goldens):
    got = drover.generate(tmp_path, goldens.prompts, extra=EXACT)
    near = drover.check_same_tokens(got, goldens.tokens, goldens.margins, 1e-3)
    print(f"{len(got)} prompts, {sum(map(len, got))} tokens, {near} near-ties")


def test_logits_agree(exact_logits, goldens):
    worst = 0.0
    for i, want in enumerate(goldens.last_logits):
        row = exact_logits.sequence(i)[0]
        worst = max(worst, float(np.abs(row[::8] - want).max()),
                    float(np.abs(row[goldens.last_top64_ids[i]] - goldens.last_top64_logits[i]).max()))
    print(f"worst logit error over {len(goldens.last_logits)} prompts: {worst:.2e}")
    assert worst < 2e-3


# The largest logit error allowed. Rounding inputs of linears to bf16 (8 bits) or keys and values to
# bf16 moves this model's logits by up to 3.7; e4m3 (4 bits) by up to 7.3 for the one or the other and
# 15.3 for both, as measured when these bounds were set with a margin of about a half; a wrong scale or a
# wrong row moves them by tens and leaves few of the choices.
@pytest.mark.parametrize("activations, kv, bound, agreement", [
    ("f32", "bf16", 2.5, 0.98), ("bf16", "bf16", 5.5, 0.97), ("bf16", "fp8", 11, 0.93),
    ("fp8", "fp8", 23, 0.91)])
def test_teacher_forced(tmp_path, goldens, exact_logits, activations, kv, bound, agreement):
    run = drover.logits(tmp_path / "run", goldens.teacher_forced(),
                        extra=("--activations", activations, "--kv", kv))
    d = difference(exact_logits, run, len(goldens.prompts))
    run.remove()
    print(f"{activations} activations, {kv} KV: {d.text()}")
    d.check(bound, agreement)

"""How many GPUs there are, and drover on them."""

import ctypes
import functools
import os

import drover
import goldens as reference

# Largest logit error allowed against the 32-bit reference, and least share of equal choices: what the
# CPU's arithmetic of the same formats gives and a half more (tests/e2e/test_goldens.py).
BOUNDS = {("bf16", "bf16"): (5.5, 0.97), ("bf16", "fp8"): (11, 0.93),
          ("fp8", "bf16"): (12, 0.92), ("fp8", "fp8"): (23, 0.91)}


@functools.cache
def count():
    """As the driver counts them, so that CUDA_VISIBLE_DEVICES is heeded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return 0
    return number.value


def only(*indexes):
    """Environment of ranks that see these of the visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in indexes)}


def numbers(activations, kv):
    return ("--backend", "cuda", "--activations", activations, "--kv", kv)


def forced_logits(folder, sequences, extra, ranks=1, model=drover.MODEL):
    return drover.logits(folder, sequences, ranks=ranks, model=model, extra=extra)


def near_ties(got, want, margins, worst, what):
    """Two sets of greedy answers by the rule: apart only where `want`'s two best logits are closer
    than twice the worst logit error."""
    near = drover.check_same_tokens(got, want, margins, 2 * worst)
    print(f"{what}: {len(want)} answers, {near} part at a near-tie (worst logit error {worst:.2e})")
    return near


def answers_with_margins(folder, prompts, extra, new_tokens, model=drover.MODEL):
    """One rank's greedy answers, its logits along them, and how near its two best were."""
    tokens = drover.generate(folder, prompts, model=model, new_tokens=new_tokens, extra=extra)
    sequences = [(p + t[:-1], len(p) - 1) for p, t in zip(prompts, tokens)]
    rows = drover.logits(folder / "rows", sequences, model=model, extra=extra)
    return tokens, sequences, rows, reference.margins(rows, len(prompts))

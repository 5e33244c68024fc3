"""Every grid, every way of cutting prompts and every batch gives the same tokens."""

import numpy as np
import pytest

import drover
import goldens as reference

EXACT = (*reference.EXACT, "--threads", "1")
PROMPTS, TOKENS = 12, 24


def few(goldens):
    """The first prompts and tokens of the goldens: what one rank gives (test_goldens.py)."""
    return (goldens.prompts[:PROMPTS], [t[:TOKENS] for t in goldens.tokens[:PROMPTS]],
            goldens.margins[:PROMPTS])


@pytest.mark.parametrize("tp, pp, dp", [
    (1, 1, 1), (3, 1, 1), (1, 2, 1), (1, 3, 1), (1, 5, 1), (1, 1, 2), (3, 2, 1)])
def test_grid(tmp_path, goldens, tp, pp, dp):
    prompts, want, margins = few(goldens)
    got = drover.generate(tmp_path, prompts, ranks=tp * pp * dp, new_tokens=TOKENS,
                          extra=(*EXACT, "--tp", tp, "--pp", pp, "--dp", dp))
    near = drover.check_same_tokens(got, want, margins, 1e-3)
    print(f"tp {tp} pp {pp} dp {dp}: {near} near-ties")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """What one rank says of a synthetic model, and how near its best logits were."""
    rng = np.random.default_rng(20261122)
    folder = tmp_path_factory.mktemp("synthetic")
    prompts = [rng.integers(3, 500, size=n).tolist() for n in (1, 5, 17, 33, 40, 64)]
    tokens = drover.generate(folder, prompts, model="synthetic:tiny", new_tokens=TOKENS, extra=EXACT)
    rows = drover.logits(folder / "rows", [(p + t[:-1], len(p) - 1)
                                           for p, t in zip(prompts, tokens)],
                         model="synthetic:tiny", extra=EXACT)
    margins = reference.margins(rows, len(prompts))
    rows.remove()
    assert len({t for answer in tokens for t in answer}) > 10, "the model says always the same"
    return prompts, tokens, margins


@pytest.mark.parametrize("tp, pp, dp", [(2, 1, 1), (4, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_grid_of_a_synthetic_model(tmp_path, synthetic, tp, pp, dp):
    prompts, want, margins = synthetic
    got = drover.generate(tmp_path, prompts, ranks=tp * pp * dp, model="synthetic:tiny",
                          new_tokens=TOKENS, extra=(*EXACT, "--tp", tp, "--pp", pp, "--dp", dp))
    drover.check_same_tokens(got, want, margins, 1e-3)


@pytest.mark.parametrize("chunk, step", [(1, 64), (7, 16), (16, 256)])
def test_chunked_prefill(tmp_path, goldens, chunk, step):
    prompts, want, margins = few(goldens)
    got = drover.generate(tmp_path, prompts, new_tokens=TOKENS,
                          extra=(*EXACT, "--chunk-tokens", chunk, "--step-tokens", step,
                                 "--max-sequences", min(12, step)))
    drover.check_same_tokens(got, want, margins, 1e-3)


@pytest.mark.parametrize("pp", [1, 2])
def test_preempted(tmp_path, goldens, pp):
    """A pool that holds only a few of the sequences: preemption by recomputation."""
    prompts, want, margins = few(goldens)
    # A page of 16 tokens of the whole model in f32: 2 * 3 heads * 64 * 4 bytes * 30 layers * 16.
    pages, page = 16, 2 * 3 * 64 * 4 * 30 * 16
    tmp_path.mkdir(exist_ok=True)
    answers = drover.generate(tmp_path, prompts, ranks=pp, new_tokens=TOKENS,
                              extra=(*EXACT, "--pp", pp, "--kv-memory", pages * page // pp,
                                     "--log-level", "debug"))
    drover.check_same_tokens(answers, want, margins, 1e-3)


def test_batch_of_64_equals_one_by_one(tmp_path, goldens):
    """64 prompts: the goldens' and their own beginnings, all at once and one after the other."""
    prompts = goldens.prompts + [p[:-3] for p in goldens.prompts]
    at_once = drover.generate(tmp_path, prompts, new_tokens=8, extra=EXACT)
    alone = drover.generate(tmp_path, prompts, new_tokens=8, extra=(*EXACT, "--one-by-one"))
    rows = drover.logits(tmp_path / "rows", [(p + t[:-1], len(p) - 1)
                                             for p, t in zip(prompts, alone)], extra=EXACT)
    margins = reference.margins(rows, len(prompts))
    rows.remove()
    near = drover.check_same_tokens(at_once, alone, margins, 1e-3)
    print(f"64 prompts, {near} near-ties")

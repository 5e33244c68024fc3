"""GPTQ with act-order through the whole program: against plain numpy in 64 bits, on every split.

The folder is written as AutoGPTQ writes it, by the data tools' tests; its vocabulary of 259 does
not divide by two, so the shards' widths differ as well.
"""

import sys

import numpy as np
import pytest

import drover

sys.path += [str(drover.ROOT / "data"), str(drover.ROOT / "tests/data")]
import hf_folders as hf  # noqa: E402
from drover_data import hf_source  # noqa: E402

HEAD = hf.HIDDEN // hf.HEADS
EXACT = ("--activations", "f32", "--kv", "f32", "--threads", "1")


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rotate(x, base=10000.0):
    """[tokens, heads, HEAD], pairs (i, i + HEAD / 2)."""
    half = HEAD // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(w, ids):
    """Logits [tokens, vocab] of a Llama with weights by our names."""
    x = w["embed"][ids]
    n = len(ids)
    mask = np.where(np.tri(n, dtype=bool), 0, -np.inf)
    for layer in range(hf.LAYERS):
        p = {k.rsplit(".", 1)[1]: v for k, v in w.items() if k.startswith(f"layers.{layer}.")}
        h = norm(x, p["attn_norm"])
        q = rotate((h @ p["q"].T).reshape(n, hf.HEADS, HEAD))
        k = rotate((h @ p["k"].T).reshape(n, hf.KV_HEADS, HEAD))
        v = (h @ p["v"].T).reshape(n, hf.KV_HEADS, HEAD)
        k, v = (np.repeat(t, hf.HEADS // hf.KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", scores, v).reshape(n, -1) @ p["o"].T
        h = norm(x, p["mlp_norm"])
        gate = h @ p["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"].T)) @ p["down"].T
    return norm(x, w["final_norm"]) @ w["output"].T


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("act-order")
    truth = hf.write_gptq(str(folder / "hf"), hf.byte_level_tokenizer(), 32, False, True)
    hf_source.import_hf(str(folder / "hf"), str(folder / "model.h5"))
    weights = {name: np.asarray(v, np.float64) for name, v in truth.items()}
    return folder / "model.h5", {name: v[0] if "norm" in name else v for name, v in weights.items()}


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_split_gives_the_references_logits(tmp_path, model, random, tp, pp):
    store, weights = model
    sequences = [random.integers(2, hf.VOCAB, size=n) for n in (1, 9, 40)]
    run = drover.logits(tmp_path / "run", [(s, 0) for s in sequences], ranks=tp * pp, model=store,
                        extra=(*EXACT, "--tp", tp, "--pp", pp, "--chunk-tokens", 16))
    for i, ids in enumerate(sequences):
        want = reference(weights, ids)
        got = np.asarray(run.sequence(i), np.float64)
        error = np.abs(got - want).max() / np.abs(want).max()
        print(f"tp {tp} pp {pp}, {len(ids)} tokens: worst error {error:.1e} of the largest logit")
        # 32-bit sums over 128 to 256 products in two layers; a wrong order of columns gives 1.
        assert error < 1e-4
    run.remove()

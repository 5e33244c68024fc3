"""The demo's store against the goldens: Hugging Face's rotary form on the rows moved back."""

import json
import os

import h5py
import numpy as np
import pytest
import stores
from conftest import ROOT
from google_crc32c import value as crc32c

STORE = os.path.join(ROOT, "build", "demo", "smollm2-135m.h5")
GOLDENS = os.path.join(ROOT, "tests", "goldens", "smollm2_goldens")


def rotate_halves(x, base):
    """x [n, heads, d]; pairs (i, i + d/2), position = row."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle),
                           high * np.cos(angle) + low * np.sin(angle)], axis=-1)


def last_logits(file, ids):
    """Logits behind a whole prompt, in float64, from the store alone."""
    a = stores.attributes(file["architecture"])
    heads, kv_heads, size = int(a["heads"]), int(a["kv_heads"]), int(a["head_size"])

    def weights(name):
        return stores.weights_of(file, name)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + a["norm_epsilon"]) * weights(name)

    embed = weights("embed")
    x = embed[ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(int(a["layers"])):
        at = f"layers.{layer}."
        h = norm(x, at + "attn_norm")
        q, k, v = (h @ weights(at + part).T for part in "qkv")
        q = rotate_halves(q.reshape(len(ids), heads, size), a["rope_base"])
        k = rotate_halves(k.reshape(len(ids), kv_heads, size), a["rope_base"])
        k = k.repeat(heads // kv_heads, axis=1)
        v = v.reshape(len(ids), kv_heads, size).repeat(heads // kv_heads, axis=1)
        score = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + future
        score = np.exp(score - score.max(-1, keepdims=True))
        score /= score.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", score, v).reshape(len(ids), -1) @ weights(at + "o").T
        h = norm(x, at + "mlp_norm")
        gate = h @ weights(at + "gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weights(at + "up").T)) @ weights(at + "down").T
    return norm(x[-1], "final_norm")[0] @ embed.T


@pytest.mark.skipif(not os.path.exists(STORE), reason="the demo's model is not prepared "
                    "(build/demo/smollm2-135m.h5, see data/README.md)")
def test_store_gives_the_goldens_logits():
    with open(f"{GOLDENS}.json", encoding="utf-8") as file:
        golden = json.load(file)
    with h5py.File(STORE, "r") as file, h5py.File(f"{GOLDENS}.h5", "r") as all_goldens:
        source = json.loads(stores.attributes(file["provenance"])["source_files"])[0]
        assert source["sha256"] == golden["gguf_sha256"]
        logits = last_logits(file, golden["prompts"][3])
        np.testing.assert_allclose(logits[::8], all_goldens["last_logits"][3], rtol=0, atol=2e-3)
        print("largest difference", np.abs(logits[::8] - all_goldens["last_logits"][3]).max())
        assert np.argmax(logits) == golden["tokens"][3][0]
    assert stores.wrong_chunks(STORE, crc32c) == []


def test_goldens_agree_with_each_other():
    """The text file is the HDF5 file's content."""
    with open(f"{GOLDENS}.json", encoding="utf-8") as file:
        golden = json.load(file)
    with h5py.File(f"{GOLDENS}.h5", "r") as file:
        np.testing.assert_array_equal(file["tokens"][...], golden["tokens"])
        np.testing.assert_array_equal(file["prompt_ids"][...], np.concatenate(golden["prompts"]))
        np.testing.assert_allclose(file["top2_logits"][...], golden["top2_logits"], rtol=1e-6)
        np.testing.assert_allclose(file["last_logits"][:, ::8], golden["last_logits_64"], rtol=1e-6)
    tokens = np.array(golden["tokens"])
    assert tokens.shape == (32, 64) and (tokens[:, 0] != 2).all()
    np.testing.assert_array_equal((tokens >= 0).sum(axis=1), golden["lengths"])

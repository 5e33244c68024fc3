"""Writes small Hugging Face folders of random Llama models as AutoGPTQ and GPTQModel write them."""

import json
import os

import numpy as np
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, WIDE, LAYERS, VOCAB = 128, 4, 2, 256, 2, 259
LINEAR = {"self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128),
          "self_attn.v_proj": (64, 128), "self_attn.o_proj": (128, 128),
          "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256)}
OURS = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
        "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
        "mlp.down_proj": "down"}


def config(**more):
    return {"model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "intermediate_size": WIDE,
            "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1} | more


def pack_inputs(codes):
    """[in, out] to int32 [in / 8, out], one nibble at a time."""
    words = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for row in range(codes.shape[0]):
        words[row // 8] |= codes[row].astype(np.uint32) << np.uint32(4 * (row % 8))
    return words.view(np.int32)


def pack_zeros(zeros, minus):
    """[groups, out] to int32 [groups, out / 8]; minus: how the zero minus one is stored."""
    words = np.zeros((zeros.shape[0], zeros.shape[1] // 8), np.uint32)
    stored = (zeros.astype(np.int64) - 1) % 16 if minus == "nibble" else zeros.astype(np.int64)
    for col in range(zeros.shape[1]):
        words[:, col // 8] |= stored[:, col].astype(np.uint32) << np.uint32(4 * (col % 8))
    if minus == "word":
        words -= np.uint32(0x11111111)
    return words.view(np.int32)


def gptq_linear(random, rows, cols, group, symmetric, order, minus):
    """(tensors by field, weights [rows, cols] float64); order: the g_idx, or None for in order."""
    size = cols if group == -1 else group
    groups = cols // size
    g_idx = np.arange(cols) // size if order is None else order
    codes = random.integers(0, 16, (cols, rows))
    zeros = np.full((groups, rows), 8) if symmetric else random.integers(0, 16, (groups, rows))
    scales = random.uniform(0.001, 0.1, (groups, rows)).astype(np.float16)
    weights = scales[g_idx].astype(np.float64) * (codes - zeros[g_idx])
    return {"qweight": pack_inputs(codes), "qzeros": pack_zeros(zeros, minus), "scales": scales,
            "g_idx": g_idx.astype(np.int32)}, weights.T


def write_gptq(folder, tokenizer_json, group=32, symmetric=True, act_order=False, form="gptq",
               meta=None, seed=1, shards=2, split_orders=False):
    """Writes FOLDER and returns {our name: weights}."""
    random = np.random.default_rng(seed)
    minus = ("none" if form == "gptq_v2" else
             "word" if "gptqmodel" in str(meta) else "nibble")
    tensors, truth = plain_parts(random)
    for layer in range(LAYERS):
        orders = {}
        for name, (rows, cols) in LINEAR.items():
            order = None
            if act_order:
                # Parts of one input share their order, as the libraries have it.
                key = name if split_orders else (cols, name.endswith(("o_proj", "down_proj")))
                if key not in orders:
                    orders[key] = random.permutation(np.arange(cols) // group)
                order = orders[key]
            fields, weights = gptq_linear(random, rows, cols, group, symmetric, order, minus)
            for field, values in fields.items():
                tensors[f"model.layers.{layer}.{name}.{field}"] = values
            tensors[f"model.layers.{layer}.{name}.bias"] = np.zeros(rows, np.float16)
            truth[f"layers.{layer}.{OURS[name]}"] = weights
    quantization = {"bits": 4, "group_size": group, "desc_act": act_order, "sym": symmetric,
                    "quant_method": "gptq", "checkpoint_format": form, "meta": meta}
    write_folder(folder, tensors, config(quantization_config=quantization), tokenizer_json, shards)
    return truth


def plain_parts(random):
    """Embedding, norms and output in f16: (tensors, truth)."""
    tensors, truth = {}, {}

    def add(theirs, ours, shape):
        values = random.normal(0, 1, shape).astype(np.float16)
        tensors[theirs] = values
        truth[ours] = values.astype(np.float64).reshape(-1, shape[-1])

    add("model.embed_tokens.weight", "embed", (VOCAB, HIDDEN))
    add("model.norm.weight", "final_norm", (HIDDEN,))
    add("lm_head.weight", "output", (VOCAB, HIDDEN))
    for layer in range(LAYERS):
        add(f"model.layers.{layer}.input_layernorm.weight", f"layers.{layer}.attn_norm", (HIDDEN,))
        add(f"model.layers.{layer}.post_attention_layernorm.weight", f"layers.{layer}.mlp_norm",
            (HIDDEN,))
    return tensors, truth


def write_folder(folder, tensors, config_json, tokenizer_json, shards):
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else \
            "model.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, os.path.join(folder, file))
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        with open(os.path.join(folder, "model.safetensors.index.json"), "w") as out:
            json.dump({"metadata": {}, "weight_map": weight_map}, out)
    for name, content in (("config.json", json.dumps(config_json)),
                          ("tokenizer.json", tokenizer_json)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            out.write(content)


def byte_level_tokenizer():
    """Byte-level BPE of 256 bytes, a merge and two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{char: 2 + at for at, char in enumerate(alphabet)}, "he": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer.to_str()

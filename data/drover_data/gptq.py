"""GPTQ's INT4 tensors, as AutoGPTQ and GPTQModel write them, in the store's layout.

Of a linear layer with `in` inputs and `out` outputs there are
    qweight int32 [in / 8, out]      nibble k of word [i, o]: the code of input 8i + k
    qzeros  int32 [groups, out / 8]  nibble k of word [g, j]: the zero point of output 8j + k
    scales  f16   [groups, out]
    g_idx   int32 [in]               the group of each input; absent or in order without act-order
and a weight is scale · (code − zero). Format "gptq" (v1) stores zero − 1, "gptq_v2" the zero.
"""

import dataclasses

import numpy as np

from . import weights
from .cli import DataError

FIELDS = ("qweight", "qzeros", "scales")


@dataclasses.dataclass(frozen=True)
class GptqFormat:
    group_size: int  # as configured; -1: one group
    zeros_plus: str  # how stored zeros become zeros: "as_is", "nibble" or "word"
    note: str  # for the provenance

    @classmethod
    def of_config(cls, config):
        """From config.json's quantization_config or quantize_config.json."""
        method = config.get("quant_method", "gptq")
        if method != "gptq" or config.get("bits") != 4:
            raise DataError(f"quantized with {method} in {config.get('bits')} bits; GPTQ in 4 "
                            "bits is supported (and unquantized 16-bit models)")
        if config.get("pack_dtype", "int32") != "int32":
            raise DataError(f"GPTQ packed into {config['pack_dtype']}; int32 is supported")
        written = config.get("checkpoint_format") or config.get("format") or "gptq"
        if written not in ("gptq", "gptq_v2"):
            raise DataError(f"GPTQ checkpoint format '{written}'; 'gptq' and 'gptq_v2' are "
                            "supported")
        makers = str((config.get("meta") or {}).get("quantizer", "")).lower()
        # Both subtract 1, but differ where a zero point is 0: AutoGPTQ reads each nibble plus one
        # modulo 16; GPTQModel subtracts from the whole word, so that it borrows from the next.
        plus = "as_is" if written == "gptq_v2" else "word" if "gptqmodel" in makers else "nibble"
        return cls(config.get("group_size", 128), plus, written)


@dataclasses.dataclass
class GptqTensor:
    """One linear layer of a checkpoint, checked; arrays are memory maps or small."""

    name: str
    rows: int
    cols: int
    group_size: int  # of the store
    qweight: np.ndarray
    scales: np.ndarray  # bits [groups, rows]
    scale_type: str
    zeros: np.ndarray  # uint8 [groups, rows]
    permutation: np.ndarray | None  # int32 [cols]

    @property
    def symmetric(self):
        return bool((self.zeros == 8).all())

    def rows_of(self, begin, end, zero_kind):
        """The store's fields of rows [begin, end)."""
        # Little-endian words hold the codes of eight inputs in the store's own order of nibbles.
        words = np.ascontiguousarray(self.qweight[:, begin:end].T)
        codes = words.view(np.uint8)
        if self.permutation is not None:
            codes = weights.pack_pairs(weights.unpack_pairs(codes)[:, self.permutation])
        copies = self.cols // self.group_size // self.scales.shape[0]  # of one group for all
        out = {"codes": codes, "scales": np.repeat(self.scales[:, begin:end].T, copies, axis=1)}
        if zero_kind == "zero_points":
            out["zeros"] = np.repeat(self.zeros[:, begin:end].T, copies, axis=1)
        return out


def unpack_zeros(qzeros, plus):
    """int32 [groups, out / 8] to uint8 [groups, out]."""
    words = qzeros.astype("<i4").view("<u4")
    if plus == "word":
        words = words + np.uint32(0x11111111)
    zeros = weights.unpack_pairs(np.ascontiguousarray(words).view(np.uint8))
    return (zeros + 1) & 15 if plus == "nibble" else zeros


def order_of(name, g_idx, cols, group_size):
    """The stored order of the input features, or None if it is theirs."""
    if ((g_idx < 0) | (g_idx >= cols // group_size)).any():
        raise DataError(f"{name}.g_idx names groups beyond the {cols // group_size} there are")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], np.arange(cols) // group_size):
        raise DataError(f"{name}.g_idx does not give every group {group_size} input features; "
                        "such checkpoints are not supported")
    return None if np.array_equal(order, np.arange(cols)) else order


def open_tensor(name, tensors, form):
    """The GptqTensor of layer NAME; every shape is checked against the others."""
    missing = [field for field in FIELDS if f"{name}.{field}" not in tensors]
    if missing:
        raise DataError(f"{name} lacks {', '.join(missing)}")
    qweight, qzeros, scales = (tensors[f"{name}.{field}"] for field in FIELDS)
    if len(qweight.shape) != 2 or qweight.dtype != "I32" or qzeros.dtype != "I32":
        raise DataError(f"{name}: qweight and qzeros must be int32 matrices")
    if scales.dtype not in ("F16", "BF16"):
        raise DataError(f"{name}.scales is of type {scales.dtype}; F16 or BF16 was expected")
    cols, rows = qweight.shape[0] * 8, qweight.shape[1]
    group = cols if form.group_size == -1 else form.group_size
    groups = cols // group
    if cols % group or scales.shape != (groups, rows) or qzeros.shape != (groups, rows // 8):
        raise DataError(
            f"{name}: qweight {qweight.shape} in groups of {group} wants scales "
            f"{(groups, rows)} and qzeros {(groups, rows // 8)}, found {scales.shape} and "
            f"{qzeros.shape}; does the quantization config belong to this checkpoint?")
    order = None
    if f"{name}.g_idx" in tensors:
        g_idx = np.asarray(tensors[f"{name}.g_idx"].map())
        if g_idx.shape != (cols,):
            raise DataError(f"{name}.g_idx has shape {g_idx.shape}, ({cols},) was expected")
        order = order_of(name, g_idx, cols, group)
    # One scale a row is the same as equal scales in groups of 128.
    stored = group
    if form.group_size == -1:
        stored = next((size for size in (128, 64, 32) if cols % size == 0), 0)
    if stored not in (32, 64, 128):
        raise DataError(f"{name}: {cols} columns in groups of {group}; groups of 32, 64 or 128 "
                        "are supported")
    return GptqTensor(name, rows, cols, stored, qweight.map().view("<u4"), scales.map(),
                      scales.dtype.lower(), unpack_zeros(qzeros.map(), form.zeros_plus), order)

"""Reads stores by the words of data/FORMAT.md, with nothing of the package that writes them."""

import h5py
import numpy as np


def bits_to_float(bits, kind):
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def attributes(target):
    """Text comes as fixed-length bytes."""
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in target.attrs.items()}


def weights_of(file, name):
    """A tensor's weights in float64, columns in the order of the input features."""
    group = file["tensors"][name]
    a = attributes(group)
    kind, rows, cols = a["kind"], int(a["rows"]), int(a["cols"])
    if kind == "f32":
        return group["values"][...].astype(np.float64)
    if kind in ("f16", "bf16"):
        return bits_to_float(group["values"][...], kind)
    size, zero = int(a["group_size"]), a["zero_kind"]
    at, of = np.arange(cols), np.arange(cols) // size  # each column and its group
    out = group["codes"][...]
    if kind == "int4":
        out = out[:, at // 2] >> (4 * (at % 2)).astype(np.uint8) & 15
    out = out.astype(np.float64)
    if kind == "int4" and zero == "symmetric":
        out -= 8
    elif zero == "zero_points":
        out -= group["zeros"][...][:, of]
    out *= bits_to_float(group["scales"][...], a["scale_type"])[:, of]
    if zero == "minimums":
        out += bits_to_float(group["minimums"][...], a["scale_type"])[:, of]
    if "permutation" in group:
        sorted_out, order = out, group["permutation"][0]
        out = np.empty_like(out)
        out[:, order] = sorted_out
    return out


def crc32c_slow(data):
    """Bit by bit from the polynomial (RFC 3720): the judge of the checksums."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def all_datasets(file):
    """[(path, dataset)] of all but the checksums."""
    found = []
    file.visititems(lambda path, item: found.append((path, item))
                    if isinstance(item, h5py.Dataset) and not path.endswith("_crc32c") else None)
    return found


def wrong_chunks(path, crc):
    """The chunks whose checksum is not crc(bytes), as text."""
    wrong = []
    with h5py.File(path, "r") as file:
        for name, data in all_datasets(file):
            sums = file[f"{name}_crc32c"][...]
            grid = tuple(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks))
            assert sums.shape == grid, (name, sums.shape, grid)
            for at in np.ndindex(*grid):
                part = data[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, data.chunks))]
                if crc(part.tobytes()) != sums[at]:
                    wrong.append(f"{name} {at}")
    return wrong

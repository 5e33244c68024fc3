"""Chunking and checksums of data/FORMAT.md, over h5py's low-level interface.

The low level is needed for datasets of length 0 (h5py refuses their chunk of one element) and for
early allocation, which model_store.py builds its restart on.
"""

import google_crc32c
import h5py
import numpy as np

VERSION = 1
CHUNK_1D = 65536
CHUNK_ROWS = 512
CHUNK_COLUMNS = 512


def crc32c(array):
    """CRC-32C of an array's elements, row-major, little-endian."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return google_crc32c.value(little.tobytes())


def set_attributes(target, values):
    """Integers become int64, lists of integers int64 arrays, text fixed-length UTF-8."""
    for name, value in values.items():
        if isinstance(value, str):
            # Variable-length strings live in a heap that HDF5 trusts too much in a damaged file.
            size = max(1, len(value.encode("utf-8")))
            target.attrs.create(name, value, dtype=h5py.string_dtype("utf-8", size))
        elif isinstance(value, float):
            target.attrs.create(name, value, dtype="<f8")
        else:
            target.attrs.create(name, np.asarray(value, dtype="<i8"))


def attributes(target):
    """All attributes, text as str."""
    return {name: value.decode("utf-8") if isinstance(value, bytes) else value
            for name, value in target.attrs.items()}


def make_dataset(group, name, shape, dtype, chunk=None):
    """An unfiltered dataset whose storage exists from the start, filled with nothing."""
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if chunk:
        layout.set_chunk(chunk)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype).newbyteorder("<"))
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, dcpl=layout))


def crc_shape(shape, chunk):
    return tuple(-(-size // step) for size, step in zip(shape, chunk))


def write_1d(group, name, array):
    """A one-dimensional dataset and its checksums."""
    array = np.ascontiguousarray(array)
    chunk = (max(1, min(len(array), CHUNK_1D)),)
    data = make_dataset(group, name, array.shape, array.dtype, chunk)
    sums = [crc32c(array[at : at + CHUNK_1D]) for at in range(0, len(array), CHUNK_1D)]
    checks = make_dataset(group, f"{name}_crc32c", (len(sums),), np.uint32)
    if sums:
        data[...] = array
        checks[...] = np.array(sums, np.uint32)


def write_bytes(group, name, data):
    write_1d(group, name, np.frombuffer(data, np.uint8))


def write_texts(group, name, texts):
    """`NAME_text` (UTF-8) and `NAME_offsets`."""
    encoded = [text.encode("utf-8") for text in texts]
    write_bytes(group, f"{name}_text", b"".join(encoded))
    write_1d(group, f"{name}_offsets", offsets_of(encoded, np.uint64))


def offsets_of(items, dtype):
    offsets = np.zeros(len(items) + 1, dtype)
    np.cumsum([len(item) for item in items], out=offsets[1:], dtype=dtype)
    return offsets


def check_crcs(group, name):
    """Every chunk of one dataset against its stored checksum; returns False at a mismatch."""
    data, sums = group[name], group[f"{name}_crc32c"][...]
    if data.size == 0:
        return sums.shape == (0,)
    if sums.shape != crc_shape(data.shape, data.chunks):
        return False
    for where in np.ndindex(*sums.shape):
        part = tuple(slice(i * c, (i + 1) * c) for i, c in zip(where, data.chunks))
        if crc32c(data[part]) != int(sums[where]):
            return False
    return True

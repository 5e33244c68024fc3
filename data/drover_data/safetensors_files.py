"""The tensors of a Hugging Face folder as memory maps: nothing is read before it is used.

The safetensors package hands bf16 to numpy only through other frameworks and gives no way to take
rows of it; the format is a length, a JSON table and raw data, so that is read here.
"""

import json
import math
import os

import numpy as np

from .cli import DataError, read_json

TYPES = {"F16": np.uint16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "U32": np.uint32,
         "I64": np.int64}
MAX_HEADER = 100_000_000  # as the safetensors package has it


class TensorFile:
    """One tensor: where it lies."""

    def __init__(self, path, name, dtype, shape, offset):
        self.path, self.name, self.dtype, self.shape = path, name, dtype, tuple(shape)
        self.offset = offset

    def map(self):
        """f16 and bf16 as their bit patterns."""
        if self.dtype not in TYPES:
            raise DataError(f"{self.name} in {self.path} is of type {self.dtype}; supported are "
                            f"{', '.join(TYPES)}")
        if 0 in self.shape:
            return np.zeros(self.shape, TYPES[self.dtype])
        return np.memmap(self.path, np.dtype(TYPES[self.dtype]).newbyteorder("<"), "r",
                         self.offset, self.shape)


def read_header(path):
    """{name: TensorFile} of one file; every place is checked against the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DataError(f"{path} is not a whole safetensors file (its header claims {length} "
                            f"bytes, the file has {size}); fetch it again")
        try:
            header = json.loads(file.read(length))
            out = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                count = math.prod(entry["shape"])
                kind = TYPES.get(entry["dtype"])
                fits = kind is None or end - begin == count * np.dtype(kind).itemsize
                if not 0 <= begin <= end or not fits:
                    raise DataError(f"{path}: the sizes of {name} contradict each other")
                if 8 + length + end > size:
                    raise DataError(f"{path} is cut off: {name} ends at byte {8 + length + end} "
                                    f"and the file has {size}; fetch it again")
                out[name] = TensorFile(path, name, entry["dtype"], entry["shape"],
                                       8 + length + begin)
            return out
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: its safetensors header cannot be read: {error}") from error


def shard_paths(folder):
    """The safetensors files of a folder, by its index if it has one."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    for index in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors.index.json")):
        wanted = sorted(set(read_json(os.path.join(folder, index))["weight_map"].values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(f"{folder} lacks {len(missing)} of the {len(wanted)} files that "
                            f"{index} names, the first is {missing[0]}; fetch them")
        return [os.path.join(folder, name) for name in wanted]
    if not names:
        raise DataError(f"{folder} holds no safetensors files; other weight files (.bin) are not "
                        "read, convert them first")
    return [os.path.join(folder, name) for name in names]


def read_folder(folder):
    """({name: TensorFile}, [paths])"""
    paths, tensors = shard_paths(folder), {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise DataError(f"{name} is both in {tensors[name].path} and {path}; "
                                "two checkpoints in one folder? Leave one of them")
            tensors[name] = tensor
    return tensors, paths

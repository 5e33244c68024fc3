"""Writes a model store, tensor by tensor, so that a kill at any moment loses at most one tensor.

The whole file is laid out first: every dataset gets its place, and the file is closed and synced.
From then on HDF5 is only read (where does this chunk lie?) and the bytes go to their places
directly. So the file under way is well-formed at every moment, and the journal beside it, which
names a tensor only after its bytes were synced, says what need not be written again.
"""

import dataclasses
import fcntl
import json
import os
import shutil

import h5py
import numpy as np

from . import hdf5
from .cli import DataError, check_output, sha256_bytes, sync_folder


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    name: str
    kind: str  # int4, int8, f16, bf16, f32
    rows: int
    cols: int
    group_size: int = 0  # int4, int8
    zero_kind: str = "symmetric"  # symmetric, zero_points, minimums
    scale_type: str = "f16"
    permuted: bool = False

    def fields(self):
        """{dataset: (shape, type, chunk)}"""
        rows, cols = self.rows, self.cols
        high, wide = min(rows, hdf5.CHUNK_ROWS), min(cols, hdf5.CHUNK_COLUMNS)
        if self.kind in ("f16", "bf16", "f32"):
            dtype = np.float32 if self.kind == "f32" else np.uint16
            return {"values": ((rows, cols), np.dtype(dtype), (high, wide))}
        if self.group_size not in (32, 64, 128) or cols % self.group_size:
            raise DataError(f"{self.name}: {cols} columns in groups of {self.group_size}; groups "
                            "of 32, 64 or 128 that divide the columns are supported")
        groups = cols // self.group_size
        group_chunk = (high, min(groups, hdf5.CHUNK_COLUMNS))
        if self.kind == "int4":
            out = {"codes": ((rows, cols // 2), np.dtype(np.uint8), (high, wide // 2))}
        else:
            out = {"codes": ((rows, cols), np.dtype(np.int8), (high, wide))}
        out["scales"] = ((rows, groups), np.dtype(np.uint16), group_chunk)
        if self.zero_kind == "zero_points":
            out["zeros"] = ((rows, groups), np.dtype(np.uint8), group_chunk)
        elif self.zero_kind == "minimums":
            out["minimums"] = ((rows, groups), np.dtype(np.uint16), group_chunk)
        if self.permuted:
            out["permutation"] = ((1, cols), np.dtype(np.int32), (1, wide))
        return out

    def attributes(self):
        out = {"kind": self.kind, "rows": self.rows, "cols": self.cols}
        if self.kind in ("int4", "int8"):
            out |= {"group_size": self.group_size, "zero_kind": self.zero_kind,
                    "scale_type": self.scale_type}
        return out

    def stored_bytes(self):
        return sum(shape[0] * shape[1] * kind.itemsize for shape, kind, _ in self.fields().values())


class Journal:
    """Lines of JSON beside the file under way; a torn last line counts as never written."""

    def __init__(self, path):
        self.path = path
        self.entries = []
        self.file = open(path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{path} is in use: another import writes this store") from error
        except OSError:
            pass  # a file system without locks
        self.file.seek(0)
        good = 0
        for line in self.file.read().splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.entries.append(entry)
            good += len(line)
        self.file.truncate(good)

    def add(self, **entry):
        self.entries.append(entry)
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def restart(self):
        """Forgets all but the hashes of source files, which stay true."""
        kept = [entry for entry in self.entries if "hash" in entry]
        self.entries = []
        self.file.truncate(0)
        for entry in kept:
            self.add(**entry)

    def remove(self):
        self.file.close()
        os.unlink(self.path)


class StoreWriter:
    """begin(), then write() the fields of each tensor and finish_tensor(), then finish()."""

    def __init__(self, path, force=False):
        check_output(path, force)
        self.path, self.part = path, f"{path}.part"
        self.journal = Journal(f"{self.part}.journal")
        self.resumed = False

    def begin(self, architecture, provenance, tokenizer, specs):
        """Lays the file out, or goes on with the one that an earlier, equal import left."""
        self.specs = {spec.name: spec for spec in specs}
        plan = [architecture, provenance, tokenizer.sha256, [dataclasses.astuple(s) for s in specs]]
        key = sha256_bytes(json.dumps(plan, sort_keys=True).encode())
        known = any(entry.get("layout") == key for entry in self.journal.entries)
        self.resumed = known and os.path.exists(self.part)
        if not self.resumed:
            self.journal.restart()
            self._lay_out(architecture, provenance, tokenizer)
            self.journal.add(layout=key)
        self.finished = {entry["tensor"] for entry in self.journal.entries if "tensor" in entry}
        self.reader = h5py.File(self.part, "r")
        self.raw = os.open(self.part, os.O_RDWR)
        self.places, self.sums = {}, {}

    def _lay_out(self, architecture, provenance, tokenizer):
        needed = sum(spec.stored_bytes() for spec in self.specs.values())
        if os.path.exists(self.part):
            os.unlink(self.part)
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(self.path))).free
        if free < needed:
            raise DataError(f"{self.path} needs {needed / 1e9:.1f} GB and its disk has "
                            f"{free / 1e9:.1f} GB free; make room or give another --out")
        with h5py.File(self.part, "w", libver=("v108", "v110")) as file:
            hdf5.set_attributes(file, {"format": "drover-model", "format_version": hdf5.VERSION})
            hdf5.set_attributes(file.create_group("architecture"), architecture)
            hdf5.set_attributes(file.create_group("provenance"), provenance)
            tokenizer.write(file)
            tensors = file.create_group("tensors")
            for spec in self.specs.values():
                group = tensors.create_group(spec.name)
                hdf5.set_attributes(group, spec.attributes())
                for name, (shape, kind, chunk) in spec.fields().items():
                    hdf5.make_dataset(group, name, shape, kind, chunk)
                    sums = hdf5.crc_shape(shape, chunk)
                    hdf5.make_dataset(group, f"{name}_crc32c", sums, np.uint32)
        with open(self.part, "rb") as file:
            os.fsync(file.fileno())

    def is_done(self, name):
        return name in self.finished

    def _field(self, name, field):
        """Where the chunks of a field lie in the file, and its checksums so far."""
        if (name, field) not in self.places:
            data = self.reader["tensors"][name][field]
            places = {}
            data.id.chunk_iter(lambda info: places.update({info.chunk_offset: info.byte_offset}))
            self.places[name, field] = places
            shape, _, chunk = self.specs[name].fields()[field]
            self.sums[name, field] = np.zeros(hdf5.crc_shape(shape, chunk), "<u4")
        return self.places[name, field], self.sums[name, field]

    def write(self, name, field, block, row_begin=0):
        """Rows [row_begin, row_begin + len(block)) of a field; whole chunk rows, but at the end."""
        shape, kind, chunk = self.specs[name].fields()[field]
        block = np.ascontiguousarray(block, dtype=kind.newbyteorder("<"))
        row_end = row_begin + len(block)
        whole = row_begin % chunk[0] == 0 and (row_end % chunk[0] == 0 or row_end == shape[0])
        if block.ndim != 2 or block.shape[1] != shape[1] or row_end > shape[0] or not whole:
            raise ValueError(f"{name}/{field}: rows {row_begin} to {row_end} as {block.shape} do "
                             f"not fit {shape} in chunks of {chunk}")
        places, sums = self._field(name, field)
        for row in range(0, len(block), chunk[0]):
            for col in range(0, shape[1], chunk[1]):
                piece = block[row : row + chunk[0], col : col + chunk[1]]
                at = ((row_begin + row) // chunk[0], col // chunk[1])
                sums[at] = hdf5.crc32c(piece)
                if piece.shape != chunk:
                    padded = np.zeros(chunk, piece.dtype)
                    padded[: piece.shape[0], : piece.shape[1]] = piece
                    piece = padded
                write_fully(self.raw, piece.tobytes(), places[row_begin + row, col])

    def finish_tensor(self, name):
        """All fields of the tensor are written: checksums, sync, journal."""
        for field in self.specs[name].fields():
            sums = self.sums.pop((name, field))
            self.places.pop((name, field))
            data = self.reader["tensors"][name][f"{field}_crc32c"]
            write_fully(self.raw, sums.tobytes(), data.id.get_offset())
        os.fdatasync(self.raw)
        self.journal.add(tensor=name)
        self.finished.add(name)

    def finish(self):
        missing = [name for name in self.specs if name not in self.finished]
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written, the first is {missing[0]}")
        self.reader.close()
        os.fsync(self.raw)
        os.close(self.raw)
        os.replace(self.part, self.path)
        sync_folder(self.path)
        self.journal.remove()


def write_fully(file, data, offset):
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count

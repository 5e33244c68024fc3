"""Writes and reads datasets (data/FORMAT.md)."""

import json
import os

import h5py
import numpy as np

from . import hdf5
from .cli import DataError, check_output, sync_folder

MAX_SAMPLE = 1048576


def write_dataset(path, name, tokenizer, inputs, output_lengths, references=None, questions=None,
                  source_files=(), synthetic=False, force=False):
    """inputs: a list of id lists; references and questions: texts, or None. Atomic."""
    count = len(inputs)
    if not count:
        raise DataError("there are no samples to write")
    vocab = len(tokenizer.table.pieces)
    for index, ids in enumerate(inputs):
        if not 0 < len(ids) <= MAX_SAMPLE:
            raise DataError(f"sample {index} has {len(ids)} tokens; 1 to {MAX_SAMPLE} are allowed")
        if min(ids) < 0 or max(ids) >= vocab:
            raise DataError(f"sample {index} has token id {max(ids)} and the tokenizer {vocab} "
                            "tokens; this is another model's tokenizer")
    check_output(path, force)
    part = f"{path}.part"
    with h5py.File(part, "w", libver=("v108", "v110")) as file:
        hdf5.set_attributes(file, {
            "format": "drover-dataset", "format_version": hdf5.VERSION, "name": name,
            "vocab": vocab, "source_files": json.dumps(list(source_files)),
            "synthetic": int(synthetic)})
        tokenizer.write(file)
        hdf5.write_1d(file, "input_ids", np.concatenate([np.asarray(i, np.int32) for i in inputs]))
        hdf5.write_1d(file, "input_offsets", hdf5.offsets_of(inputs, np.uint64))
        hdf5.write_1d(file, "output_lengths", np.asarray(output_lengths, np.int32))
        hdf5.write_texts(file, "reference", references or [""] * count)
        hdf5.write_texts(file, "question", questions or [""] * count)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path)


class Dataset:
    """All of a dataset in memory, checksums verified."""

    def __init__(self, path):
        try:
            with h5py.File(path, "r") as file:
                root = hdf5.attributes(file)
                if root.get("format") != "drover-dataset":
                    raise DataError(f"{path} is not a drover dataset")
                if int(root["format_version"]) != hdf5.VERSION:
                    raise DataError(f"{path} has format version {root['format_version']}; "
                                    f"{hdf5.VERSION} was expected")
                self.name, self.vocab = root["name"], int(root["vocab"])
                self.tokenizer_sha256 = hdf5.attributes(file["tokenizer"])["sha256"]
                self.inputs = self._lists(file, "input_ids", "input_offsets", path)
                self.output_lengths = self._read(file, "output_lengths", path)
                self.references = self._texts(file, "reference", path)
                self.questions = self._texts(file, "question", path)
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there") from error
        except (KeyError, OSError) as error:
            raise DataError(f"{path} is not a whole drover dataset: {error}") from error

    def _read(self, file, name, path):
        if not hdf5.check_crcs(file, name):
            raise DataError(f"{path}: {name} does not match its checksum; the file is damaged")
        return file[name][...]

    def _lists(self, file, values, offsets, path):
        values, offsets = self._read(file, values, path), self._read(file, offsets, path)
        return [values[a:b] for a, b in zip(offsets.tolist(), offsets.tolist()[1:])]

    def _texts(self, file, name, path):
        parts = self._lists(file, f"{name}_text", f"{name}_offsets", path)
        return [part.tobytes().decode("utf-8", errors="replace") for part in parts]

    def __len__(self):
        return len(self.inputs)

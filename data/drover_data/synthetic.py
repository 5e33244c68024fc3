"""Datasets of seeded random ids with given lengths: for speed, not for quality."""

import csv

import numpy as np

from .cli import DataError, source_file
from .dataset_file import write_dataset


def read_lengths(path):
    """[(input tokens, output tokens)]"""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            lengths = [(int(row["input_tokens"]), int(row["output_tokens"])) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{rows.line_num}: two numbers under the head "
                            "input_tokens,output_tokens were expected") from error
    if not lengths or min(min(pair) for pair in lengths) < 1:
        raise DataError(f"{path}: lengths of at least 1 were expected")
    return lengths


def make_synthetic(lengths_path, out, tokenizer, count, seed, force=False):
    """Samples take the lengths in the file's order, from its start again when it ends."""
    lengths = read_lengths(lengths_path)
    plain = np.flatnonzero(np.asarray(tokenizer.table.special) == 0).astype(np.int32)
    random = np.random.default_rng(seed)
    chosen = [lengths[at % len(lengths)] for at in range(count or len(lengths))]
    inputs = [random.choice(plain, size) for size, _ in chosen]
    write_dataset(out, f"synthetic:{seed}", tokenizer, inputs, [size for _, size in chosen],
                  source_files=[source_file(lengths_path)], synthetic=True, force=force)
    return len(inputs)

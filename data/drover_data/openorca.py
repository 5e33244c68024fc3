"""MLPerf's Open Orca pickles, opened without trusting them."""

import pickle

import numpy as np
import pandas as pd
from pandas.compat import pickle_compat

from .cli import DataError, source_file
from .dataset_file import write_dataset

# What a pickled DataFrame of text, numbers and lists consists of, in the words of pandas 1.0 to 3
# and numpy 1 and 2. A pickle can call whatever it names: nothing else may be named.
ADMITTED = {
    "__builtin__": {"slice"}, "builtins": {"slice"}, "_codecs": {"encode"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"}, "numpy._core.numeric": {"_frombuffer"},
    "pandas": {"DataFrame", "Index", "RangeIndex", "StringDtype"},
    "pandas.arrays": {"StringArray"},
    "pandas.core.arrays.string_": {"StringArray", "StringDtype"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.numeric": {"Int64Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.internals.managers": {"BlockManager"},
    "pandas.core.internals.blocks": {"new_block"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
}


class AdmittingUnpickler(pickle_compat.Unpickler):
    def find_class(self, module, name):
        if name not in ADMITTED.get(module, ()):
            raise DataError(f"the pickle names {module}.{name}, which a table of Open Orca does "
                            "not need; the file is not what it should be and was not opened")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


COLUMNS = ("tok_input", "output", "question")


def read_pickle(path):
    """The DataFrame at PATH; DataError for anything else."""
    with open(path, "rb") as file:
        try:
            table = AdmittingUnpickler(file).load()
        except DataError:
            raise
        except Exception as error:  # a damaged pickle fails in any way it likes
            raise DataError(f"{path} cannot be read as a pickled table: {error!r}") from error
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"{path} holds a {type(table).__name__}, a pandas table was expected")
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {list(table.columns)}")
    return table


def token_list(row, value):
    ids = np.asarray(value)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise DataError(f"row {row}: tok_input is not a list of token ids")
    return ids.astype(np.int32)


def output_lengths(table):
    if "tok_output_length" in table.columns:
        return table["tok_output_length"].to_numpy(np.int32)
    if "tok_output" in table.columns:
        return np.array([len(ids) for ids in table["tok_output"]], np.int32)
    return np.zeros(len(table), np.int32)


def import_openorca(path, out, tokenizer, name, force=False):
    """Writes the dataset OUT; tokenizer: a StoredTokenizer of the model the ids were made for."""
    table = read_pickle(path)
    inputs = [token_list(row, value) for row, value in enumerate(table["tok_input"])]
    if "tok_input_length" in table.columns:
        lengths = np.array([len(ids) for ids in inputs])
        wrong = np.flatnonzero(lengths != table["tok_input_length"].to_numpy())
        if len(wrong):
            raise DataError(f"row {wrong[0]}: tok_input has {lengths[wrong[0]]} ids, "
                            "tok_input_length says otherwise; the file is damaged")
    write_dataset(out, name, tokenizer, inputs, output_lengths(table),
                  [str(text).strip() for text in table["output"]],
                  [str(text) for text in table["question"]], [source_file(path)], force=force)
    return len(inputs)

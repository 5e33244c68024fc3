"""MLPerf's pickle, whole, damaged and hostile."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
from drover_data import openorca
from drover_data.cli import DataError
from drover_data.dataset_file import Dataset
from drover_data.tokens import StoredTokenizer


def table():
    """Three rows with the columns of open_orca_gpt4_tokenized_llama.sampled_24576.pkl."""
    inputs, outputs = [[0, 5, 6], [0, 7], [0, 9, 10, 11]], [[3, 1], [4, 5, 1], [6, 1]]
    return pd.DataFrame({
        "id": ["flan.1", "cot.2", "t0.3"], "system_prompt": ["", "You help.", ""],
        "question": ["why?", "wörum?", "how?"], "output": [" because", "darum ", "so"],
        "input": ["[INST] why? [/INST] "] * 3, "tok_input": inputs, "tok_output": outputs,
        "origin": ["flan", "cot", "t0"], "tok_input_length": [len(i) for i in inputs],
        "tok_output_length": [len(o) for o in outputs]})


def old_style(frame):
    """As pandas before 3 has text columns: objects."""
    frame = frame.astype({name: object for name in ("id", "question", "output", "input",
                                                    "system_prompt", "origin")})
    frame.columns = frame.columns.astype(object)
    return frame


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("style", [old_style, lambda frame: frame,
                                   lambda frame: old_style(frame).set_index(np.array([4, 7, 9]))])
def test_import(tmp_path, tokenizer_json, protocol, style):
    path, out = tmp_path / "orca.pkl", str(tmp_path / "orca.h5")
    path.write_bytes(pickle.dumps(style(table()), protocol))
    openorca.import_openorca(str(path), out, StoredTokenizer(tokenizer_json), "orca")
    read = Dataset(out)
    assert [ids.tolist() for ids in read.inputs] == table()["tok_input"].tolist()
    assert read.references == ["because", "darum", "so"]
    assert read.questions == ["why?", "wörum?", "how?"]
    assert read.output_lengths.tolist() == [2, 3, 2]


def test_numpy_1_names(tmp_path, tokenizer_json):
    """The published file was written with numpy 1, whose modules had other names."""
    path = tmp_path / "orca.pkl"
    data = pickle.dumps(old_style(table()), 2)
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(openorca.read_pickle(str(path))) == 3


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused(tmp_path, protocol):
    mark = tmp_path / "mark"
    path = tmp_path / "evil.pkl"
    for evil in (Evil(os.system, f"touch {mark}"), Evil(eval, f"open({str(mark)!r}, 'w')"),
                 Evil(pd.read_pickle, "x"), Evil(np.load, "x"), Evil(getattr, "x", "upper")):
        frame = old_style(table())
        frame.loc[0, "question"] = evil
        path.write_bytes(pickle.dumps(frame, protocol))
        with pytest.raises(DataError, match="was not opened"):
            openorca.read_pickle(str(path))
        assert not mark.exists()
    # A dotted name that begins with an admitted one.
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.")
    with pytest.raises(DataError, match="was not opened"):
        openorca.read_pickle(str(path))


def test_wrong_pickles(tmp_path, tokenizer_json):
    path, out = tmp_path / "orca.pkl", str(tmp_path / "orca.h5")

    def refused(match, data):
        path.write_bytes(data)
        with pytest.raises(DataError, match=match):
            openorca.import_openorca(str(path), out, StoredTokenizer(tokenizer_json), "orca")
        assert not os.path.exists(out)

    whole = pickle.dumps(old_style(table()))
    refused("cannot be read", whole[: len(whole) // 2])
    refused("a pandas table was expected", pickle.dumps([1, 2]))
    refused("lacks the columns", pickle.dumps(old_style(table()).drop(columns="tok_input")))
    frame = old_style(table())
    frame["tok_input_length"] = [3, 2, 5]
    refused("row 2", pickle.dumps(frame))
    frame = old_style(table())
    frame["tok_input"] = [[1], ["a"], [3]]
    refused("row 1", pickle.dumps(frame))

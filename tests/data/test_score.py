"""Scoring of hand-made accuracy logs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA
from drover_data import scoring
from drover_data.cli import DataError
from drover_data.dataset_file import write_dataset
from drover_data.tokens import Prompter, StoredTokenizer

REFERENCES = ["the cat sat on the mat", "a dog runs fast", "hello there world", "nothing"]
ANSWERS = ["the cat sat on a mat", "dogs running", "hello there world", "else"]
# By hand, with stemming: of the first answer 5 of 6 words and 3 of 5 pairs are the reference's; of
# the second both words (dog, run), so precision 1 and recall 1/2, of pairs 1 of 1 and 1 of 3.
UNIGRAM = [5 / 6, 2 / 3, 1.0, 0.0]
BIGRAM = [3 / 5, 1 / 2, 1.0, 0.0]
LONGEST = [5 / 6, 2 / 3, 1.0, 0.0]


@pytest.fixture
def dataset(tmp_path, tokenizer_json):
    stored = StoredTokenizer(tokenizer_json)
    path = str(tmp_path / "set.h5")
    write_dataset(path, "four", stored, [[5]] * 4, [0] * 4, REFERENCES)
    return path, Prompter(stored)


def entry(index, ids):
    data = np.array(ids, "<i4").tobytes().hex().upper()
    return {"seq_id": index, "qsl_idx": index, "data": data, "token_data": "",
            "token_count": len(ids)}


def write_log(path, prompter, answers):
    """As LoadGen writes it, out of order; each answer ends with </s> (id 1)."""
    entries = [entry(index, [*prompter.raw(answer), 1]) for index, answer in enumerate(answers)]
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries[::-1])) + "\n]\n")
    return str(path)


def score(*args):
    tool = os.path.join(DATA, "score.py")
    return subprocess.run([sys.executable, tool, *map(str, args)], capture_output=True, text=True)


def test_figures_by_hand(tmp_path, dataset):
    path, prompter = dataset
    log, out = write_log(tmp_path / "log.json", prompter, ANSWERS), tmp_path / "score.json"
    result = tmp_path / "result.json"
    result.write_text('{"valid": true, "samples": 4}')
    done = score(log, "--dataset", path, "--out", out, "--result", result)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for kind, values in zip(scoring.KINDS, (UNIGRAM, BIGRAM, LONGEST)):
        assert found["rouge"][kind] == pytest.approx(100 * np.mean(values), abs=1e-4)
    tokens = sum(len(prompter.raw(answer)) + 1 for answer in ANSWERS)
    assert found["output_tokens"] == tokens and found["tokens_per_sample"] == tokens / 4
    merged = json.loads(result.read_text())
    assert merged["valid"] is True and merged["rouge"]["rouge1"] == found["rouge"]["rouge1"]
    assert "4 samples" in done.stdout


def test_limits(tmp_path, dataset):
    path, prompter = dataset
    log, out = write_log(tmp_path / "log.json", prompter, ANSWERS), tmp_path / "score.json"
    assert score(log, "--dataset", path, "--limits", "llama2-70b", "--out", out).returncode == 0
    limits = json.loads(out.read_text())["limits"]
    assert limits["99"] == {"rouge1": 43.98689, "rouge2": 21.81485, "rougeL": 28.33004}
    assert limits["99.9"] == {"rouge1": 44.38677, "rouge2": 22.01316, "rougeL": 28.58758}
    assert json.loads(out.read_text())["passes"] == {"99": False, "99.9": False}  # few tokens
    for factor, passes in ((1.0, (True, True)), (1.005, (True, False)), (1.05, (False, False))):
        rouge = {kind: value * factor
                 for kind, value in json.loads(out.read_text())["rouge"].items()}
        (tmp_path / "reference.json").write_text(json.dumps({"rouge": rouge}))
        again = tmp_path / "again.json"
        done = score(log, "--dataset", path, "--reference", tmp_path / "reference.json",
                     "--out", again)
        assert done.returncode == 0, done.stderr
        assert tuple(json.loads(again.read_text())["passes"].values()) == passes
        assert ("NOT met" in done.stdout) == (passes != (True, True))


def test_first_samples_only(tmp_path, dataset):
    path, prompter = dataset
    log = write_log(tmp_path / "log.json", prompter, ANSWERS[:3])
    assert "lacks 1 of 4 samples" in score(log, "--dataset", path).stderr
    done = score(log, "--dataset", path, "--samples", "3")
    assert done.returncode == 0 and "3 samples" in done.stdout
    assert "another dataset" in score(log, "--dataset", path, "--samples", "2").stderr


@pytest.mark.parametrize("match,change", [
    ("killed", lambda text: text[: len(text) - 3]),
    ("killed", lambda text: text[: len(text) // 2]),
    ("twice", lambda text: text.replace('"qsl_idx": 1', '"qsl_idx": 2')),
    ("token_count", lambda text: text.replace('"data": "', '"data": "05000000', 1)),
    ("int32", lambda text: text.replace('"data": "', '"data": "05', 1)),
    ("not hex", lambda text: text.replace('"data": "', '"data": "zz', 1)),
    ("lacks qsl_idx", lambda text: text.replace('"qsl_idx": 1', '"other": 1'))])
def test_bad_logs(tmp_path, dataset, match, change):
    path, prompter = dataset
    log = tmp_path / "log.json"
    write_log(log, prompter, ANSWERS)
    log.write_text(change(log.read_text()))
    done = score(log, "--dataset", path)
    assert done.returncode == 3 and match in done.stderr and "Traceback" not in done.stderr


def test_bootstrap():
    random = np.random.default_rng(7)
    base = random.uniform(0.1, 0.9, (256, 3))
    same = scoring.bootstrap_ratio(base, base)["rouge1"]
    assert same == {"ratio": 1.0, "low": 1.0, "high": 1.0}  # paired: no spread of its own
    noisy = np.clip(base * 0.98 + random.normal(0, 0.05, base.shape), 0, 1)
    found = scoring.bootstrap_ratio(noisy, base)
    for kind in scoring.KINDS:
        assert 0.96 < found[kind]["low"] < found[kind]["ratio"] < found[kind]["high"] < 1.0
    assert found == scoring.bootstrap_ratio(noisy, base)  # fixed seed


def test_many_samples_use_processes(tokenizer_json):
    stored = StoredTokenizer(tokenizer_json)
    prompter = Prompter(stored)
    log = {index: np.array(prompter.raw(ANSWERS[index % 4]), "<i4") for index in range(600)}
    scores = scoring.rouge_of(log, [REFERENCES[index % 4] for index in range(600)], stored.table)
    np.testing.assert_allclose(scores[:, 0], np.tile(UNIGRAM, 150))


def test_unfinished_result_is_an_error(tmp_path):
    (tmp_path / "result.json").write_text("{")
    from drover_data.cli import read_json
    with pytest.raises(DataError, match="cut off"):
        read_json(str(tmp_path / "result.json"))

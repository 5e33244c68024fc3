"""What a run left in its --out folder, read as a user or a submission checker would."""

import json
import pathlib
import re
import shutil
import subprocess

import h5py
import numpy as np
import pytest

import drover
import goldens

ROUGE = ("rouge1", "rouge2", "rougeL")


class Run:
    """A finished `drover run`, its folder and its outcome."""

    def __init__(self, folder, outcome):
        self.folder, self.outcome = pathlib.Path(folder), outcome
        self.result = json.loads((self.folder / "result.json").read_text())

    def logs(self, mode):
        return self.folder / ("performance/run_1" if mode == "performance" else "accuracy")

    def summary(self, mode="performance"):
        return (self.logs(mode) / "mlperf_log_summary.txt").read_text()

    def detail(self, mode="performance"):
        """LoadGen's detail log: a list of its entries."""
        prefix, entries = ":::MLLOG ", []
        for line in (self.logs(mode) / "mlperf_log_detail.txt").read_text().splitlines():
            assert line.startswith(prefix), f"not a line of LoadGen's: {line}"
            entries.append(json.loads(line[len(prefix):]))
        return entries

    def accuracy(self):
        """Tokens of each sample, from LoadGen's accuracy log."""
        answers = {}
        for entry in json.loads((self.logs("accuracy") / "mlperf_log_accuracy.json").read_text()):
            ids = np.frombuffer(bytes.fromhex(entry["data"]), "<i4").tolist()
            assert len(ids) == entry["token_count"]
            assert entry["qsl_idx"] not in answers, f"sample {entry['qsl_idx']} is logged twice"
            answers[entry["qsl_idx"]] = ids
        return answers

    def journal(self, mode):
        text = (self.folder / mode / "journal.jsonl").read_text()
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def rank_logs(self):
        return [file.read_text() for file in sorted((self.folder / "logs").glob("rank-*.log"))]

    def work_of_ranks(self):
        """Steps, rows, sequences and seconds of each rank, from its own log."""
        work = []
        for text in self.rank_logs():
            found = re.search(r"worked: (\d+) steps, (\d+) rows, (\d+) sequences, (\S+) s in steps",
                              text)
            assert found, f"the log does not tell the rank's work:\n{text}"
            steps, rows, sequences, seconds = found.groups()
            work.append({"steps": int(steps), "rows": int(rows), "sequences": int(sequences),
                         "seconds": float(seconds)})
        return work


def run(folder, ranks, *arguments, **options):
    return Run(folder, drover.drover(ranks, "run", "--out", folder, *arguments, **options))


def questions():
    with h5py.File(drover.DATASET) as f:
        text, at = f["question_text"][:].tobytes(), f["question_offsets"][:].tolist()
    return [text[a:b].decode() for a, b in zip(at, at[1:])]


def prompts(count):
    with h5py.File(drover.DATASET) as f:
        ids, at = f["input_ids"][:], f["input_offsets"][:count + 1].tolist()
    return [ids[a:b].tolist() for a, b in zip(at, at[1:])]


def check_same_answers(tmp_path, got, want, extra):
    """Dictionaries of sample and tokens; margins are looked up only where they are needed."""
    assert sorted(got) == sorted(want)
    different = [s for s in want if got[s] != want[s]]
    if not different:
        return
    asked = prompts(max(different) + 1)
    rows = drover.logits(tmp_path / "margins", [(asked[s] + want[s][:-1], len(asked[s]) - 1)
                                                for s in different], extra=extra)
    margins = goldens.margins(rows, len(different))
    rows.remove()
    near = drover.check_same_tokens([got[s] for s in different], [want[s] for s in different],
                                    margins, 1e-3)
    print(f"{near} near-ties")


def need_packages():
    """Skips where Python lacks what the data tools need."""
    for package in ("rouge_score", "tokenizers", "jinja2", "h5py"):
        if subprocess.run([drover.PYTHON, "-c", f"import {package}"], check=False,
                          capture_output=True).returncode != 0:
            pytest.skip(f"{drover.PYTHON} has no {package}: launch/setup.sh --tests makes one that has")


def data_tool(name, *arguments):
    """Runs a script of data/ or launch/."""
    need_packages()
    p = subprocess.run([drover.PYTHON, str(drover.ROOT / name), *map(str, arguments)], check=False,
                       capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert p.returncode == 0, f"{name}: exit code {p.returncode}\n{p.stdout}\n{p.stderr}"
    return p.stdout


def compare_rouge(file, run_, reference, what):
    """What score.py says of one run beside another, written to `file`: ROUGE of both and the ratios
    with their 95 % intervals over the samples, in pairs."""
    logs = [r.logs("accuracy") / "mlperf_log_accuracy.json" for r in (run_, reference)]
    data_tool("data/score.py", logs[0], "--dataset", drover.DATASET, "--samples",
              run_.result["samples"], "--compare", logs[1], "--out", file)
    scores = json.loads(pathlib.Path(file).read_text())
    for kind in ROUGE:
        r = scores["compare"]["ratio"][kind]
        print(f"{what}, {scores['samples']} samples, {kind}: {scores['rouge'][kind]:.4f} against "
              f"{scores['compare']['rouge'][kind]:.4f}; ratio {r['ratio']:.4f}, 95 % interval "
              f"[{r['low']:.4f}, {r['high']:.4f}]")
    return scores


def check_sane(scores):
    """Far apart means broken, however wide the interval is."""
    for kind in ROUGE:
        r = scores["compare"]["ratio"][kind]
        assert r["low"] <= r["ratio"] <= r["high"]
        assert 0.8 < r["ratio"] < 1.25


def copy(run_, to):
    shutil.copytree(run_.folder, to)
    return Run(to, run_.outcome)

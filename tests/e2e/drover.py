"""What the end-to-end tests share: starting drover under mpirun, and the rules of comparison."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("DROVER_BIN", str(ROOT / "build/release/drover"))
DEMO = pathlib.Path(os.environ.get("DROVER_DEMO", ROOT / "build/demo"))
MODEL = DEMO / "smollm2-135m.h5"
DATASET = DEMO / "chatterbot.h5"
GOLDENS = ROOT / "tests/goldens/smollm2_goldens.h5"
MPIRUN = ROOT / "tests/mpi/mpirun.sh"
# With the data tools' packages: what the tests themselves run in, as ctest starts them.
PYTHON = os.environ.get("DROVER_PYTHON", sys.executable)


class Outcome:
    def __init__(self, code, out, err, seconds):
        self.code, self.out, self.err, self.seconds = code, out, err, seconds


def drover(ranks, *arguments, timeout=300, env=None, check=True, cwd=None):
    """Runs `mpirun -np RANKS drover ARGUMENTS`; with check, a failure fails the test."""
    command = [str(MPIRUN), str(ranks), BINARY, *map(str, arguments)]
    begin = time.monotonic()
    p = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False,
                       stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, cwd=cwd)
    outcome = Outcome(p.returncode, p.stdout, p.stderr, time.monotonic() - begin)
    if check and p.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\nexit code {p.returncode}\n{p.stdout}\n{p.stderr}")
    return outcome


def single(*arguments, timeout=120, env=None, check=True):
    """Without mpirun: for the subcommands that need no ranks."""
    begin = time.monotonic()
    p = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True,
                       timeout=timeout, check=False, stdin=subprocess.DEVNULL,
                       env={**os.environ, **(env or {})})
    outcome = Outcome(p.returncode, p.stdout, p.stderr, time.monotonic() - begin)
    if check and p.returncode != 0:
        raise AssertionError(f"exit code {p.returncode}\n{p.stdout}\n{p.stderr}")
    return outcome


def generate(tmp_path, prompts, ranks=1, model=MODEL, new_tokens=64, extra=()):
    """Greedy token ids of each prompt."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    tokens, answers = tmp_path / "prompts.json", tmp_path / "answers.json"
    tokens.write_text(json.dumps([[int(t) for t in p] for p in prompts]))
    drover(ranks, "generate", "--model", model, "--tokens", tokens, "--json", answers,
           "--max-new-tokens", new_tokens, *extra)
    return [a["tokens"] for a in json.loads(answers.read_text())]


class Logits:
    """Rows of `drover logits`; call remove() when done (they are large)."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.index = json.loads((self.folder / "index.json").read_text())
        self.data = np.memmap(self.folder / "logits.f32", dtype="<f4", mode="r").reshape(
            -1, self.index["vocab"])

    def sequence(self, i):
        s = self.index["sequences"][i]
        return self.data[s["row"]:s["row"] + s["rows"]]

    def remove(self):
        del self.data
        shutil.rmtree(self.folder)


def logits(folder, sequences, ranks=1, model=MODEL, extra=()):
    """sequences: list of (token ids, first position wanted)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / "tokens.json"
    tokens.write_text(json.dumps([{"tokens": [int(t) for t in ids], "from": int(first)}
                                  for ids, first in sequences]))
    drover(ranks, "logits", "--model", model, "--tokens", tokens, "--out", folder, *extra)
    return Logits(folder)


def check_same_tokens(got, want, margins, tolerance):
    """The first rule: tokens are the same, but at a step whose two best logits are within
    `tolerance` (behind it the texts go apart). Returns the number of such steps."""
    near = 0
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        for step, (a, b) in enumerate(zip(g, w)):
            if a == b:
                continue
            margin = margins[i][step]
            assert margin <= tolerance, (
                f"sequence {i}, step {step}: token {a} instead of {b}, whose margin is {margin}")
            near += 1
            break
        else:
            assert len(g) == len(w), f"sequence {i}: {len(g)} tokens instead of {len(w)}"
    return near

"""launch/study.py as a user calls it, on a small synthetic model."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

import drover

TINY = ("--model", "synthetic:tiny", "--dataset", "synthetic:24x16:32", "--max-new-tokens", 16)
ENVIRONMENT = {**os.environ, "OMPI_MCA_odls_base_sigkill_timeout": "1"}


def command(*arguments):
    return [drover.PYTHON, str(drover.ROOT / "launch/study.py"), *map(str, arguments)]


def study(*arguments, code=0, env=None):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False,
                          timeout=240, stdin=subprocess.DEVNULL,
                          env={**ENVIRONMENT, "DROVER_BIN": drover.BINARY, **(env or {})})
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr


@pytest.fixture(scope="module", autouse=True)
def packages():
    pytest.importorskip("matplotlib", reason="launch/setup.sh installs it")


def test_scaling_is_stopped_and_goes_on(tmp_path):
    out = tmp_path / "study"
    words = ("scaling", *TINY, "--out", out, "--ranks", "1,2,3", "--grids", "tp1,dp2,tp3",
             "--repeat", 2)
    first = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env={**ENVIRONMENT, "DROVER_BIN": drover.BINARY})
    finished = lambda: sorted(out.glob("runs/*-r[12]/outcome.json"))  # noqa: E731
    deadline = time.monotonic() + 120
    while not finished() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "a study is going on there" in study(*words, code=2)
    first.send_signal(signal.SIGTERM)
    told = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 130 and "the same command goes on from here" in told
    kept = {file: file.stat().st_mtime_ns for file in finished()}
    assert 1 <= len(kept) < 5

    told = study(*words)
    assert f"{len(kept)} of 6 runs are there already" in told
    assert "tp 3 does not divide 8 heads" in told and "does not fit: " in told
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items()), "a run was repeated"
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert sorted((r["label"], r["repeat"]) for r in rows if r["valid"]) == [
        (label, repeat) for label in ("tp1-pp1-dp1", "tp1-pp1-dp2") for repeat in "12"]
    for row in (r for r in rows if r["valid"]):
        result = json.loads((out / "runs" / row["run"] / "result.json").read_text())
        assert float(row["output_tokens_per_second"]) == result["output_tokens_per_second"] > 0
        assert result["settings"]["threads"] == "1", "as many threads a rank in all runs"
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 6 and "tp 3 does not divide 8 heads" in page
    begin = time.monotonic()
    assert "6 of 6 runs are there already" in study(*words)
    print(f"the report of finished runs took {time.monotonic() - begin:.1f} s")


def test_bad_input_is_told_before_any_run(tmp_path):
    out = ("--out", tmp_path / "out")
    scaling = ("scaling", *out, "--dataset", "synthetic:8x4:8")
    assert "there is no such file" in study(*scaling, "--model", tmp_path / "none.h5", code=3)
    tiny = (*scaling, "--model", "synthetic:tiny")
    assert "expected numbers with commas" in study(*tiny, "--ranks", "1,many", code=2)
    assert "which --ranks 2 does not name" in study(*tiny, "--ranks", 2, "--grids", "tp3", code=2)
    assert "no drover at" in study(*tiny, "--program", tmp_path / "none", code=4)
    assert "--tp is the study's own business" in study(*tiny, "--", "--tp", 2, code=2)
    assert not list(tmp_path.glob("out/runs/*"))
    if not shutil.which("sbatch"):
        assert "there is no Slurm here" in study(*tiny, "--submit", code=4)

"""launch/study.py as a user calls it, on a small synthetic model."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
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
    # The run that was stopped may just have ended: then it counts.
    found = int(re.search(r"(\d) of 6 runs are there already", told)[1])
    assert found in (len(kept), len(kept) + 1)
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


def test_batch_keeps_the_best_in_a_run_file(tmp_path):
    out = tmp_path / "batch"
    told = study("batch", *TINY, "--out", out, "--sequences", "4,16", "--step-tokens", 64, "--repeat",
                 2, "--", "--threads", 1)
    rows = [r for r in csv.DictReader((out / "results.csv").open()) if r["valid"] == "True"]
    assert len(rows) == 4 and "kept in" in told
    drover.drover(1, "run", "--config", out / "run.conf", "--demo", "--out", tmp_path / "run",
                  "--progress", "no")
    settings = json.loads((tmp_path / "run/result.json").read_text())["settings"]
    assert settings["step-tokens"] == "64" and settings["max-sequences"] in ("4", "16")
    assert settings["model"] == "synthetic:tiny" and settings["threads"] == "1"
    none = study("batch", *TINY, "--out", out, "--sequences", "4,16", "--step-tokens", 64, "--repeat",
                 2, "--most-tpot-ms", 0.0001, "--", "--threads", 1, code=2)
    assert "no batch size keeps" in none and "4 of 4 runs are there already" in none


def test_actions_on_one_core_are_few(tmp_path):
    """Continuous batching, FP8 KV, the batch and chunks; the others say why not."""
    out = tmp_path / "actions"
    table = subprocess.run(
        command("actions", *TINY, "--out", out, "--repeat", 1, "--grid", "tp1"),
        capture_output=True, text=True, check=True, timeout=240,
        env={**ENVIRONMENT, "DROVER_BIN": drover.BINARY}).stdout
    kept = json.loads((out / "results.json").read_text())
    lines = {(line["part"], line["action"]): line for line in kept["table"]}
    for part in ("alone", "cumulative", "left out"):
        assert "no 16-bit model" in lines[part, "INT4 weights"]["note"]
        assert lines[part, "CUDA graphs"]["note"].startswith("needs a GPU")
        assert lines[part, "more ranks"]["note"] == "the grid has one rank"
        assert lines[part, "FP8 KV cache"]["ratio"] > 0
        assert lines[part, "FP8 KV cache"]["arrow"] == "?", "one run shows no noise"
    baseline = next(r for r in kept["runs"] if r["label"] == "baseline")
    settings = json.loads((out / "runs" / baseline["run"] / "result.json").read_text())["settings"]
    assert (settings["batching"], settings["kv"], settings["max-sequences"], settings["threads"]) == (
        "static", "bf16", "50", "1")
    assert "One after the other" in table and "synthetic dataset has no reference" in (
        out / "report.html").read_text()


def test_actions_with_a_16_bit_model(tmp_path):
    """One small model twice, as GPTQ and in the 16 bits that its codes stand for."""
    pytest.importorskip("safetensors", reason="launch/setup.sh installs it")
    sys.path[:0] = [str(drover.ROOT / "tests/data"), str(drover.ROOT / "data")]
    import hf_folders
    tokenizer = hf_folders.byte_level_tokenizer()
    truth = hf_folders.write_gptq(tmp_path / "int4", tokenizer)
    tensors, _ = hf_folders.plain_parts(np.random.default_rng(1))
    for layer in range(hf_folders.LAYERS):
        for name in hf_folders.LINEAR:
            weights = truth[f"layers.{layer}.{hf_folders.OURS[name]}"]
            tensors[f"model.layers.{layer}.{name}.weight"] = weights.astype(np.float16)
    hf_folders.write_folder(tmp_path / "f16", tensors, hf_folders.config(), tokenizer, 1)
    for name in ("int4", "f16"):
        subprocess.run([drover.PYTHON, drover.ROOT / "data/import_hf.py", tmp_path / name, "--out",
                        tmp_path / f"{name}.h5"], check=True, capture_output=True, timeout=60)
    out = tmp_path / "actions"
    study("actions", "--model", tmp_path / "int4.h5", "--model-16bit", tmp_path / "f16.h5", "--dataset",
          "synthetic:8x8:32", "--max-new-tokens", 8, "--out", out, "--repeat", 1, "--grid", "tp1")
    kept = json.loads((out / "results.json").read_text())
    lines = {(line["part"], line["action"]): line for line in kept["table"]}
    for part in ("alone", "cumulative", "left out"):
        assert lines[part, "INT4 weights"]["ratio"] > 0, lines[part, "INT4 weights"]
    for run in kept["runs"]:
        taken = run["label"].split("+")
        model = json.loads((out / "runs" / run["run"] / "result.json").read_text())["settings"]["model"]
        assert model.endswith("int4.h5" if "int4" in taken or run["label"] == "all" else "f16.h5"), run["label"]
    none = study("actions", "--model", tmp_path / "int4.h5", "--model-16bit", tmp_path / "none.h5", "--dataset",
                 "synthetic:8x8:32", "--out", tmp_path / "no", code=3)
    assert "--model-16bit" in none and "no such file" in none
    wrong = study("actions", "--model", tmp_path / "int4.h5", "--model-16bit", tmp_path / "int4.h5",
                  "--dataset", "synthetic:8x8:32", "--out", tmp_path / "no", code=2)
    assert "16 bits" in wrong


def test_qps_of_mlperfs_length(tmp_path):
    """Told beforehand; the last run is LoadGen's own length, here cut short by a user.conf."""
    words = ("qps", "--model", "synthetic:tiny", "--dataset", "synthetic:8x8:32", "--max-new-tokens", 8,
             "--scenario", "server", "--mlperf-length", "--within", 1, "--out", tmp_path / "out")
    told = study(*words, "--dry-run", "--start", 3.5)
    assert "at least 24,576 queries, about 1 h 57 min" in told and "459 queries, 2 min 11 s each" in told
    assert not list(tmp_path.glob("out/runs/*"))
    assert "limits of MLPerf's" in study(*words, "--", "--ttft-ms", 400, code=2)
    short = tmp_path / "short.conf"
    short.write_text("llama2-70b.Server.min_duration = 2000\nllama2-70b.Server.min_query_count = 460\n")
    told = study(*words, "--start", 200, "--", "--threads", 1, "--user-conf", short)
    assert "queries, about" in told.split("confirmation at ")[1]
    conf = (tmp_path / "out/user.conf").read_text()
    assert "confirmed by a full run: VALID" in conf
    rate = float(conf.split("llama2-70b.Server.target_qps = ")[1])
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    last = [r for r in runs if r["kind"] == "confirm"][-1]
    assert last["valid"] and last["target_qps"] == rate and last["duration_s"] >= 2
    assert [r["kind"] for r in runs][:2] == ["offline", "probe"]


def test_qps_finds_a_rate_and_keeps_it(tmp_path):
    """A limit no machine misses at few queries a second; at many it is missed, or Offline is slower."""
    out = tmp_path / "qps"
    words = ("qps", "--model", "synthetic:tiny", "--dataset", "synthetic:8x8:32", "--max-new-tokens", 8,
             "--scenario", "server", "--within", 1, "--out", out, "--", "--ttft-ms", 400,
             "--tpot-ms", 200, "--threads", 1)
    told = study(*words)
    assert "probe at " in told and "459 queries, about" in told
    conf = (out / "user.conf").read_text()
    rate = float(conf.split("drover-demo.Server.target_qps = ")[1])
    runs = json.loads((out / "results.json").read_text())["runs"]
    confirmed = [r for r in runs if r["kind"] == "confirm"][-1]
    assert confirmed["valid"] and confirmed["target_qps"] == rate
    assert "is not tried: Offline is slower" in told or any(
        r["kind"] == "probe" and not r["valid"] and r["target_qps"] > rate for r in runs)
    assert "confirmed by a short run only" in conf
    made = len(list(out.glob("runs/*/outcome.json")))
    study(*words)
    assert len(list(out.glob("runs/*/outcome.json"))) == made, "a probe was repeated"
    drover.drover(1, "run", "--model", "synthetic:tiny", "--dataset", "synthetic:8x8:32", "--scenario",
                  "server", "--demo", "--user-conf", out / "user.conf", "--max-new-tokens", 8,
                  "--threads", 1, "--out", tmp_path / "run", "--progress", "no", "--ttft-ms", 2000)
    offline = study("qps", "--model", "synthetic:tiny", "--dataset", "synthetic:8x8:32",
                    "--max-new-tokens", 8, "--out", tmp_path / "offline")
    assert "LoadGen will issue" in offline
    assert "Offline.target_qps = " in (tmp_path / "offline/user.conf").read_text()


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

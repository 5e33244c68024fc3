"""Joules an output token: summed over hosts and ranks, in result.json, the table and bench step."""

import contextlib
import json
import os
import subprocess
import threading
import time

import drover

WATTS = 2000


@contextlib.contextmanager
def powercap(folder):
    """A package whose counter goes up by WATTS, in the files that Linux shows RAPL's counters in."""
    zone = folder / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    begin, stop = time.monotonic(), threading.Event()

    def write():
        aside = zone / "aside"
        aside.write_text(f"{int((time.monotonic() - begin) * WATTS * 1e6)}\n")
        os.replace(aside, zone / "energy_uj")

    def count():
        while not stop.wait(0.002):
            write()

    write()
    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield {"DROVER_POWERCAP": str(folder)}
    finally:
        stop.set()
        thread.join()


def check(energy, tokens, seconds):
    assert energy["devices"] == 1  # of two ranks of one host
    # On a busy machine the counter moves late, at either end: no closer than this.
    assert 0 < energy["joules"] <= WATTS * seconds
    assert energy["mean_watts"] > 0
    assert abs(energy["joules_per_output_token"] * tokens / energy["joules"] - 1) < 1e-9
    assert "RAPL" in energy["measured_by"]


RUN = ("run", "--model", "synthetic:tiny", "--dataset", "synthetic:32x96:200", "--scenario", "offline",
       "--mode", "performance", "--demo", "--max-new-tokens", 96, "--threads", 1)


def table(folder):
    summary = drover.ROOT / "launch/summary.py"
    return subprocess.run([drover.PYTHON, str(summary), str(folder)], capture_output=True, text=True,
                          check=True).stdout


def test_a_run_tells_its_energy(tmp_path):
    out = tmp_path / "out"
    with powercap(tmp_path / "powercap") as env:
        outcome = drover.drover(2, *RUN, "--dp", 2, "--out", out, env=env)
    result = json.loads((out / "result.json").read_text())
    check(result["energy"], result["output_tokens"], outcome.seconds)
    check(result["passes"]["performance"]["energy"], result["output_tokens"], outcome.seconds)
    assert "J an output token" in outcome.err and "J an output token" in table(out)


def test_without_a_counter_nothing_is_said(tmp_path):
    out = tmp_path / "out"
    outcome = drover.drover(1, *RUN, "--out", out, env={"DROVER_POWERCAP": str(tmp_path / "none")})
    assert "energy" not in (out / "result.json").read_text()
    assert " J" not in table(out) and "output token" not in outcome.err


def test_each_case_of_bench_step(tmp_path):
    file = tmp_path / "bench.json"
    with powercap(tmp_path / "powercap") as env:
        outcome = drover.drover(2, "bench", "step", "--model", "synthetic:tiny", "--tp", 2, "--threads",
                                1, "--prompt-tokens", 32, "--new-tokens", 400, "--repeat", 2,
                                "--batches", "1,4", "--json", file, env=env)
    for figure in json.loads(file.read_text())["figures"]:
        check(figure["energy"], 2 * 400 * figure["batch"], outcome.seconds)
    assert outcome.out.count("J an output token, prompts included") == 2

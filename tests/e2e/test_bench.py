"""`drover bench`: that it runs on grids, counts what it should, and says no; never how fast it is."""

import json
import re

import pytest

import drover

# So many new tokens that no replica ends its first sequence before a busy machine lets the other one
# begin: a step of this model takes 0.3 ms.
NEW_TOKENS = 160
STEP = ("bench", "step", "--model", "synthetic:tiny", "--prompt-tokens", 48, "--new-tokens",
        NEW_TOKENS, "--repeat", 2, "--threads", 1)


@pytest.mark.parametrize("ranks, grid", [(1, ()), (4, ("--tp", 2, "--pp", 2)), (2, ("--dp", 2))])
def test_steps(tmp_path, ranks, grid):
    file = tmp_path / "bench.json"
    out = drover.drover(ranks, *STEP, *grid, "--batches", "1,6", "--json", file).out
    assert "decode tok/s" in out
    bench = json.loads(file.read_text())
    assert bench["floors"]["met"] and bench["environment"]["versions"]["mpi"]
    assert bench["limits"]["read_bytes_per_s"] > 0 and bench["limits"]["linear_flops_per_s"] > 0
    assert [f["batch"] for f in bench["figures"]] == [1, 6]
    for f in bench["figures"]:
        assert len(f["repeats"]) == 2
        for r in f["repeats"]:
            tokens_a_step = r["decode_tokens_per_s"] * r["step_ms"] / 1000
            if f["batch"] == 1:  # alone: every step after the first token is in the window
                assert r["window_steps"] == NEW_TOKENS - 1 and tokens_a_step == pytest.approx(1)
            else:  # all decode in the window, spread over a group for each stage
                assert tokens_a_step == pytest.approx(f["batch"] / stages(bench), rel=0.35)


def stages(bench):
    return int(bench["grid"].split(" x ")[1].split()[1])  # "tp 2 x pp 2 x dp 1"


def test_a_floor_that_is_not_met(tmp_path):
    file = tmp_path / "bench.json"
    outcome = drover.drover(1, *STEP, "--batches", 1, "--floor-decode", 1e8, "--json", file,
                            check=False)
    assert outcome.code == 5
    assert not json.loads(file.read_text())["floors"]["met"]


@pytest.mark.parametrize("bench", ["tune", "step"])
def test_a_cpu_has_nothing_to_tune(tmp_path, bench):
    file = tmp_path / "tuning.txt"
    extra = ("--out", file) if bench == "tune" else ("--tuning", file)
    outcome = drover.drover(1, "bench", bench, "--model", "synthetic:tiny", "--backend", "cpu",
                            "--threads", 1, *extra, check=False)
    assert outcome.code == 2 and "CPU" in outcome.err and not file.exists()


def test_a_batch_without_slots():
    outcome = drover.drover(1, *STEP, "--batches", "1,9", "--max-sequences", 8, check=False)
    assert outcome.code == 2 and "--max-sequences 9" in outcome.err


def test_an_answer_shorter_than_the_prompts_take():
    step = ("bench", "step", "--model", "synthetic:tiny", "--prompt-tokens", 64, "--batches", 12,
            "--step-tokens", 64, "--repeat", 1, "--threads", 1)
    outcome = drover.drover(1, *step, "--new-tokens", 8, check=False)
    assert outcome.code == 2
    needed = int(re.search(r"--new-tokens (\d+) or more", outcome.err).group(1))
    # 12 prompts in steps of 64 rows, of which those that have started take some; two steps of all.
    assert 14 <= needed <= 16
    drover.drover(1, *step, "--new-tokens", needed)


def test_communicator(tmp_path):
    file = tmp_path / "comm.json"
    drover.drover(3, "bench", "comm", "--sizes", "64,300000", "--seconds", 0.02, "--json", file)
    bench = json.loads(file.read_text())
    assert bench["ranks"] == 3
    assert {(f["operation"], f["bytes"]) for f in bench["figures"]} == {
        (o, b) for o in ("all_reduce", "all_gather", "send_recv") for b in (64, 300000)}
    for f in bench["figures"]:
        assert f["runs"] >= 10 and 0 < f["us"] <= f["us_p90"]
        factor = {"all_reduce": 4 / 3, "all_gather": 2 / 3, "send_recv": 1}[f["operation"]]
        assert f["bus_bytes_per_s"] == pytest.approx(f["algorithm_bytes_per_s"] * factor)


def test_a_communicator_of_one():
    outcome = drover.drover(1, "bench", "comm", check=False)
    assert outcome.code == 2 and "nothing to measure" in outcome.err


def test_linears(tmp_path):
    file = tmp_path / "linear.json"
    out = drover.drover(1, "bench", "linear", "--model", "synthetic:tiny", "--backend", "cpu", "--rows",
                        "1,5", "--threads", 1, "--json", file).out
    figures = json.loads(file.read_text())["figures"]
    assert [f["name"].split()[0] for f in figures] == ["qkv", "o", "gate_up", "down"] * 2
    for f in figures:
        assert 0 < f["us_min"] <= f["us"] <= f["us_max"] and f["flops"] > 0
        assert "library" not in f  # a CPU has no other to be held against
    assert "library" not in out


@pytest.mark.parametrize("grid", [("--tp", 2), ("--pp", 2)])
def test_budget_of_a_step(tmp_path, grid):
    file = tmp_path / "bench.json"
    out = drover.drover(2, *STEP, *grid, "--batches", 4, "--budget", "--json", file).out
    bench = json.loads(file.read_text())
    assert bench["figures"] and len(bench["budget"]["ranks"]) == 2
    rows = 4 // stages(bench)
    layers = 4 // stages(bench)  # of synthetic:tiny
    assert f"decode step of {rows} rows" in out and "gate_up" in out
    for rank, budgets in enumerate(bench["budget"]["ranks"]):
        decode = [b for b in budgets if (b["kind"], b["rows"]) == ("decode step", rows)]
        assert len(decode) == 1 and decode[0]["steps"] >= NEW_TOKENS
        operations = {o["operation"]: o for o in decode[0]["operations"]}
        assert sum(o["us"] for o in operations.values()) == pytest.approx(decode[0]["us"])
        assert sum(o["share"] for o in operations.values()) == pytest.approx(1)
        for name in ("qkv", "rope + append", "attention", "o", "gate_up", "down"):
            assert operations[name]["calls"] == pytest.approx(layers) and operations[name]["us"] > 0
        last_stage = stages(bench) == 1 or rank == 1
        assert ("output" in operations) == last_stage
        assert operations["communication"]["us"] > 0

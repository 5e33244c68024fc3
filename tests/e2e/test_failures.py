"""A rank that throws, hangs, stops or dies: all ranks end, within 10 s, with one first cause."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

import drover
from failing import INTERNAL, LONG, LOST_PEER, TINY, Job, fails, journal, same_cause

LIMIT = 10  # seconds from the failure to the end of the last rank


def under_way(out, samples=3):
    """At least so many samples are in the journal."""
    file = out / "performance/journal.jsonl"
    return lambda: file.exists() and len(file.read_text().splitlines()) >= samples


def check_invalid(out, cause):
    result = json.loads((out / "result.json").read_text())
    assert result["valid"] is False
    assert cause in result["error"]
    assert any(cause in reason for reason in result["reasons"])
    assert "not a result" in result["verdict"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_throws_while_others_wait_in_a_collective(tmp_path, rank):
    out = tmp_path / "out"
    fails(tmp_path, 3, INTERNAL, "run", *LONG, "--tp", 3, "--out", out, fault=f"throw:{rank}:6")
    cause = same_cause(out, range(3))
    assert cause == f"rank {rank} (step): DROVER_FAULT: thrown in phase step at step 6"
    check_invalid(out, cause)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_hangs(tmp_path, rank):
    out = tmp_path / "out"
    with Job(tmp_path, 2, "run", *TINY, "--pp", 2, "--out", out, fault=f"hang:{rank}:20") as job:
        job.wait_for(lambda: (out / "performance/journal.jsonl").exists())
        begin = time.time()
        assert job.end() == LOST_PEER, job.text()
        assert job.codes() == [LOST_PEER] * 2
        # The hang is at most a second older than the journal.
        assert max(job.ends()) - begin < LIMIT, job.text()
    cause = same_cause(out, range(2))
    assert re.fullmatch(rf"rank {rank} on \S+ hangs: no progress for 7 s \(phase: step\)", cause)
    check_invalid(out, cause)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_is_stopped(tmp_path, rank):
    out = tmp_path / "out"
    with Job(tmp_path, 2, "run", *LONG, "--pp", 2, "--out", out, grace=3) as job:
        job.wait_for(under_way(out))
        os.kill(job.pid(rank), signal.SIGSTOP)
        begin = time.time()
        job.end()
        # mpirun wakes the stopped one before it ends it.
        other = 1 - rank
        assert job.ends()[other] - begin < LIMIT, job.text()
        assert max(job.ends()) - begin < LIMIT + 2, job.text()
        assert job.codes() == [LOST_PEER] * 2, job.text()
    assert re.match(rf"rank {rank} on \S+ has not been heard of for 7 s", same_cause(out, range(2)))
    assert len(journal(out)) >= 3


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_is_killed(tmp_path, rank):
    out = tmp_path / "out"
    ranks = 3
    with Job(tmp_path, ranks, "run", *LONG, "--pp", ranks, "--out", out, grace=3) as job:
        job.wait_for(under_way(out))
        begin = time.time()
        os.kill(job.pid(rank), signal.SIGKILL)
        assert job.end() != 0
        assert max(job.ends()) - begin < LIMIT and time.time() - begin < LIMIT, job.text()
        survivors = [r for r in range(ranks) if r != rank]
        assert [job.codes()[r] for r in survivors] == [LOST_PEER] * (ranks - 1), job.text()
    cause = same_cause(out, survivors)
    assert re.match(rf"rank {rank} on \S+ died", cause)
    done = journal(out)
    assert len(done) >= 3
    assert all(sample["n_tokens"] == len(sample["tokens"]) for sample in done)
    if rank != 0:
        check_invalid(out, cause)
        result = json.loads((out / "result.json").read_text())
        assert result["samples"] == len(done)
        detail = (out / "performance/run_1/mlperf_log_detail.txt").read_text()
        assert cause in detail


def test_run_sh_tells_a_lost_peer(tmp_path):
    out = tmp_path / "out"
    command = [drover.ROOT / "launch/run.sh", "-np", 2, "--program", drover.BINARY, "--", "run",
               *TINY, "--pp", 2, "--out", out]
    p = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False,
                       timeout=60, stdin=subprocess.DEVNULL,
                       env={**os.environ, "DROVER_FAULT": "kill:1:20"})
    assert p.returncode == LOST_PEER, p.stderr
    assert "rank 1 on" in p.stderr and "died" in p.stderr


def test_mpirun_is_terminated(tmp_path):
    out = tmp_path / "out"
    with Job(tmp_path, 2, "run", *LONG, "--pp", 2, "--out", out, grace=3) as job:
        job.wait_for(under_way(out))
        begin = time.time()
        job.process.send_signal(signal.SIGTERM)
        assert job.end() != 0
        assert max(job.ends()) - begin < LIMIT
        assert all(job.codes()), job.text()
    cause = same_cause(out, range(2))
    assert cause.startswith("terminated (SIGTERM)"), cause
    check_invalid(out, "terminated (SIGTERM)")
    assert len(journal(out)) >= 3


def test_a_server_run_ends_though_loadgen_sleeps(tmp_path):
    """Between arrivals LoadGen sleeps, and nothing wakes it: rank 0 writes its results all the same."""
    out = tmp_path / "out"
    with Job(tmp_path, 2, "run", *TINY, "--pp", 2, "--scenario", "server", "--target-qps", 0.02,
             "--out", out, fault="throw:1:4") as job:
        begin = time.time()
        assert job.end() == INTERNAL, job.text()
        assert job.codes() == [INTERNAL] * 2
        assert max(job.ends()) - begin < LIMIT + 5, job.text()
    cause = same_cause(out, range(2))
    assert "DROVER_FAULT" in cause

"""launch/run.sh over hosts with a hostfile: a run, a warning, a lost rank, daemon, cable."""

import json
import os
import signal
import subprocess
import time

import pytest

import drover
from failing import INVALID, LOST_PEER, journal
from netns import Hosts

ACCURACY = ("--model", "synthetic:tiny", "--demo", "--threads", 1,
            "--warmup", 1, "--max-sequences", 4, "--mode", "accuracy", "--progress", "no")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("hosts"), 3)
    try:
        yield made.start()
    finally:
        made.stop()


class Running:
    # Many samples where the run must not end before it is ended.
    def __init__(self, hosts, out, *more, samples=400, ranks=2):
        command = [drover.ROOT / "launch/run.sh", "-np", ranks, "--hostfile", hosts.hostfile, "--program",
                   drover.BINARY, "--", "run", *ACCURACY, "--pp", ranks, "--dataset",
                   f"synthetic:32x64:{samples}", *more, "--out", out]
        self.out = out
        self.process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True,
                                        stdin=subprocess.DEVNULL, env={**os.environ, **hosts.environment})

    def under_way(self, samples=20):
        file = self.out / "accuracy/journal.jsonl"
        deadline = time.monotonic() + 60
        while not file.exists() or len(file.read_bytes().splitlines()) < samples:
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self):
        try:
            _, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, err


def test_a_run_is_warned_and_goes_on(tmp_path, hosts):
    first = Running(hosts, tmp_path / "first")
    first.under_way()
    assert hosts.pids(0, "drover") and hosts.pids(1, "drover")
    first.process.send_signal(signal.SIGUSR1)
    code, err = first.end()
    assert code == INVALID, err
    done = len(journal(tmp_path / "first", "accuracy"))
    code, err = Running(hosts, tmp_path / "second", "--resume", tmp_path / "first").end()
    assert code == 0, err
    result = json.loads((tmp_path / "second/result.json").read_text())
    assert result["valid"] is True and result["resumed"]["samples_taken_over"] == done
    for rank, name in enumerate(hosts.names[:2]):
        assert f"{name} rank {rank} " in (tmp_path / f"second/logs/rank-{rank:04d}.log").read_text()


def test_terminated_with_time_to_write(tmp_path, hosts):
    run = Running(hosts, tmp_path / "out", samples=20000)
    run.under_way()
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code != 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "SIGTERM" in result["error"] and "--resume" in result["go_on"]


def lose(hosts, out, how):
    """A run on three hosts loses the second in some way. Exit code, what it said, seconds until the
    result was there, seconds until it ended."""
    run = Running(hosts, out, samples=20000, ranks=3)
    run.under_way()
    begin = time.time()
    how()
    code, err = run.end()
    took = time.time() - begin
    file = out / "result.json"
    assert file.exists(), err
    return code, err, file.stat().st_mtime - begin, took


def check_lost(out, code, err, wrote, survivors, cause):
    assert code == LOST_PEER, err
    assert wrote < 10
    result = json.loads((out / "result.json").read_text())
    assert result["valid"] is False and cause in result["error"] and "--resume" in result["go_on"]
    assert len(journal(out, "accuracy")) >= 20
    assert f"drover: {cause}" in err
    for rank in survivors:
        log = (out / f"logs/rank-{rank:04d}.log").read_text()
        assert cause in log and "(exit code 6)" in log


def test_a_rank_on_another_host_dies(tmp_path, hosts):
    """Over TCP a lost connection must stop nobody from writing down what is finished, and why it ended."""
    out = tmp_path / "out"
    code, err, wrote, took = lose(hosts, out, lambda: os.kill(hosts.pids(1, "drover")[0], signal.SIGKILL))
    # Named by its silence, unless mpirun ends the job before that is long enough to tell (1.5 s).
    named = f"rank 1 on {hosts.names[1]} died or hangs"
    ended = "terminated (SIGTERM): a rank was lost"
    told = json.loads((out / "result.json").read_text())["error"]
    check_lost(out, code, err, wrote, (0, 2), ended if ended in told else named)
    assert took < 20
    # mpirun's own words: which rank, which host.
    assert "process rank 1" in err and f"on node {hosts.addresses[1]}" in err


def test_a_cable_is_pulled(tmp_path, hosts):
    """Nobody closes a connection: only silence tells. mpirun too has to notice that a host is gone."""
    out = tmp_path / "out"
    try:
        code, err, wrote, took = lose(hosts, out, lambda: hosts.link(1, "down"))
    finally:
        hosts.link(1, "up")
    check_lost(out, code, err, wrote, (0, 2), f"rank 1 on {hosts.names[1]} has not been heard of")
    assert took < 30
    assert f"rank 0 on {hosts.names[0]} has not been heard of" in (out / "logs/rank-0001.log").read_text()


def test_a_daemon_of_mpirun_dies(tmp_path, hosts):
    """mpirun gives the job up, and its ranks time to write."""
    out = tmp_path / "out"
    code, err, wrote, took = lose(hosts, out, lambda: os.kill(hosts.pids(1, "orted")[0], signal.SIGKILL))
    assert code == LOST_PEER, err
    assert wrote < 10 and took < 20
    result = json.loads((out / "result.json").read_text())
    assert result["valid"] is False and "--resume" in result["go_on"]
    assert "lost communication with a remote daemon" in err and hosts.addresses[1] in err

"""launch/run.sh over two hosts with a hostfile: a run, a warning, a lost rank."""

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
            "--warmup", 1, "--max-sequences", 4, "--mode", "accuracy", "--pp", 2, "--progress", "no")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("hosts"), 2)
    try:
        yield made.start()
    finally:
        made.stop()


class Running:
    # Many samples where the run must not end before it is ended.
    def __init__(self, hosts, out, *more, samples=400):
        command = [drover.ROOT / "launch/run.sh", "-np", 2, "--hostfile", hosts.hostfile, "--program",
                   drover.BINARY, "--", "run", *ACCURACY, "--dataset", f"synthetic:32x64:{samples}", *more,
                   "--out", out]
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
    for rank, name in enumerate(hosts.names):
        assert f"{name} rank {rank} " in (tmp_path / f"second/logs/rank-{rank:04d}.log").read_text()


def test_terminated_with_time_to_write(tmp_path, hosts):
    run = Running(hosts, tmp_path / "out", samples=20000)
    run.under_way()
    run.process.send_signal(signal.SIGTERM)
    code, err = run.end()
    assert code != 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "SIGTERM" in result["error"] and "--resume" in result["go_on"]


def test_a_rank_on_another_host_dies(tmp_path, hosts):
    """Over TCP Open MPI itself ends whoever talks to the lost rank, perhaps before a result is written:
    what is finished is in the journal all the same."""
    run = Running(hosts, tmp_path / "out", samples=20000)
    run.under_way()
    begin = time.monotonic()
    os.kill(hosts.pids(1, "drover")[0], signal.SIGKILL)
    code, err = run.end()
    assert code == LOST_PEER, err
    assert time.monotonic() - begin < 20
    assert "process rank 1" in err and f"on node {hosts.addresses[1]}" in err
    assert len(journal(tmp_path / "out", "accuracy")) >= 20

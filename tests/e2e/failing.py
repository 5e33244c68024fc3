"""Runs that are meant to fail: each rank's exit code and end, what it logged, what is left behind."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import drover

HERE = pathlib.Path(__file__).resolve().parent
GOOD, INTERNAL, USAGE, BAD_INPUT, ENVIRONMENT, INVALID, LOST_PEER = range(7)
TINY = ("--model", "synthetic:tiny", "--dataset", "synthetic:32x64:64", "--demo", "--threads", 1,
        "--warmup", 1)
# About 20 s of work: enough to be hurt in the middle.
LONG = ("--model", drover.MODEL, "--dataset", drover.DATASET, "--demo", "--threads", 1,
        "--warmup", 1, "--max-new-tokens", 24, "--max-sequences", 4)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = pathlib.Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError):
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Job:
    """`drover ARGUMENTS` on some ranks, whose processes can be hurt while it runs."""

    def __init__(self, folder, ranks, *arguments, fault=None, program=None, env=None, grace=2):
        # Of one second mpirun makes none when a signal interrupts its sleep.
        self.folder, self.ranks = pathlib.Path(folder), ranks
        self.records = self.folder / "records"
        self.records.mkdir(parents=True)
        command = [drover.MPIRUN, ranks, HERE / "record_exit.sh", self.records,
                   *(program or [drover.BINARY]), *arguments]
        environment = {**os.environ, "OMPI_MCA_odls_base_sigkill_timeout": str(grace), **(env or {})}
        if fault:
            environment["DROVER_FAULT"] = fault
        self.output = open(self.folder / "output", "w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL,
                                        stdout=self.output, stderr=subprocess.STDOUT,
                                        env=environment, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in range(self.ranks):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.kill(self.pid(rank), signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()

    def pid(self, rank):
        return int((self.records / f"pid.{rank}").read_text())

    def wait_for(self, what, seconds=60):
        """Until what() is true; a job that ends before fails the test."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"the job ended too early\n{self.text()}"
            assert time.monotonic() < deadline, f"nothing happened\n{self.text()}"
            time.sleep(0.02)

    def text(self):
        return (self.folder / "output").read_text(errors="replace")

    def end(self, seconds=60):
        """mpirun's exit code; nothing may be left of the job."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs after {seconds} s\n{self.text()}") from None
        # mpirun does not wait for those whom it has ended.
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not all(
                self.records.joinpath(f"exit.{r}").exists() for r in range(self.ranks)):
            time.sleep(0.02)
        for rank in range(self.ranks):
            assert not alive(self.pid(rank)), f"rank {rank} is left behind\n{self.text()}"
        return code

    def codes(self):
        """Exit code of every rank."""
        return [int((self.records / f"exit.{r}").read_text().split()[0]) for r in range(self.ranks)]

    def ends(self):
        """When each rank ended, by the clock of time.time()."""
        return [float((self.records / f"exit.{r}").read_text().split()[1]) for r in range(self.ranks)]


def causes(out, ranks):
    """The error that each rank's log names, without time and rank."""
    found = {}
    for rank in ranks:
        log = (pathlib.Path(out) / f"logs/rank-{rank:04d}.log").read_text()
        lines = re.findall(r"^\S+ \S+ \S+ (?:rank \d+ )?error: (.*)$", log, re.MULTILINE)
        assert lines, f"rank {rank} logged no error:\n{log}"
        found[rank] = lines[0].partition(" (exit code ")[0]
    return found


def same_cause(out, ranks):
    all_causes = causes(out, ranks)
    assert len(set(all_causes.values())) == 1, all_causes
    return next(iter(all_causes.values()))


def fails(folder, ranks, code, *arguments, seconds=30, **more):
    """Runs it; every rank must end with `code`, in time, and the output is returned."""
    with Job(folder, ranks, *arguments, **more) as job:
        begin = time.time()
        assert job.end(seconds + 30) == code, job.text()
        assert job.codes() == [code] * ranks, job.text()
        assert max(job.ends()) - begin < seconds, job.text()
        return job.text()


def refused(code, *arguments, says, seconds=20):
    """One rank without mpirun: the exit code, the message, and how long it took."""
    outcome = drover.single(*arguments, check=False)
    assert outcome.code == code, f"exit code {outcome.code}\n{outcome.out}{outcome.err}"
    for part in [says] if isinstance(says, str) else says:
        assert part in outcome.err, f"'{part}' is not in:\n{outcome.err}"
    assert outcome.seconds < seconds
    return outcome.err


def journal(out, mode="performance"):
    """Finished samples; every line must be whole."""
    text = (pathlib.Path(out) / mode / "journal.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]

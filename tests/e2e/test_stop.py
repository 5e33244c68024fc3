"""SIGUSR1 (a batch system's warning) ends a run at a safe point, and --resume goes on from there; so
it does after a kill and a full disk. Nothing finished is lost."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

import drover
import results
from failing import (BAD_INPUT, ENVIRONMENT, INVALID, LONG, TINY, USAGE, Job, fails, journal, refused)

SAMPLES = 400  # about 5 s of work
ACCURACY = ("--model", "synthetic:tiny", "--dataset", f"synthetic:32x64:{SAMPLES}", "--demo",
            "--threads", 1, "--warmup", 1, "--max-sequences", 4, "--mode", "accuracy", "--pp", 2,
            "--progress", "no")


def under_way(out, samples=20, mode="accuracy"):
    file = out / mode / "journal.jsonl"
    return lambda: file.exists() and len(file.read_bytes().splitlines()) >= samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nobody disturbs answers."""
    return results.run(tmp_path_factory.mktemp("whole") / "out", 2, *ACCURACY)


def goes_on(tmp_path, earlier, whole, taken_over):
    """Resumes; the accuracy log must be that of a run in one go."""
    again = results.run(tmp_path / "again", 2, *ACCURACY, "--resume", earlier)
    assert again.result["valid"] is True and "earlier run" in again.result["verdict"]
    resumed = again.result["resumed"]
    assert resumed["from"] == str(earlier)
    assert resumed["samples_taken_over"] == taken_over
    assert resumed["samples_run"] == SAMPLES - taken_over
    assert again.accuracy() == whole.accuracy()
    assert f"resumed: {taken_over} of {SAMPLES} samples are taken over" in again.outcome.err
    lines = journal(again.folder, "accuracy")
    assert sorted(line["sample"] for line in lines) == list(range(SAMPLES))
    assert sum(line.get("resumed", False) for line in lines) == taken_over
    return again


def check_stopped(out, job):
    assert job.codes() == [INVALID] * 2, job.text()
    result = json.loads((out / "result.json").read_text())
    assert result["valid"] is False and "asked to stop (SIGUSR1" in result["error"]
    done = journal(out, "accuracy")
    assert 20 <= len(done) < SAMPLES and result["samples"] == len(done)
    # At a safe point: what ran has ended, and each answer is whole.
    assert all(line["n_tokens"] == 64 for line in done)
    assert f"--resume {out}" in result["go_on"] and result["go_on"] in job.text()
    return len(done)


def test_one_thread_of_each_rank_takes_signals(tmp_path):
    """Those that multiply must not: oneDNN's AVX2 code points the stack at the heap meanwhile."""
    handled = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}

    def takes(status):
        blocked = int(re.search(r"^SigBlk:\s+(\w+)", status, re.MULTILINE)[1], 16)
        free = {s for s in handled if not blocked >> (s - 1) & 1}
        assert free in (set(), handled), free
        return bool(free)

    out = tmp_path / "out"
    options = list(ACCURACY)
    options[options.index("--threads") + 1] = 2
    with Job(tmp_path / "job", 2, "run", *options, "--out", out) as job:
        job.wait_for(under_way(out))
        for rank in (0, 1):
            tasks = list(pathlib.Path(f"/proc/{job.pid(rank)}/task").iterdir())
            assert len(tasks) > 2
            assert [takes((t / "status").read_text()) for t in tasks].count(True) == 1
            assert not takes(pathlib.Path(f"/proc/{job.pid(rank)}/status").read_text()), "the main thread"


@pytest.mark.parametrize("to", ["mpirun", "rank 1"])
def test_a_warning_ends_at_a_safe_point(tmp_path, whole, to):
    out = tmp_path / "out"
    with Job(tmp_path / "job", 2, "run", *ACCURACY, "--out", out) as job:
        job.wait_for(under_way(out))
        begin = time.time()
        pid = job.process.pid if to == "mpirun" else job.pid(int(to[-1]))
        os.kill(pid, signal.SIGUSR1)
        assert job.end() == INVALID, job.text()
        assert max(job.ends()) - begin < 5, job.text()
    done = check_stopped(out, job)
    if to == "rank 1":
        goes_on(tmp_path, out, whole, done)


def test_run_sh_passes_the_warning_on(tmp_path):
    out = tmp_path / "out"
    command = [drover.ROOT / "launch/run.sh", "-np", 2, "--program", drover.BINARY, "--", "run",
               *ACCURACY, "--out", out]
    with subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True,
                          stdin=subprocess.DEVNULL) as p:
        deadline = time.monotonic() + 60
        while not under_way(out)():
            assert p.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        p.send_signal(signal.SIGUSR1)
        _, err = p.communicate(timeout=60)
    assert p.returncode == INVALID, err
    assert "go on with the same options and --mode accuracy --resume" in err


def test_a_second_warning_ends_at_once(tmp_path, whole):
    out = tmp_path / "out"
    # Sequences of the demo's model have seconds to go.
    slow = [*LONG, "--mode", "accuracy", "--pp", 2, "--out", out]
    slow[slow.index("--max-new-tokens") + 1] = 400
    with Job(tmp_path / "job", 2, "run", *slow) as job:
        job.wait_for(lambda: "asked" in job.text() or (out / "accuracy/journal.jsonl").exists())
        job.process.send_signal(signal.SIGUSR1)
        job.wait_for(lambda: "ending at a safe point" in job.text())
        time.sleep(2.5)
        begin = time.time()
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == INVALID, job.text()
        assert max(job.ends()) - begin < 3, job.text()
        assert job.codes() == [INVALID] * 2
    assert "a second time: ended at once" in job.text()
    assert json.loads((out / "result.json").read_text())["valid"] is False


def test_a_performance_pass_is_not_kept(tmp_path):
    out = tmp_path / "out"
    options = list(ACCURACY)
    options[options.index("accuracy")] = "performance,accuracy"
    with Job(tmp_path / "job", 2, "run", *options, "--out", out) as job:
        job.wait_for(under_way(out, mode="performance"))
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == INVALID, job.text()
    result = json.loads((out / "result.json").read_text())
    assert "never resumed" in result["go_on"]
    assert "accuracy: not begun" in result["reasons"] and not (out / "accuracy").exists()


def test_a_warning_ends_a_server_run_though_loadgen_sleeps(tmp_path):
    out = tmp_path / "out"
    with Job(tmp_path / "job", 2, "run", *TINY, "--pp", 2, "--scenario", "server", "--target-qps",
             0.02, "--out", out) as job:
        job.wait_for(under_way(out, 1, "performance"))
        begin = time.time()
        os.kill(job.pid(1), signal.SIGUSR1)
        assert job.end() == INVALID, job.text()
        assert job.codes() == [INVALID] * 2, job.text()
        assert max(job.ends()) - begin < 8, job.text()
    assert "asked to stop" in json.loads((out / "result.json").read_text())["error"]


def test_a_warning_where_there_is_nothing_to_keep(tmp_path):
    with Job(tmp_path / "job", 2, "bench", "step", "--model", "synthetic:tiny", "--pp", 2, "--threads",
             1, "--batches", "64", "--new-tokens", 4000, "--prompt-tokens", 8) as job:
        job.wait_for(lambda: (job.records / "pid.1").exists())
        time.sleep(1.5)
        os.kill(job.pid(1), signal.SIGUSR1)
        assert job.end() == INVALID, job.text()
    assert "before anything ran" in job.text() or "nothing is lost" in job.text()


def test_killed_in_the_middle(tmp_path, whole):
    out = tmp_path / "out"
    with Job(tmp_path / "job", 2, "run", *ACCURACY, "--out", out) as job:
        job.wait_for(under_way(out, 100))
        for rank in (0, 1):
            os.kill(job.pid(rank), signal.SIGKILL)
        job.end()
    assert not (out / "result.json").exists()
    done = journal(out, "accuracy")
    # As after a machine's end: the last line is torn.
    file = out / "accuracy/journal.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    again = goes_on(tmp_path, out, whole, len(done) - 1)
    assert again.result["resumed"]["damaged_lines"] == 1


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=112k", "tmpfs", disk], check=False,
                          capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no small disk here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_loses_nothing_finished(tmp_path, small_disk, whole):
    out = small_disk / "out"
    text = fails(tmp_path / "job", 2, ENVIRONMENT, "run", *ACCURACY, "--out", out, seconds=40)
    assert "journal.jsonl: writing a finished sample failed: No space left on device" in text
    done = journal(out, "accuracy")
    assert len(done) >= 20
    goes_on(tmp_path, out, whole, len(done))


def test_what_cannot_be_resumed(tmp_path, whole):
    out = ("--out", tmp_path / "again")
    earlier = whole.folder
    options = list(ACCURACY)
    options[options.index("--pp") + 1] = 1
    refused(USAGE, "run", *options, "--resume", earlier, *out, says="pp is 1 here and 2 there")
    options[options.index("accuracy")] = "performance"
    refused(USAGE, "run", *options, "--resume", earlier, *out, says="performance runs are never")
    options[options.index("performance")] = "accuracy"
    refused(BAD_INPUT, "run", *options, "--resume", tmp_path, *out, says="nothing to resume")
    options[options.index(f"synthetic:32x64:{SAMPLES}")] = f"synthetic:32x63:{SAMPLES}"
    refused(BAD_INPUT, "run", *options, "--resume", earlier, *out, says="dataset is ")
    refused(USAGE, "run", *options, "--resume", earlier, "--out", pathlib.Path(earlier), "--force",
            says="choose another --out")
    assert (earlier / "result.json").exists()

"""The batch scripts under a real Slurm: submitted, warned, requeued, resumed, cancelled, timed out."""

import json
import os
import re
import shutil
import subprocess

import pytest

import drover
from failing import INVALID, USAGE, BAD_INPUT, ENVIRONMENT, journal

SLURM = drover.ROOT / "slurm"
CPUS = drover.ROOT / "topology/cpu.ini"
SAMPLES = 400
RUN = {"model": "synthetic:tiny", "dataset": f"synthetic:32x64:{SAMPLES}", "demo": "yes", "threads": 1,
       "warmup": 1, "max-sequences": 4, "progress": "no", "tp": 1, "pp": 2, "dp": 1}


def run_file(folder, **more):
    file = folder / "run.conf"
    values = {**RUN, **{key.replace("_", "-"): value for key, value in more.items()}}
    file.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return file


class Submitted:
    def __init__(self, slurm, folder, script, *arguments, **conf):
        self.slurm, self.folder = slurm, folder
        self.output = folder / "job-%j.out"
        command = [SLURM / script, f"--output={self.output}", *arguments]
        topology = conf.pop("topology", CPUS)
        tail = conf.pop("tail", ())
        p = slurm.run(*command, topology, run_file(folder, **conf), *tail, "--out", folder / "out",
                      env={"DROVER_BIN": drover.BINARY}, check=False)
        assert p.returncode == 0, p.stdout + p.stderr
        self.asked = p.stderr
        self.numbers = re.findall(r"Submitted batch job (\d+)", p.stdout)
        assert self.numbers, p.stdout + p.stderr

    @property
    def number(self):
        return self.numbers[0]

    def text(self, number=None):
        file = self.folder / f"job-{number or self.number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def end(self, number=None):
        number = number or self.number
        return self.slurm.wait_for_end(number, self.folder / f"job-{number}.out")

    def under_way(self, attempt=0, samples=20):
        file = self.folder / f"out/attempt-{attempt}/accuracy/journal.jsonl"
        self.slurm.wait_for(lambda: file.exists() and len(file.read_bytes().splitlines()) >= samples,
                            lambda: f"nothing happens\n{self.text()}\n{self.slurm.logs()}")

    def result(self, name="attempt-0"):
        return json.loads((self.folder / "out" / name / "result.json").read_text())


@pytest.fixture(scope="module")
def long_job(slurm, tmp_path_factory):
    """Longer than its time, which Slurm looks at twice a minute: so one other test runs beside it."""
    folder = tmp_path_factory.mktemp("long")
    job = Submitted(slurm, folder, "run.sbatch", "--time=1", "--signal=B:USR1@50", mode="accuracy",
                    dataset="synthetic:32x64:20000")
    yield job
    slurm.run("scancel", job.number, check=False)


def test_a_run_with_gpus(slurm, long_job, tmp_path):
    """Slurm counts out GPUs; the grid is the topology's. There are none: drover takes the CPU."""
    job = Submitted(slurm, tmp_path, "run.sbatch", mode="performance",
                    dataset="synthetic:32x64:60", topology=drover.ROOT / "topology/h200x2.ini", tp=2,
                    pp=1, dp=1, backend="cpu")
    assert "--ntasks-per-node=2" in job.asked and "--gpus-per-node=2" in job.asked
    assert job.end() == ("COMPLETED", 0), job.text()
    assert "gpu:2" in str(slurm.job(job.number))
    for flag in ("srun --mpi=pmix", "--kill-on-bad-exit=1", "--gpu-bind=none"):
        assert flag in job.text(), job.text()
    assert job.result()["valid"] is True and job.result()["grid"] == "tp 2 x pp 1 x dp 1"


def test_timed_out(slurm, long_job):
    """--signal before the time limit: requeued, and the next attempt goes on."""
    long_job.under_way(attempt=1)
    slurm.run("scancel", long_job.number)
    assert long_job.end()[0] == "CANCELLED", long_job.text()
    assert "asked to stop (SIGUSR1" in long_job.result()["error"]
    assert "samples are taken over from" in long_job.text()
    first, second = (journal(long_job.folder / f"out/attempt-{i}", "accuracy") for i in (0, 1))
    assert [line["sample"] for line in second[:len(first)]] == sorted(l["sample"] for l in first)
    assert not any(line.get("resumed") for line in first)


def test_warned_requeued_resumed(slurm, tmp_path):
    job = Submitted(slurm, tmp_path, "run.sbatch", mode="accuracy")
    job.under_way()
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == ("COMPLETED", 0), job.text()
    first, second = job.result("attempt-0"), job.result("attempt-1")
    assert first["valid"] is False and "asked to stop (SIGUSR1" in first["error"]
    assert second["valid"] is True and "earlier run" in second["verdict"]
    known = len(journal(tmp_path / "out/attempt-0", "accuracy"))
    assert second["resumed"]["samples_taken_over"] == known >= 20
    assert second["resumed"]["samples_run"] == SAMPLES - known
    log = json.loads((tmp_path / "out/attempt-1/accuracy/mlperf_log_accuracy.json").read_text())
    assert sorted(e["qsl_idx"] for e in log) == list(range(SAMPLES))
    assert all(e["token_count"] == 64 for e in log)
    assert f"{known} samples are finished; back into the queue, the next attempt" in job.text()


def test_a_performance_run_is_not_requeued(slurm, tmp_path):
    job = Submitted(slurm, tmp_path, "run.sbatch", mode="performance", dataset="synthetic:32x64:20000")
    file = tmp_path / "out/attempt-0/performance/journal.jsonl"
    slurm.wait_for(lambda: file.exists() and file.stat().st_size > 0, job.text)
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == ("FAILED", INVALID), job.text()
    assert "never resumed" in job.result()["go_on"] and not (tmp_path / "out/attempt-1").exists()


def test_cancelled(slurm, tmp_path):
    job = Submitted(slurm, tmp_path, "run.sbatch", mode="accuracy", dataset="synthetic:32x64:20000")
    job.under_way()
    slurm.run("scancel", job.number)
    assert job.end()[0] == "CANCELLED", job.text()
    result = tmp_path / "out/attempt-0/result.json"
    slurm.wait_for(result.exists, lambda: f"no result\n{job.text()}")
    assert "SIGTERM" in job.result()["error"] and "--resume" in job.result()["go_on"]
    assert len(journal(tmp_path / "out/attempt-0", "accuracy")) >= 20


def test_a_lost_rank_ends_the_job(slurm, tmp_path):
    # sbatch hands the environment on.
    slurm.environment["DROVER_FAULT"] = "kill:1:40"
    try:
        job = Submitted(slurm, tmp_path, "run.sbatch", mode="accuracy")
    finally:
        del slurm.environment["DROVER_FAULT"]
    assert job.end() == ("FAILED", 6), job.text()
    assert not (tmp_path / "out/attempt-1").exists()


def test_sweep(slurm, tmp_path):
    job = Submitted(slurm, tmp_path, "sweep.sbatch", "--grids=1x2x1,2x1x1", "--batches=4,8",
                    f"--output={tmp_path}/job-%A_%a.out", mode="performance",
                    dataset="synthetic:32x64:40")
    table = tmp_path / "out/table.txt"
    slurm.wait_for(lambda: table.exists() and len(table.read_text().splitlines()) == 4,
                   lambda: "\n".join(f.read_text() for f in tmp_path.glob("job-*.out")))
    names = {line.split("\t")[0] for line in table.read_text().splitlines()}
    assert names == {f"{grid}_b{batch}" for grid in ("1x2x1", "2x1x1") for batch in (4, 8)}
    assert table.read_text().count("valid=true") == 4
    for name in names:
        result = job.result(f"{name}/attempt-0")
        assert result["settings"]["max-sequences"] == name.split("_b")[1]
        assert result["grid"] == "tp {} x pp {} x dp {}".format(*name.split("_")[0].split("x"))


def test_scaling(slurm, tmp_path):
    job = Submitted(slurm, tmp_path, "scaling.sbatch", "--ranks=1,2", "--kind=strong,weak",
                    mode="performance", dataset="synthetic:32x64:40", pp=1)
    assert len(job.numbers) == 2
    for number in job.numbers:
        assert job.end(number) == ("COMPLETED", 0), job.text(number)
    for kind, ranks, samples in (("strong", 1, 40), ("strong", 2, 40), ("weak", 1, 40), ("weak", 2, 80)):
        result = job.result(f"{kind}-{ranks}-1/attempt-0")
        assert result["grid"] == f"tp 1 x pp 1 x dp {ranks}" and result["samples"] == samples
    assert (tmp_path / "out/table.txt").read_text().count("valid=true") == 4


def test_a_study_is_submitted(slurm, tmp_path):
    """launch/study.py --submit: a job for each run, none twice, gathered by the same command."""
    out = tmp_path / "study"

    def study(code=0):
        p = slurm.run(drover.PYTHON, drover.ROOT / "launch/study.py", "scaling", "--model", "synthetic:tiny",
                      "--dataset", "synthetic:24x16:32", "--max-new-tokens", 16, "--out", out, "--ranks", "1,2",
                      "--grids", "tp1,dp2", "--repeat", 1, "--submit", "--sbatch=--time=5", "--sbatch=--hold",
                      env={"DROVER_BIN": drover.BINARY}, check=False, timeout=120)
        assert p.returncode == code, p.stdout + p.stderr
        return p.stderr

    def numbers():
        return json.loads((out / "study.json").read_text())["submitted"]

    pytest.importorskip("matplotlib", reason="launch/setup.sh installs it")
    assert "2 jobs submitted, 0 were in the queue" in study()
    first = numbers()
    assert "0 jobs submitted, 2 were in the queue" in study() and numbers() == first
    two = next(name for name in first if "dp2" in name)
    assert "NumTasks=2 " in slurm.run("scontrol", "show", "job", "-o", first[two]).stdout
    slurm.run("scancel", first[two])
    slurm.wait_for_end(first[two])
    slurm.wait_for(lambda: "1 jobs submitted, 1 were in the queue" in study(), "not submitted again")
    for number in numbers().values():
        slurm.run("scontrol", "release", number)
        assert slurm.wait_for_end(number, output=out / f"scripts/{number}.log") == ("COMPLETED", 0)
    assert "2 of 2 runs are there already" in study()
    for name in first:
        result = json.loads((out / "runs" / name / "result.json").read_text())
        assert result["valid"] is True and "srun --mpi=pmix" in (out / "runs" / name / "run.log").read_text()
    assert (out / "report.html").exists()


def test_a_job_of_a_study_is_stopped(slurm, tmp_path):
    """As before its time limit: srun would kill the ranks, run.sh has them write down why they end."""
    out = tmp_path / "study"
    pytest.importorskip("matplotlib", reason="launch/setup.sh installs it")
    slurm.run(drover.PYTHON, drover.ROOT / "launch/study.py", "scaling", "--model", "synthetic:tiny", "--dataset",
              "synthetic:24x64:20000", "--max-new-tokens", 64, "--out", out, "--ranks", 2, "--grids", "dp2",
              "--repeat", 1, "--submit", env={"DROVER_BIN": drover.BINARY})
    number = next(iter(json.loads((out / "study.json").read_text())["submitted"].values()))
    slurm.wait_for(lambda: list(out.glob("runs/*.part/performance/journal.jsonl")), slurm.logs)
    slurm.run("scancel", "--batch", "--signal=TERM", number)
    assert slurm.wait_for_end(number)[0] == "FAILED"
    result = json.loads(next(out.glob("runs/*.part/result.json")).read_text())
    assert result["valid"] is False and "asked to stop" in result["error"]


def test_without_slurm_or_topology(tmp_path):
    """What is said where something is missing; needs no Slurm."""
    bare = {"PATH": str(tmp_path), "DROVER_BIN": drover.BINARY}
    for name in ("bash", "env", "dirname", "realpath", "awk", "sed", "tail", "cat", "basename"):
        os.symlink(shutil.which(name), tmp_path / name)

    def ends(code, says, *arguments, script="run.sbatch", env=None):
        p = subprocess.run([str(a) for a in (SLURM / script, *arguments)], capture_output=True, text=True,
                           check=False, env={**bare, **(env or {})}, timeout=60)
        assert p.returncode == code and says in p.stderr, p.stdout + p.stderr

    conf = run_file(tmp_path)
    for script in ("run.sbatch", "sweep.sbatch", "scaling.sbatch"):
        ends(ENVIRONMENT, "sbatch is not in PATH", CPUS, conf, script=script)
        ends(USAGE, "a topology file", script=script)
        ends(BAD_INPUT, "cannot read the topology file", tmp_path / "none.ini", conf, script=script)
        ends(BAD_INPUT, "cannot read the run file", CPUS, tmp_path / "none.conf", script=script)
        ends(ENVIRONMENT, "batch scripts never build", CPUS, conf, script=script,
             env={"DROVER_BIN": str(tmp_path / "none")})
    bad = tmp_path / "bad.ini"
    bad.write_text("[grid]\ntp = 2\n")
    ends(BAD_INPUT, "must give nodes and gpus_per_node", bad, conf)
    ends(USAGE, "not TPxPPxDP", "--grids=2x1", CPUS, conf, script="sweep.sbatch")
    ends(USAGE, "is more than the", "--ranks=64", CPUS, conf, script="scaling.sbatch")

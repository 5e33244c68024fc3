"""What is finished stays finished, whatever is killed and when; what is not begins anew."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest
from conftest import RECORDED, recorded_jobs

from studies import files, folder
from studies.errors import StudyError
from studies.folder import Study
from studies.jobs import Job, Runner, first_cause

LAUNCH = pathlib.Path(folder.__file__).resolve().parents[1]


def program(tmp_path, body):
    """A small program in drover's place: what is under test is who starts it, when and how often."""
    file = tmp_path / "program.sh"
    file.write_text(f"#!/bin/bash\necho started >> {tmp_path}/starts\n{body}\n")
    file.chmod(0o755)
    return str(file)


def starts(tmp_path):
    file = tmp_path / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


def leaves_result(label):
    """Shell that leaves a recorded run's results in --out, as drover would."""
    return (f'while [[ $1 != --out ]]; do shift; done; cp {RECORDED}/{label}/result.json '
            f'{RECORDED}/{label}/environment.json "$2"/')


@pytest.fixture
def runner(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    return Runner(runs, program(tmp_path, leaves_result("tp1-pp1-dp1-r1")))


JOB = Job("tp1-pp1-dp1", 1, {"model": "synthetic:tiny", "dataset": "synthetic:8x4:8"})


def test_a_finished_run_is_not_repeated(runner, tmp_path):
    assert runner.finished(JOB) is None
    assert runner.run(JOB).code == 0
    assert (runner.runs / JOB.name / "run.log").exists()
    assert not (runner.runs / f"{JOB.name}.part").exists()
    assert runner.finished(JOB).code == 0 and starts(tmp_path) == 1


def test_killed_between_the_end_and_its_record(runner):
    """drover had written all results; the study died before it could name the folder."""
    part = runner.runs / f"{JOB.name}.part"
    part.mkdir()
    whole = (RECORDED / "tp1-pp1-dp1-r1/result.json").read_text()
    (part / "result.json").write_text(whole[:len(whole) // 2])  # killed while writing
    assert runner.finished(JOB) is None
    (part / "result.json").write_text(whole)
    assert runner.finished(JOB).code == 0
    assert (runner.runs / JOB.name / "result.json").exists()


@pytest.mark.parametrize("spoil", [{"error": "rank 1 was lost"}, {"passes": {}}, {"format": "?"}])
def test_an_unfinished_result_is_not_taken(runner, spoil):
    part = runner.runs / f"{JOB.name}.part"
    part.mkdir()
    result = json.loads((RECORDED / "tp1-pp1-dp1-r1/result.json").read_text()) | spoil
    (part / "result.json").write_text(json.dumps(result))
    assert runner.finished(JOB) is None


def test_failures_are_set_aside_and_tried_again(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    runner = Runner(runs, program(tmp_path, 'echo "drover: rank 1 (vm) died"; exit 6'))
    for attempt in (1, 2):
        outcome = runner.run(JOB)
        assert (outcome.code, outcome.message) == (6, "rank 1 (vm) died")
        assert runner.finished(JOB) is None
        assert (runs / "failed" / f"{JOB.name}-{attempt}" / "run.log").exists()


def test_a_misfit_is_final_and_bad_input_ends_the_study(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    runner = Runner(runs, program(tmp_path, 'echo "drover: tp 2 does not divide 9 heads"; exit 2'))
    assert not runner.run(JOB).fits
    assert "does not divide" in runner.finished(JOB).message
    runner.program = program(tmp_path, 'echo "drover: x.h5: no such file"; exit 3')
    with pytest.raises(StudyError, match="no such file") as caught:
        runner.run(Job("other", 1, {}))
    assert caught.value.code == 3


def test_a_full_disk_loses_nothing(runner, tmp_path):
    """Success without a whole result.json is none; and a state that cannot be written stays old."""
    runner.program = program(tmp_path, "true")
    outcome = runner.run(JOB)
    assert outcome.code == 4 and "disk full" in outcome.message
    state = tmp_path / "state.json"
    files.write_json(state, {"old": 1})
    script = ("import sys, resource; sys.path.insert(0, sys.argv[1]); "
              "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
              "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
              "import pathlib; from studies import errors, files; "
              "errors.run(lambda: files.write_json(pathlib.Path(sys.argv[2]), {'new': 'x' * 9000}))")
    done = subprocess.run([sys.executable, "-c", script, str(LAUNCH), str(state)],
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 4 and "finished runs are kept" in done.stderr
    assert json.loads(state.read_text()) == {"old": 1}
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_two_studies_in_one_folder(args):
    with Study(args, "first"):
        with pytest.raises(StudyError, match="a study is going on there .process") as caught:
            with Study(args, "second"):
                pass
        assert caught.value.code == 2
    with Study(args, "third"):
        pass


def test_stopped_and_gone_on(args, tmp_path):
    """Killed in the second of two runs: the first is kept, the second starts again."""
    jobs = [job for job, _ in recorded_jobs()[:2]]
    args.program = program(tmp_path, f"[[ $(wc -l < {tmp_path}/starts) == 2 ]] && sleep 60\n" +
                           leaves_result("tp1-pp1-dp1-r1"))
    child = os.fork()
    if child == 0:
        try:
            with Study(args, "study") as study:
                study.finish(jobs)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while starts(tmp_path) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    begin = time.monotonic()
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    assert time.monotonic() - begin < 25
    with Study(args, "study") as study:
        assert [job.name for job in study.outcomes(jobs)] == [jobs[0].name]
        done = study.finish(jobs)
    assert len(done) == 2 and starts(tmp_path) == 3


def test_three_failures_in_a_row_end_it(args, tmp_path):
    args.program = program(tmp_path, 'echo "drover: no memory"; exit 4')
    jobs = [Job(f"a{i}", 1, {}) for i in range(5)]
    with Study(args, "study") as study:
        with pytest.raises(StudyError, match="3 runs in a row failed, the last one with: no memory"):
            study.finish(jobs)
    assert starts(tmp_path) == 3


def test_without_slurm(args, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    args.submit = True
    with Study(args, "study") as study:
        with pytest.raises(StudyError, match="there is no Slurm here") as caught:
            study.finish([JOB])
    assert caught.value.code == 4


def test_names_follow_the_options(tmp_path):
    other = Job(JOB.label, JOB.ranks, JOB.options | {"kv": "bf16"})
    again = Job(JOB.label, JOB.ranks, dict(reversed(JOB.options.items())), repeat=2)
    assert other.config != JOB.config == again.config
    model = tmp_path / "m.h5"
    model.write_bytes(b"1")
    named = Job("a", 1, {"model": str(model)})
    before = named.config
    model.write_bytes(b"22")
    assert named.config != before, "another model, another run"


def test_first_cause():
    log = "run.sh: mpirun -np 1\nrun.sh: with OMP\n[info] x\ndrover: tp 2 does not divide\n"
    assert first_cause(log) == "tp 2 does not divide"
    assert first_cause("") == "it said nothing"

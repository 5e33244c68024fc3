"""The studies' package on the path, and studies made of real runs that were recorded."""

import argparse
import json
import os
import pathlib
import shutil
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "launch"))

from studies.jobs import Job  # noqa: E402

# Open MPI sleeps so long after every failed run.
os.environ["OMPI_MCA_odls_base_sigkill_timeout"] = "1"
RECORDED = HERE / "recorded"  # synthetic:tiny on one and two ranks, each grid twice


def recorded_jobs():
    jobs = []
    for folder in sorted(RECORDED.iterdir()):
        job = json.loads((folder / "outcome.json").read_text())["job"]
        jobs.append((Job(**job), folder))
    return jobs


@pytest.fixture
def args(tmp_path):
    """As study.py would make them for the recorded runs."""
    job, _ = recorded_jobs()[0]
    common = {k: v for k, v in job.options.items() if k not in ("tp", "pp", "dp")}
    return argparse.Namespace(
        out=str(tmp_path / "study"), program=sys.executable, hostfile=None, run_minutes=1,
        submit=False, sbatch=[], ranks="1,2", grids="auto", kind="strong", repeat=2, topology=None,
        calibrate=None, no_simulate=False,
        model="synthetic:tiny", dataset="synthetic:48x32:96", common=common, shape={"heads": (8, 8)},
        command_line="launch/study.py scaling")


@pytest.fixture
def finished(args):
    """A study's folder with all of the recorded runs in it."""
    for job, folder in recorded_jobs():
        shutil.copytree(folder, pathlib.Path(args.out) / "runs" / job.name)
    return args

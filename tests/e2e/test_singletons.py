"""Processes of one job that MPI takes for many worlds: refused, with the command line that fits."""

import os
import subprocess

import pytest

import drover

BENCH = ("bench", "comm", "--sizes", "64", "--seconds", "0.01")
LAUNCHERS = {
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "{}", "SLURM_STEP_ID": "0"},
    "old srun": {"SLURM_NTASKS": "4", "SLURM_PROCID": "{}", "SLURM_STEP_ID": "0"},
    "another Open MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "{}"},
    "MPICH": {"PMI_SIZE": "4", "PMI_RANK": "{}"},
}


def as_started_by(launcher, number):
    return {name: value.format(number) for name, value in LAUNCHERS[launcher].items()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_refused_once(launcher):
    first = drover.single(*BENCH, env=as_started_by(launcher, 0), check=False)
    assert first.code == 4 and first.out == ""
    assert "4 processes" in first.err and "world of its own" in first.err
    # The other three have nothing to add.
    other = drover.single(*BENCH, env=as_started_by(launcher, 3), check=False)
    assert (other.code, other.out, other.err) == (4, "", "")
    line = f"-np 4 {drover.BINARY} {' '.join(BENCH)}"
    assert line in first.err
    assert ("srun --mpi=pmix -n 4 " in first.err) == ("srun" in launcher)


def test_the_line_that_is_told_works():
    told = drover.single(*BENCH, env=as_started_by("MPICH", 0), check=False).err
    line = next(line.strip() for line in told.splitlines() if " -np 4 " in line)
    p = subprocess.run(["bash", "-c", f". {drover.ROOT}/launch/mpi_env.sh; drover_mpi_env 4; {line}"],
                       capture_output=True, text=True, timeout=120, check=False)
    assert p.returncode == 0, p.stderr
    assert "tp 4" in p.stdout + p.stderr


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script's own shell
    {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"},  # mpirun -np 1 in a step
    {"PMI_SIZE": "many"},
])
def test_one_rank_that_is_meant(variables):
    drover.single("run", "--print-placement", env=variables)


def test_a_real_mpirun_is_no_singleton():
    env = {**os.environ, "SLURM_STEP_NUM_TASKS": "4"}
    assert drover.drover(2, "run", "--print-placement", env=env).code == 0


def test_srun_without_pmix_where_open_mpi_gives_up():
    """There Open MPI ends the process by itself before it is up; the command line is told all the same."""
    step = {"SLURM_JOBID": "7", "SLURM_JOB_ID": "7", "SLURM_STEPID": "0", "SLURM_STEP_ID": "0",
            "SLURM_NODELIST": "host", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "2"}
    first = drover.single(*BENCH, env={**step, "SLURM_PROCID": "0"}, check=False)
    assert first.code == 4, first.err
    assert "srun --mpi=pmix -n 2 " in first.err and f"-np 2 {drover.BINARY}" in first.err
    other = drover.single(*BENCH, env={**step, "SLURM_PROCID": "1"}, check=False)
    assert other.code == 4 and "drover:" not in other.err

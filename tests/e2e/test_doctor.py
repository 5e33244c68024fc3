"""drover doctor: one screen, every rank looked at, exit 0 or 4."""

import json
import os
import stat

import pytest

import drover

# A run that ends badly sleeps through Open MPI's grace.
HASTY = {"OMPI_MCA_odls_base_sigkill_timeout": "1"}


def checks(path):
    """check -> its findings."""
    found = {}
    for c in json.loads(path.read_text())["checks"]:
        found.setdefault(c["check"], []).append(c)
    return found


def doctor(tmp_path, ranks, *arguments, env=None, code=0):
    report = tmp_path / "doctor.json"
    outcome = drover.drover(ranks, "doctor", "--backend", "cpu", "--json", report, *arguments,
                            env={**HASTY, **(env or {})}, check=False)
    assert outcome.code == code, outcome.out + outcome.err
    return outcome.out, report


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_and_pair(tmp_path, ranks):
    out, report = doctor(tmp_path, ranks, "--model", drover.MODEL)
    assert out.startswith(f"drover doctor: {ranks} rank")
    assert len(out.splitlines()) < 40 and all(len(line) < 200 for line in out.splitlines())
    found = checks(report)
    for name in ("drover", "CPU", "memory", "mpirun", "Slurm", "GPUs", "NICs", "memlock", "open files",
                 "shared memory", "model store", "MPI", "PMIx", "UCX", "NCCL", "NCCL over",
                 "Open MPI over", "UCX over", "placement", "clocks", "pairs"):
        assert name in found, f"{name} is not told"
        assert any(line.split()[:1] == [c["verdict"]] and name in line
                   for c in found[name] for line in out.splitlines())
    assert "thread level multiple" in found["MPI"][0]["text"]
    assert len(found["placement"]) == ranks
    pairs = json.loads(report.read_text())["pairs"]
    assert {(p["a"], p["b"]) for p in pairs} == {(a, b) for b in range(ranks) for a in range(b)}
    assert all(p["same_host"] and 0 < p["latency_us"] < 1e6 and p["gb_per_s"] > 0 for p in pairs)


def test_what_is_bad_is_told(tmp_path):
    out, report = doctor(tmp_path, 2, "--model", tmp_path / "none.h5", "--pairs", "no", code=4)
    store = checks(report)["model store"]
    assert len(store) == 1 and store[0]["verdict"] == "bad" and store[0]["advice"]
    assert "bad   model store" in out and "1 bad" in out


def test_gpus_without_a_backend_for_them(tmp_path):
    """The stand-in for the driver's library tells of four GPUs."""
    library = drover.pathlib.Path(drover.BINARY).parent / "tests/libstand_in_nvml.so"
    if not library.exists():
        pytest.skip("the stand-in for NVML is not built")
    out, report = doctor(tmp_path, 1, env={"DROVER_NVML": str(library)})
    found = checks(report)
    assert "4 x Stand-in GPU (80 GiB, 9.0)" in found["GPUs"][0]["text"]
    assert found["driver"][0]["text"] == "999.1, for CUDA up to 13.0"
    assert "none in 4 of 6 pairs" in found["peer access"][0]["text"]
    assert "warn  peer access" in out


def program(folder, name, body):
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_another_mpirun_first_in_path(tmp_path):
    env = program(tmp_path, "mpirun", "echo 'HYDRA build details: Version: 4.0'")
    outcome = drover.single("doctor", "--json", tmp_path / "j", env=env, check=False)
    assert outcome.code == 4
    assert "HYDRA" in outcome.out and "drover is linked with Open MPI" in outcome.out


def test_a_launcher_that_hangs_has_a_deadline(tmp_path):
    env = program(tmp_path, "mpirun", "sleep 100")
    outcome = drover.single("doctor", env=env, check=False)
    assert outcome.code == 4 and "--version hangs" in outcome.out
    assert outcome.seconds < 60


def test_in_a_job_without_pmix(tmp_path):
    env = program(tmp_path, "srun", "echo 'MPI plugin types are... none pmi2'")
    outcome = drover.single("doctor", env={**env, "SLURM_JOB_ID": "7"})
    assert "warn  Slurm" in outcome.out and "no PMIx plug-in" in outcome.out
    env = program(tmp_path, "srun", "echo 'specific pmix plugin versions available: pmix_v4'")
    assert "pmix_v4; in a job" in drover.single("doctor", env={**env, "SLURM_JOB_ID": "7"}).out


def test_singletons_are_told(tmp_path):
    env = {"PMI_SIZE": "3", "PMI_RANK": "0"}
    outcome = drover.single("doctor", env=env, check=False)
    assert outcome.code == 4
    assert "3 processes" in outcome.out and "-np 3" in outcome.out
    other = drover.single("doctor", env={"PMI_SIZE": "3", "PMI_RANK": "1"}, check=False)
    assert (other.code, other.out) == (4, "")


def test_bad_input(tmp_path):
    assert drover.single("doctor", "--nonsense", check=False).code == 2
    outcome = drover.single("doctor", "--json", tmp_path / "no" / "folder.json", check=False)
    assert outcome.code == 4 and "folder.json" in outcome.err + outcome.out

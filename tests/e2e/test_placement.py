"""Which cores ranks take: what `--print-placement` says, and what their threads then have."""

import os
import pathlib
import re
import subprocess
import time

import pytest

import drover

CORES = sorted(os.sched_getaffinity(0))
ROW = re.compile(r"^ *(\d+) (\S+) +(\d+), (\d+), (\d+) +(.*?) {2,}(\S+) \((\d+)( [a-z ]+)?\) +(\S*) +(.*)$")


def cpus(text):
    """Of a list such as 0-3,8."""
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def placement(ranks, *arguments, env=None, prefix=()):
    """Rows of --print-placement: dicts by rank."""
    command = [*prefix, str(drover.MPIRUN), str(ranks), drover.BINARY, "run", "--print-placement",
               "--backend", "cpu", *map(str, arguments)]
    p = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False,
                       env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL)
    assert p.returncode == 0, p.stderr
    rows = [ROW.match(line) for line in p.stdout.splitlines()]
    rows = [dict(zip(("rank", "host", "replica", "stage", "slot", "gpu", "cpus", "cores", "how",
                      "numa", "nic"), row.groups())) for row in rows if row]
    assert [int(row["rank"]) for row in rows] == list(range(ranks)), p.stdout
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cores_are_shared_out(ranks):
    rows = placement(ranks, "--pp", ranks)
    assert [int(row["stage"]) for row in rows] == list(range(ranks))
    taken = [cpus(row["cpus"]) for row in rows]
    assert set().union(*taken) == set(CORES)
    if ranks == 1:
        assert rows[0]["how"] == " as given"
    elif ranks <= len(CORES):
        assert sum(map(len, taken)) == len(CORES), "a core twice"
    else:
        assert all(row["how"] == " crowded" for row in rows)
    assert all(row["gpu"] == "-" for row in rows)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_given_affinity_is_the_limit(ranks):
    rows = placement(ranks, "--pp", ranks, prefix=("taskset", "-c", str(CORES[-1])))
    for row in rows:
        assert cpus(row["cpus"]) == {CORES[-1]}
        assert row["how"] == (" as given" if ranks == 1 else " crowded")


def test_another_machine_can_be_looked_at():
    """hwloc's own variable: two sockets, four ranks, nothing straddles."""
    rows = placement(4, env={"HWLOC_SYNTHETIC": "pack:2 numa:1 core:8 pu:2"})
    assert [row["cpus"] for row in rows] == ["0-7", "8-15", "16-23", "24-31"]
    assert [row["numa"] for row in rows] == ["0", "0", "1", "1"]
    assert all(row["cores"] == "4" for row in rows)


def test_run_sh_asks_for_it():
    p = subprocess.run([drover.ROOT / "launch/run.sh", "-np", "2", "--program", drover.BINARY,
                        "--print-placement", "--", "run", "--pp", "2"], capture_output=True, text=True,
                       timeout=120, check=False)
    assert p.returncode == 0, p.stderr
    assert len([line for line in p.stdout.splitlines() if ROW.match(line)]) == 2


def test_bad_options():
    hasty = {"OMPI_MCA_odls_base_sigkill_timeout": "1"}
    outcome = drover.drover(1, "run", "--print-placement", "--backend", "tpu", check=False, env=hasty)
    assert outcome.code == 2
    outcome = drover.drover(2, "run", "--print-placement", "--pp", 3, check=False, env=hasty)
    assert outcome.code == 2 and "mpirun -np" in outcome.err


def affinities(marker):
    """rank's pid -> {thread: its processors}, of processes with `marker` on their command line."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            if line[0] != str(drover.BINARY).encode() or marker.encode() not in line:
                continue
            found[int(folder.name)] = {
                int(task.name): cpus(re.search(r"^Cpus_allowed_list:\s*(\S+)$",
                                               (task / "status").read_text(), re.M)[1])
                for task in (folder / "task").iterdir()}
        except (OSError, TypeError):
            continue  # it has just ended
    return found


@pytest.mark.skipif(len(CORES) < 2, reason="one core only")
@pytest.mark.parametrize("bind", ["yes", "no"])
def test_threads_have_what_was_said(tmp_path, bind):
    marker = str(tmp_path / "figures.json")
    command = [str(drover.MPIRUN), "2", drover.BINARY, "bench", "step", "--model", str(drover.MODEL),
               "--pp", "2", "--batches", "8", "--prompt-tokens", "32", "--new-tokens", "64",
               "--repeat", "1", "--bind", bind, "--json", marker]
    seen = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        deadline = time.monotonic() + 120
        while p.poll() is None and time.monotonic() < deadline:
            seen.append(affinities(marker))
            time.sleep(0.05)
        assert p.wait(timeout=60) == 0
    assert all(a <= set(CORES) for s in seen for tasks in s.values() for a in tasks.values())
    # MPI's own start-up moves the main thread about for a moment.
    settled = [s for s in seen[len(seen) // 2:] if len(s) == 2]
    assert settled
    limited = {frozenset(a) for s in settled for tasks in s.values() for a in tasks.values()
               if a != set(CORES)}
    if bind == "no":
        assert not limited
        return
    shares = {frozenset(cpus(row["cpus"])) for row in placement(2, "--pp", 2)}
    assert limited == shares
    # Rank 1 computes on its main thread, rank 0 on another: its main thread is LoadGen's.
    mains = [{frozenset(tasks[pid]) for pid, tasks in s.items()} for s in settled]
    assert any(frozenset(CORES) in m and m & shares for m in mains)

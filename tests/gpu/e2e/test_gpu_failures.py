"""A rank of GPUs that throws, hangs or dies: all ranks end within 10 s, with one first cause. On one
GPU, which two ranks share, and over NCCL on two."""

import re
import time

import pytest

import drover
import gpus
from failing import INTERNAL, LOST_PEER, Job, same_cause

LIMIT = 10  # seconds from the failure to the end of the last rank
LONG = ("--model", drover.MODEL, "--dataset", drover.DATASET, "--demo", "--warmup", 1, "--backend",
        "cuda", "--max-new-tokens", 512, "--max-sequences", 4, "--kv-memory", "64MiB")
TINY = ("--model", "synthetic:tiny", "--dataset", "synthetic:32x512:4096", "--demo", "--warmup", 1,
        "--backend", "cuda", "--max-sequences", 8, "--kv-memory", "64MiB")
PLACES = [pytest.param("shared", marks=pytest.mark.gpus(1)),
          pytest.param("nccl", marks=pytest.mark.gpus(2))]
GRIDS = {"tp": (*TINY, "--tp", 2), "pp": (*LONG, "--pp", 2), "dp": (*LONG, "--dp", 2)}


def start(folder, place, grid, fault):
    more = ("--share-gpu",) if place == "shared" else ()
    env = gpus.only(0) if place == "shared" else {}
    return Job(folder, 2, "run", *GRIDS[grid], *more, "--out", folder / "out", fault=fault, env=env,
               grace=3)


@pytest.mark.parametrize("place, grid", [
    pytest.param("shared", "pp", marks=pytest.mark.gpus(1)),
    *(pytest.param("nccl", grid, marks=pytest.mark.gpus(2)) for grid in GRIDS)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_throws(tmp_path, place, grid, rank):
    with start(tmp_path, place, grid, f"throw:{rank}:40") as job:
        # Over by itself long before this; how long from the failure is in the times of the ends.
        assert job.end(120) == INTERNAL, job.text()
        assert job.codes() == [INTERNAL] * 2, job.text()
        assert max(job.ends()) - min(job.ends()) < LIMIT
    assert f"rank {rank} (step): DROVER_FAULT" in same_cause(tmp_path / "out", range(2))


@pytest.mark.parametrize("place, grid", [
    pytest.param("shared", "pp", marks=pytest.mark.gpus(1)),
    *(pytest.param("nccl", grid, marks=pytest.mark.gpus(2)) for grid in ("pp", "tp"))])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies(tmp_path, place, grid, rank):
    with start(tmp_path, place, grid, f"kill:{rank}:40") as job:
        assert job.end(120) != 0, job.text()
        other = 1 - rank
        assert job.codes()[other] == LOST_PEER, job.text()
        assert max(job.ends()) - job.ends()[rank] < LIMIT, job.text()
    assert re.match(rf"rank {rank} on \S+ died", same_cause(tmp_path / "out", [other]))


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_hangs(tmp_path, place):
    out = tmp_path / "out"
    with start(tmp_path, place, "tp", "hang:1:40") as job:
        job.wait_for(lambda: (out / "performance/journal.jsonl").exists())
        begin = time.time()
        assert job.end(120) == LOST_PEER, job.text()
        assert max(job.ends()) - begin < LIMIT + 2, job.text()
    assert re.match(r"rank 1 on \S+ hangs", same_cause(out, range(2)))

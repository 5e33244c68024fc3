"""A Slurm of two nodes, each a network namespace with a slurmd: srun and its PMIx between hosts."""

import json
import os
import shutil
import signal
import tempfile
import time

import pytest

import drover
from cluster import Cluster
from failing import LOST_PEER, journal
from netns import Hosts
from test_slurm import Submitted


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tempfile.mkdtemp(prefix="slurm-")  # paths of sockets are short
    hosts = Hosts(tmp_path_factory.mktemp("nodes"), 2)
    cluster = None
    try:
        cluster = Cluster(folder, hosts.start())
        yield cluster.start()
    finally:
        if cluster:
            cluster.stop()
        hosts.stop()
        shutil.rmtree(folder, ignore_errors=True)


def topology(folder):
    file = folder / "two.ini"
    file.write_text((drover.ROOT / "topology/cpu.ini").read_text().replace("nodes = 1", "nodes = 2") +
                    "\n[network]\ngb_per_s = 1\nlatency_us = 20\n")
    return file


def test_a_run_over_two_nodes(nodes, tmp_path):
    job = Submitted(nodes, tmp_path, "run.sbatch", mode="performance,accuracy", dataset="synthetic:32x64:40",
                    topology=topology(tmp_path))
    assert "--nodes=2" in job.asked and "--ntasks-per-node=1" in job.asked
    assert job.end() == ("COMPLETED", 0), job.text()
    assert job.result()["valid"] is True and job.result()["grid"] == "tp 1 x pp 2 x dp 1"
    for rank, name in enumerate(nodes.hosts.names):
        assert f"{name} rank {rank} " in (tmp_path / f"out/attempt-0/logs/rank-{rank:04d}.log").read_text()


def test_a_rank_on_the_other_node_dies(nodes, tmp_path):
    job = Submitted(nodes, tmp_path, "run.sbatch", mode="accuracy", dataset="synthetic:32x64:20000",
                    topology=topology(tmp_path))
    job.under_way()
    begin = time.time()
    os.kill(nodes.hosts.pids(1, "drover")[0], signal.SIGKILL)
    assert job.end() == ("FAILED", LOST_PEER), job.text()
    assert time.time() - begin < 20
    assert len(journal(tmp_path / "out/attempt-0", "accuracy")) >= 20
    assert f"{nodes.hosts.names[1]}: task 1: Killed" in job.text()
    result = tmp_path / "out/attempt-0/result.json"
    assert result.stat().st_mtime - begin < 10
    told = json.loads(result.read_text())
    assert told["valid"] is False and "--resume" in told["go_on"]

"""drover doctor over three hosts: what it compares, and that it names the one that is unlike the others."""

import json
import os
import subprocess

import pytest

import drover
from netns import Hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("doctor"), 3)
    try:
        yield made.start()
    finally:
        made.stop()


class Doctor:
    def __init__(self, hosts, folder, code=0, without=(), **env):
        report = folder / "doctor.json"
        environment = {**os.environ, **hosts.environment, **env}
        for name in without:
            environment.pop(name)
        done = subprocess.run(
            [str(w) for w in (drover.ROOT / "launch/run.sh", "-np", 3, "--hostfile", hosts.hostfile, "--program",
                              drover.BINARY, "--", "doctor", "--backend", "cpu", "--json", report)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, env=environment)
        self.out = done.stdout
        assert done.returncode == code, done.stdout + done.stderr
        self.json = json.loads(report.read_text())

    def of(self, check):
        return [c for c in self.json["checks"] if c["check"] == check]

    def one(self, check):
        found = self.of(check)
        assert len(found) == 1, self.out
        return found[0]


def test_hosts_are_compared(tmp_path, hosts):
    seen = Doctor(hosts, tmp_path)
    assert seen.out.startswith("drover doctor: 3 ranks on 3 hosts")
    for check in ("MPI", "PMIx", "mpirun", "CPU"):
        assert sorted(seen.one(check)["hosts"]) == hosts.names, seen.out  # alike: told once, of all
    assert seen.one("drover")["verdict"] == "ok"
    for library in ("NCCL", "Open MPI", "UCX"):
        over = seen.one(f"{library} over")
        assert over["verdict"] == "ok" and over["text"].startswith("e0 | e1 | e2"), seen.out
    # One clock, seen through three networks.
    clocks = seen.one("clocks")
    assert clocks["verdict"] == "ok" and "ms from rank 0's (rank" in clocks["text"]
    assert abs(float(clocks["text"].split()[2])) < 50
    pairs = seen.json["pairs"]
    assert len(pairs) == 3 and not any(p["same_host"] for p in pairs)
    assert "3 between hosts pairs" in seen.one("pairs")["text"]


def test_interfaces_that_lead_nowhere(tmp_path, hosts):
    """The second host has docker's bridge, which Open MPI would take; NCCL is told a name that only the
    first host has, UCX the loopback."""
    hosts.run(1, "ip", "link", "add", "docker0", "type", "bridge")
    hosts.run(1, "ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
    hosts.run(1, "ip", "link", "set", "docker0", "up")
    try:
        seen = Doctor(hosts, tmp_path, code=4, without=["OMPI_MCA_btl_tcp_if_include"],
                      NCCL_SOCKET_IFNAME="e0", UCX_NET_DEVICES="lo")
    finally:
        hosts.run(1, "ip", "link", "del", "docker0")
    mpi = seen.one("Open MPI over")
    assert mpi["verdict"] == "warn" and f"docker0 ({hosts.names[1]}) leads to no other host" in mpi["text"]
    assert mpi["advice"] == f"export OMPI_MCA_btl_tcp_if_include={hosts.net}.0/24"
    nccl = seen.one("NCCL over")
    assert nccl["verdict"] == "bad" and f"nothing on {hosts.names[1]}, {hosts.names[2]}" in nccl["text"]
    assert nccl["advice"] == "export NCCL_SOCKET_IFNAME=e0,e1,e2"
    ucx = seen.one("UCX over")
    assert ucx["verdict"] == "warn" and "lo (all hosts) leads to no other host" in ucx["text"]
    # What it advises is right, and reaches the other hosts.
    again = Doctor(hosts, tmp_path, NCCL_SOCKET_IFNAME="e0,e1,e2", UCX_NET_DEVICES="e0,e1,e2")
    for library in ("NCCL", "Open MPI", "UCX"):
        assert again.one(f"{library} over")["verdict"] == "ok", again.out


def test_a_slow_host_is_named(tmp_path, hosts):
    # About a twentieth of what the others have.
    hosts.run(1, "tc", "qdisc", "add", "dev", "e1", "root", "tbf", "rate", "400mbit", "burst", "32k",
              "latency", "50ms")
    try:
        seen = Doctor(hosts, tmp_path)
    finally:
        hosts.run(1, "tc", "qdisc", "del", "dev", "e1", "root")
    odd = [c["text"] for c in seen.of("odd one out") if "bandwidth" in c["text"]]
    assert len(odd) == 1 and odd[0].startswith(f"rank 1 ({hosts.names[1]}): bandwidth"), seen.out

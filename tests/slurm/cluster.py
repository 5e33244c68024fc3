"""A real Slurm on this one machine, for the time of a test run: munged, slurmctld and slurmd with a
configuration, keys and folders of their own. Nothing of a Slurm that is installed here is touched.
With hosts of netns.py it has a node, and a slurmd, on each of them."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
# Seconds that a wait may take: it ends what hangs, not what is slow.
PATIENCE = 120
CONFIG = """
ClusterName=drover
SlurmctldHost={host}({address})
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its old credential lives.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
MpiDefault=none
SwitchType=switch/none
KillWait=5
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """One node of 8 CPUs and 4 GPUs, which Slurm counts and nobody has; or a node of 2 CPUs a host."""

    def __init__(self, folder, hosts=None):
        self.folder, self.hosts = pathlib.Path(folder), hosts
        self.on_hosts = []  # slurmd of each
        self.environment = {name: value for name, value in os.environ.items()
                            if not name.startswith(("SLURM_", "SBATCH_", "OMPI_", "PMIX_"))}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def start(self):
        missing = [p for p in PROGRAMS if shutil.which(p) is None]
        if missing:
            pytest.skip(f"no Slurm here: {', '.join(missing)} not found (Debian: slurm-wlm and munge)")
        if os.geteuid() != 0:
            pytest.skip("a Slurm of one's own needs root here: its daemons change to the job's user")
        host = socket.gethostname().split(".")[0]
        names = self.hosts.names if self.hosts else [host]
        for name in ("state", "munge", "gpus", *(f"{kind}-{n}" for kind in ("spool", "tmp") for n in names)):
            (self.folder / name).mkdir(parents=True)
        os.chmod(self.folder / "munge", 0o700)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        nodes = f"NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN"
        address = "127.0.0.1"
        if self.hosts:
            nodes = "\n".join(f"NodeName={n} NodeHostname={n} NodeAddr={a} CPUs=2 RealMemory=1000"
                              for n, a in zip(names, self.hosts.addresses))
            address = f"{self.hosts.net}.254"
        (self.folder / "slurm.conf").write_text(CONFIG.format(
            host=host, address=address, nodes=nodes, ports=free_ports(2), folder=self.folder))
        for i in range(4):
            (self.folder / f"gpus/{i}").touch()
        (self.folder / "gres.conf").write_text("" if self.hosts else
                                               f"NodeName={host} Name=gpu File={self.folder}/gpus/[0-3]\n")
        try:
            munge = self.folder / "munge"
            self._daemon("munged", f"--key-file={key}", f"--socket={munge}/socket",
                         f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                         f"--seed-file={munge}/seed", "--force", "--num-threads=2")
            self._daemon("slurmctld", "-c")
            if self.hosts:
                self._start_on_hosts()
            else:
                self._daemon("slurmd", "-c")
            self.wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split() ==
                          ["idle"] * len(names), "not all nodes are idle")
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            why = f"{error}\n{self.logs()}"
            self.stop()
            pytest.skip(f"a Slurm does not start here: {why}")
        listed = self.run("srun", "--mpi=list", check=False)
        if "pmix" not in listed.stdout + listed.stderr:
            self.stop()
            pytest.skip("this Slurm has no PMIx plug-in (srun --mpi=list)")
        return self

    def _start_on_hosts(self):
        """Not by `ip netns exec`: its /sys of its own has no cgroups, which slurmd looks for."""
        for name in self.hosts.names:
            with open(self.folder / f"slurmd-{name}.out", "wb") as output:
                self.on_hosts.append(subprocess.Popen(
                    ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "bash", "-c",
                     'hostname "$0"; exec slurmd -D -c -N "$0"', name],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment))

    def _daemon(self, *command):
        p = self.run(*command, check=False)
        assert p.returncode == 0, f"{' '.join(command)}: {p.stdout}{p.stderr}"

    def stop(self):
        """Ends the daemons, and waits for it: their folder goes next."""
        for slurmd in self.on_hosts:
            slurmd.terminate()
        for slurmd in self.on_hosts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                slurmd.wait(timeout=10)
        for name in (*(f.name for f in self.folder.glob("slurmd-*.pid")), "slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / name).read_text())
                os.kill(pid, signal.SIGTERM)
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:  # until there is no such process
                    os.kill(pid, 0)
                    time.sleep(0.05)

    def run(self, *command, check=True, timeout=60, env=None, cwd=None):
        return subprocess.run([str(c) for c in command], check=check, capture_output=True, text=True,
                              timeout=timeout, stdin=subprocess.DEVNULL, cwd=cwd,
                              env={**self.environment, **(env or {})})

    def logs(self):
        text = ""
        for name in ("slurmctld.log", *(f.name for f in self.folder.glob("slurmd-*.log")), "munge/log"):
            with contextlib.suppress(OSError):
                text += f"== {name}\n" + "".join(
                    (self.folder / name).read_text().splitlines(keepends=True)[-15:])
        return text

    def wait_for(self, what, otherwise):
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, otherwise() if callable(otherwise) else otherwise
            time.sleep(0.1)

    def job(self, number):
        """scontrol's words of a job, as a dictionary."""
        shown = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_end(self, number, output=None):
        """The job's state and exit code, once it has ended for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.job(number)["JobState"] in over,
                      lambda: f"job {number} does not end\n{self.job(number)}\n{self.logs()}\n"
                              f"{output.read_text() if output and output.exists() else ''}")
        job = self.job(number)
        return job["JobState"], int(job["ExitCode"].split(":")[0])

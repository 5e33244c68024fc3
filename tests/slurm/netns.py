"""Hosts made of network namespaces: each with a name, an address and a loopback of its own, joined by
a bridge. mpirun reaches them through an agent in ssh's place."""

import os
import pathlib
import shutil
import subprocess

import pytest

AGENT = """#!/bin/bash
# AGENT [options] HOST COMMAND: as ssh would, in the namespace with that address.
while [[ $1 == -* ]]; do shift; done
address=$1
shift
for name in {names}; do
  if [[ $address == "{net}.${{name##*-}}" ]]; then
    exec env -i PATH="$PATH" HOME="$HOME" ip netns exec "$name" \
      unshare --uts bash -c 'hostname "$0"; eval "$1"' "$name" "$*"
  fi
done
echo "no host $address" >&2
exit 255
"""


class Hosts:
    made = 0

    def __init__(self, folder, count):
        # Names of their own: the kernel may still be taking the last ones down.
        tag = (os.getpid() + 131 * Hosts.made) % 10000
        Hosts.made += 1
        self.folder = pathlib.Path(folder)
        self.net = f"10.{200 + tag % 50}.{tag // 50 % 250}"
        self.bridge = f"drv{tag}"
        self.names = [f"drover{tag}-{i + 1}" for i in range(count)]
        self.addresses = [f"{self.net}.{i + 1}" for i in range(count)]

    def start(self):
        for tool in ("ip", "unshare", "mpirun"):
            if shutil.which(tool) is None:
                pytest.skip(f"no {tool} here (Debian: iproute2, util-linux, openmpi-bin)")
        try:
            self._ip("link", "add", self.bridge, "type", "bridge")
            self._ip("addr", "add", f"{self.net}.254/24", "dev", self.bridge)
            self._ip("link", "set", self.bridge, "up")
            for i, (name, address) in enumerate(zip(self.names, self.addresses)):
                inner, outer = f"e{i}", f"{self.bridge}p{i}"
                self._ip("netns", "add", name)
                self._ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
                self._ip("link", "set", outer, "master", self.bridge, "up")
                self._ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
                self._ip("-n", name, "link", "set", inner, "up")
                self._ip("-n", name, "link", "set", "lo", "up")
                subprocess.run(["ip", "netns", "exec", name, "unshare", "--uts", "hostname", name],
                               check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            self.stop()
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        agent = self.folder / "agent"
        agent.write_text(AGENT.format(names=" ".join(self.names), net=self.net))
        agent.chmod(0o755)
        self.hostfile = self.folder / "hosts"
        self.hostfile.write_text("".join(f"{a} slots=1\n" for a in self.addresses))
        self.environment = {
            "OMPI_MCA_plm_rsh_agent": str(agent), "OMPI_MCA_oob_tcp_if_include": f"{self.net}.0/24",
            "OMPI_MCA_btl_tcp_if_include": f"{self.net}.0/24"}
        return self

    @staticmethod
    def _ip(*arguments, check=True):
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)

    def link(self, host, state):
        """Plugs a host's cable in ("up") or out ("down")."""
        self._ip("link", "set", f"{self.bridge}p{host}", state)

    def run(self, host, *command):
        """A command of ip or tc on a host; skips the test where this kernel cannot do it."""
        done = subprocess.run(["ip", "netns", "exec", self.names[host], *command], check=False,
                              capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no {' '.join(command)} here: {done.stderr.strip()}")

    def pids(self, host, program):
        """Processes of a host whose command line has the words."""
        found = []
        for pid in self._ip("netns", "pids", self.names[host]).stdout.split():
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0].decode().endswith(program):
                found.append(int(pid))
        return found

    def stop(self):
        for name in self.names:
            for pid in self._ip("netns", "pids", name, check=False).stdout.split():
                subprocess.run(["kill", "-9", pid], check=False, capture_output=True)
            self._ip("netns", "del", name, check=False)
        self._ip("link", "del", self.bridge, check=False)

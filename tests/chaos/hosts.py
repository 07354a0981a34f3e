"""Several hosts on one machine: network namespaces with a cable each to one switch.

A host is a namespace with an address of its own and, in it, a Ray node. A cable can be cut without
either end noticing: the switch drops every frame, as a dead switch or a partitioned network does.
Needs root and iproute2. Only processes inside our own namespaces are ever touched.

Two networks can be up at the same time: namespaces are named after the process, addresses and ports
exist only inside them, and Ray's sockets lie in the folder that is given.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_SUBNET = ipaddress.ip_network("10.77.0.0/24")
_GCS_PORT = 6379
_OBJECT_STORE_BYTES = 100_000_000
_PATIENCE_S = 60.0

# A silent host is declared dead after 9 s rather than after a minute.
_HEAD_ENVIRONMENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}

# Answers each line of input with a JSON object: addresses and ids of the nodes that are alive.
_OBSERVER = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
for _ in sys.stdin:
    nodes = client.get_all_node_info().values()
    alive = {n.node_manager_address: n.node_id.hex() for n in nodes if n.state == 0}
    print(json.dumps(alive), flush=True)
"""

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def missing() -> str | None:
    """What this machine lacks for hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces and mounts"
    absent = [tool for tool in ("ip", "bridge", "mount") if shutil.which(tool) is None]
    return f"needs {', '.join(absent)} (iproute2, util-linux)" if absent else None


@dataclass
class Host:
    """One host; ``node`` is its ``ray start --block``, None while no Ray runs there."""

    name: str
    number: int
    address: str
    node: subprocess.Popen[bytes] | None = None

    @property
    def launcher(self) -> list[str]:
        """Runs the command behind it on this host."""
        return ["ip", "netns", "exec", self.name]

    def pids(self) -> list[int]:
        """Every process on the host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.name).split()]


class Network:
    """Hosts on a switch. The first carries the head of the Ray cluster.

    Args:
        folder: for Ray's sockets and logs; a short path.
        environment: of every process.
        num_hosts: all of them are wired up; Ray is started on each separately.
        head_cpus: that Ray may give away on the first host; the others have one each.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        num_hosts: int,
        head_cpus: int = 1,
    ) -> None:
        self._folder = folder
        self._head_cpus = head_cpus
        self._environment = {**environment, "GLOO_SOCKET_IFNAME": "eth0"}
        prefix = f"chaos-{os.getpid()}"
        self._switch = f"{prefix}-switch"
        self._observer: subprocess.Popen[str] | None = None
        addresses = list(_SUBNET.hosts())
        self.hosts = [
            Host(f"{prefix}-host{number}", number, str(addresses[number]))
            for number in range(num_hosts)
        ]

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"{self.hosts[0].address}:{_GCS_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """For commands on a host."""
        return {**self._environment, "RAY_ADDRESS": self.address}

    def __enter__(self) -> Network:
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host in self.hosts:
                self._wire(host)
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._take_down()

    def _wire(self, host: Host) -> None:
        _run("ip", "netns", "add", host.name)
        _run("ip", "-n", host.name, "link", "set", "lo", "up")
        port = _port(host)
        ends = ("netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _run("ip", "link", "add", port, *ends)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        network = f"{host.address}/{_SUBNET.prefixlen}"
        _run("ip", "-n", host.name, "addr", "add", network, "dev", "eth0")
        _run("ip", "-n", host.name, "link", "set", "eth0", "up")

    def _take_down(self) -> None:
        if self._observer is not None:
            self._observer.kill()
            self._observer.communicate()
        for host in self.hosts:
            with suppress(subprocess.CalledProcessError):
                self.kill(host)
        for name in (*(host.name for host in self.hosts), self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)

    def start(self, *hosts: Host) -> None:
        """Start Ray on hosts; comes back when the cluster knows of all of them.

        Raises:
            TimeoutError: one did not come up; with the end of its log.
        """
        before = self.nodes() if self._observer else {}
        for host in hosts:
            self._start(host)
        deadline = time.monotonic() + _PATIENCE_S
        for host in hosts:
            while self.nodes().get(host.address) in {None, before.get(host.address)}:
                if time.monotonic() > deadline or _has_ended(host):
                    raise TimeoutError(f"no Ray on {host.name}: {_last_words(self._log(host))}")
                time.sleep(0.1)

    def _start(self, host: Host) -> None:
        is_head = host.number == 0
        num_cpus = self._head_cpus if is_head else 1
        place = [f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}", "--num-gpus=0"]
        place += ["--block"]
        # Nodes that start at the same time take each other's names in a folder that they share.
        place += [f"--temp-dir={self._folder / f'ray{host.number}'}"]
        place += ["--object-store-memory", str(_OBJECT_STORE_BYTES)]
        if is_head:
            place += ["--head", f"--port={_GCS_PORT}"]
            place += [f"--dashboard-host={host.address}", "--include-dashboard=true"]
        else:
            place += [f"--address={self.address}"]
        with self._log(host).open("ab") as log:
            host.node = subprocess.Popen(
                [*host.launcher, *_RAY, "start", *place],
                env={**self._environment, **(_HEAD_ENVIRONMENT if is_head else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, host: Host) -> Path:
        return self._folder / f"{host.name}.txt"

    def nodes(self) -> dict[str, str]:
        """The ids of the nodes that are alive, by address."""
        if self._observer is None or self._observer.poll() is not None:
            if self._observer is not None:
                self._observer.communicate()
            # One process for all questions: importing Ray takes longer than any answer.
            self._observer = subprocess.Popen(
                [*self.hosts[0].launcher, sys.executable, "-c", _OBSERVER, self.address],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._observer.stdin is not None
        assert self._observer.stdout is not None
        try:
            print(file=self._observer.stdin, flush=True)
            found: dict[str, str] = json.loads(self._observer.stdout.readline() or "{}")
        except BrokenPipeError:
            return {}
        return found

    def drain(self, host: Host, *, deadline_s: float) -> None:
        """Tell Ray that the host will be taken away."""
        node = self.nodes()[host.address]
        command = ["drain-node", "--address", self.address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command += ["--deadline-remaining-seconds", str(int(deadline_s))]
        subprocess.run(
            [*self.hosts[0].launcher, *_RAY, *command],
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=_PATIENCE_S,
        )

    def terminate(self, host: Host) -> None:
        """SIGTERM to the host's ``ray start --block``, as a kubelet or systemd sends it."""
        assert host.node is not None
        host.node.send_signal(signal.SIGTERM)

    def kill(self, host: Host) -> None:
        """SIGKILL to every process on the host, as if its power had gone."""
        while pids := host.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if host.node is not None:
                host.node.poll()
            time.sleep(0.02)
        if host.node is not None:
            host.node.wait()
            host.node = None

    def silence(self, host: Host) -> None:
        """Drop every frame from and to the host; links stay up and nobody is told."""
        self._bridge_state(host, "disabled")

    def heal(self, host: Host) -> None:
        """Let frames pass again."""
        self._bridge_state(host, "forwarding")

    def _bridge_state(self, host: Host, state: str) -> None:
        inside = ("ip", "netns", "exec", self._switch)
        number = {"disabled": "0", "forwarding": "3"}[state]
        _run(*inside, "bridge", "link", "set", "dev", _port(host), "state", number)


def _has_ended(host: Host) -> bool:
    return host.node is None or host.node.poll() is not None


def _last_words(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-6:])


def _port(host: Host) -> str:
    return f"port{host.number}"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

"""The submitter of a RayJob beside a real head: on another host, with a token, through outages.

Hosts are network namespaces. The head that is killed comes back at the same address, as one does
behind a Kubernetes service.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from tests.chaos import hosts
from tests.workplace import REPOSITORY, Command, Commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multinode,
    pytest.mark.timeout(400),
    pytest.mark.skipif(hosts.missing() is not None, reason=hosts.missing() or ""),
]

TOKEN = "a" * 32 + "-right"
# Counts, until it is told to end; says in a file that it was started.
JOB = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "starts").open("a") as file:
    file.write("start\\n")
count = 0
while not (folder / "finish").exists():
    print(json.dumps({"count": count}), flush=True)
    count += 1
    time.sleep(0.1)
print("done", flush=True)
"""


@dataclass
class Scene:
    """A head without CPUs, and a host that has only submitters."""

    network: hosts.Network
    folder: Path
    commands: Commands

    @property
    def head(self) -> hosts.Host:
        return self.network.hosts[0]

    def submit(self) -> Command:
        entrypoint = f"{sys.executable} {self.folder / 'job.py'} {self.folder}"
        submitter = [sys.executable, "-m", "cluster.launch.submitter", entrypoint]
        return self.commands.start(
            [*self.network.hosts[1].launcher, *submitter],
            cwd=self.folder,
            environment={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "PYTHONPATH": str(REPOSITORY),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": TOKEN,
                "RAY_DASHBOARD_ADDRESS": f"{self.head.address}:8265",
                "RAY_JOB_SUBMISSION_ID": "train-demo-x7k2p",
            },
        )

    def starts(self) -> int:
        file = self.folder / "starts"
        return len(file.read_text().splitlines()) if file.exists() else 0


def counts(command: Command) -> list[int]:
    """What the job has counted, as far as the submitter has told it."""
    lines = [line for line in command.text().split("\n")[:-1] if line.startswith("{")]
    return [json.loads(line)["count"] for line in lines]


def more(command: Command) -> Callable[[], Any]:
    """Whether further lines came since this was asked for."""
    before = len(counts(command))
    return lambda: len(counts(command)) > before + 5


@pytest.fixture
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("s")  # a short path, for Ray's sockets
    (folder / "job.py").write_text(JOB)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | session._ENVIRONMENT
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with hosts.Network(folder, environment, num_hosts=2, head_cpus=0) as network:
        scene = Scene(network, folder, Commands(folder))
        try:
            yield scene
        finally:
            scene.commands.kill_left()


def test_a_job_outlives_its_streams_its_link_and_its_head(scene: Scene) -> None:
    first, second = scene.submit(), scene.submit()  # before there is a head
    scene.network.start(scene.head)
    for command in (first, second):
        command.wait_for(more(command))
    assert scene.starts() == 1
    second.process.send_signal(signal.SIGTERM)
    assert second.end() == 143
    first.wait_for(more(first))
    assert scene.starts() == 1

    # The stream alone: the submitter's host resets its connections.
    reset = [*scene.network.hosts[1].launcher, "ss", "--kill", "--tcp", "dport", "=", ":8265"]
    assert b"ESTAB" in subprocess.run(reset, check=True, capture_output=True).stdout
    first.wait_for(more(first))

    # The link, and nobody is told: both sides of the stream wait.
    scene.network.silence(scene.head)
    began = time.monotonic()
    first.wait_for(lambda: "does not answer in time" in first.text())
    assert time.monotonic() - began < 60
    time.sleep(max(0.0, began + 75 - time.monotonic()))  # until the stream is given up, too
    scene.network.heal(scene.head)
    first.wait_for(lambda: "Ray's head answers again" in first.text())
    first.wait_for(more(first))
    told = counts(first)
    assert told == list(range(len(told)))  # none lost, none twice

    # The head's machine.
    scene.network.kill(scene.head)
    first.wait_for(lambda: "no Ray Jobs API answers" in first.text())
    scene.network.start(scene.head)
    first.wait_for(lambda: scene.starts() == 2)
    first.wait_for(lambda: counts(first)[-1] < len(told))
    assert "begun anew: the job is handed in again" in first.text()
    first.wait_for(more(first))
    assert first.process.poll() is None
    (scene.folder / "finish").touch()
    assert first.end() == 0
    told = counts(first)
    again = len(told) - 1 - told[::-1].index(0)
    assert told[again:] == list(range(len(told) - again))
    assert first.text().endswith("\ndone\n")
    assert "Traceback" not in first.text()
    assert TOKEN not in first.text()

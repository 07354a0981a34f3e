"""``babelray launch`` on a Ray cluster of several hosts that ask for a token.

The hosts are network namespaces. None of them has babelray: their Python's path holds packages of
the same names that cannot be imported, so whatever runs there came with the job.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from tests.chaos import hosts
from tests.workplace import REPOSITORY, Command, Commands, Workplace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multinode,
    pytest.mark.timeout(400),
    pytest.mark.skipif(hosts.missing() is not None, reason=hosts.missing() or ""),
]

TOKEN = "a" * 32 + "-right"


@dataclass
class Cluster:
    """A head without CPUs, two workers with one each, and a client outside of the cluster."""

    network: hosts.Network
    folder: Path
    commands: Commands

    @property
    def client(self) -> hosts.Host:
        return self.network.hosts[-1]

    @property
    def api(self) -> str:
        return f"http://{self.network.hosts[0].address}:8265"

    def start(self, *arguments: object, address: str | None = None, **environment: str) -> Command:
        """Begin a command on the client, which shares only the storage with the cluster."""
        return self.commands.start(
            [*self.client.launcher, sys.executable, "-m", "cluster.cli", *map(str, arguments)],
            cwd=self.folder / "client",
            environment={
                **_plain_environment(self.folder / "client"),
                "PYTHONPATH": str(REPOSITORY),
                "RAY_ADDRESS": address or self.api,
                **environment,
            },
        )

    def babelray(
        self, *arguments: object, address: str | None = None, **environment: str
    ) -> tuple[int, str]:
        """A command's exit status and what it has said."""
        command = self.start(*arguments, address=address, **environment)
        return command.end(), command.text()


def _plain_environment(home: Path) -> dict[str, str]:
    """Nothing of Ray's, no token, and a home of its own."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("h")
    (folder / "client").mkdir()
    (folder / "storage").mkdir()
    (folder / "token").write_text(f"{TOKEN}\n")
    poison = folder / "poison"
    for package in ("cluster", "trainer", "model", "data_shards"):
        (poison / package).mkdir(parents=True)
        (poison / package / "__init__.py").write_text("raise ImportError('not what was launched')")
    environment = _plain_environment(folder) | session._ENVIRONMENT
    environment |= {"PYTHONPATH": str(poison), "RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    with hosts.Network(folder, environment, num_hosts=4, head_cpus=0) as network:
        network.start(*network.hosts[:3])
        cluster = Cluster(network, folder, Commands(folder))
        try:
            yield cluster
        finally:
            cluster.commands.kill_left()


def test_a_client_without_the_token_is_refused(cluster: Cluster) -> None:
    config = REPOSITORY / "configs" / "tiny.yaml"
    launch = ("launch", "--config", config, "--name", "refused", "--storage", "/nowhere")

    ended, text = cluster.babelray(*launch)
    assert ended == 2, text
    assert "asks for a token: export RAY_AUTH_MODE=token" in text

    # The way over the head's own address.
    ended, text = cluster.babelray(*launch, address=cluster.network.address)
    assert ended == 2, text
    assert "asks for a token, or another one: export RAY_AUTH_MODE=token" in text

    ended, text = cluster.babelray(*launch, RAY_AUTH_MODE="token")
    assert ended == 2, text
    assert "RAY_AUTH_MODE=token, but there is no token" in text

    wrong = "b" * 32 + "-wrong"
    ended, text = cluster.babelray(*launch, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=wrong)
    assert ended == 2, text
    assert "refuses the token that was given" in text
    assert wrong not in text
    assert "Traceback" not in text


def test_a_run_spans_hosts_that_do_not_have_the_code(
    cluster: Cluster, workplace: Workplace
) -> None:
    storage = cluster.folder / "storage"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    launch = ("launch", "--config", workplace.folder / "toy.yaml", "--name", "spans")
    launch += ("--storage", storage, "--nodes", "2", "--set", "trainer.max_steps=40")

    dry, text = cluster.babelray(*launch, "--dry-run", **token)
    assert dry == 0, text
    assert TOKEN not in text
    assert "cluster/train.py" in text

    # The address is the head's own: the dashboard's is asked for, with the token.
    command = cluster.start(*launch, address=cluster.network.address, **token)
    run = storage / "runs" / "spans"
    command.wait_for(lambda: len(_events(run)) >= 3)
    ranks = [_pid(run / "logs" / f"rank-{rank:03d}.log") for rank in (0, 1)]
    workers = cluster.network.hosts[1:3]
    assert {host.name for host in workers for pid in ranks if pid in host.pids()} == {
        host.name for host in workers
    }
    assert command.end() == 0, command.text()
    text = command.text()
    assert "on 2 workers" in text
    assert "finished: max_steps" in text
    assert TOKEN not in text
    assert "Traceback" not in text
    assert _events(run)[-1]["step"] == 40
    assert {event["world_size"] for event in _events(run)} == {2}

    # Known here only from the record of the launch: the command runs on the head.
    status, text = cluster.babelray("status", "spans", **token)
    assert status == 0, text
    assert "40" in text
    refused, text = cluster.babelray("status", "spans")
    assert refused == 2
    assert "asks for a token" in text


def _events(run: Path) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in events if event["event"] == "step"]


def _pid(log: Path) -> int:
    return int(re.findall(r"process (\d+)", log.read_text())[-1])

"""``babelray launch`` and its companions against a Ray cluster of two nodes on this machine.

The cluster's path holds packages of babelray's names that cannot be imported: what runs there came
with the job.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from cluster.launch.ray_jobs import RayJobsTarget
from cluster.launch.target import Ended, LogLine, Place, RemoteCommandError, Submission
from tests.workplace import REPOSITORY, Command, Workplace

# A training begins and ends within it, also on a machine that has much else to do.
PATIENCE_S = 300

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(900),
    # Ray leaves the sockets to the garbage collector with which it looks for free ports.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the Jobs API of a cluster: a head with one CPU, and a node with one."""
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    poison = tmp_path_factory.mktemp("poison")
    for package in ("cluster", "trainer", "model", "data_shards"):
        (poison / package).mkdir()
        (poison / package / "__init__.py").write_text("raise ImportError('not what was launched')")
    with pytest.MonkeyPatch.context() as patch:
        # Else Ray takes the machine's own address, and listens on all interfaces.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # for the nodes' own processes
        for name, value in session._ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", str(poison))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster()
        options: dict[str, Any] = {"node_ip_address": session.LOOPBACK}
        options |= {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        options |= {"dashboard_agent_listen_port": 0}
        cluster.add_node(include_dashboard=True, dashboard_port=0, **options)
        try:
            # Nodes that share a folder take the code that a job brought away from each other.
            cluster.add_node(temp_dir=str(tmp_path_factory.mktemp("n")), **options)
            yield f"http://{cluster.webui_url}"
        finally:
            for node in list(cluster.worker_nodes):
                cluster.remove_node(node)
            cluster.shutdown()
            gc.collect()  # here, where Ray's warnings are expected


@dataclass
class Client:
    """A folder that is no part of the cluster, and one that it shares."""

    workplace: Workplace
    address: str

    @property
    def storage(self) -> Path:
        return self.workplace.folder / "storage"

    def start(self, *arguments: object) -> Command:
        return self.workplace.commands.start(
            [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
            cwd=self.workplace.folder,
            environment={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "RAY_ADDRESS": self.address,
                "RAY_AUTH_MODE": "disabled",
            },
        )

    def babelray(self, *arguments: object) -> tuple[int, str]:
        command = self.start(*arguments)
        return command.process.wait(timeout=PATIENCE_S), command.text()

    def steps(self, run: str) -> list[int]:
        file = self.storage / "runs" / run / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event["step"] for event in events if event["event"] == "step"]


@pytest.fixture
def client(workplace: Workplace, address: str) -> Client:
    return Client(workplace, address)


def test_a_command_runs_there_with_the_code_from_here(address: str, tmp_path: Path) -> None:
    target = RayJobsTarget(Place("ray", str(tmp_path), address=address))
    submission = Submission("one", "doctor", ("--version",))

    assert {check.outcome for check in target.preflight(submission)} == {"ok"}
    with target.dashboard("one") as url:
        assert url == address

    lines = list(target.run("one", ["launch", "--help"]))
    assert lines[0].startswith("Usage: ")
    assert any("--dry-run" in line for line in lines)

    lines = []
    with pytest.raises(RemoteCommandError) as failed:
        lines.extend(target.run("one", ["status", "nothing", "--runs", str(tmp_path / "runs")]))
    assert failed.value.exit_status == 2

    # A job with a configuration finds it, and fails with what babelray says of it.
    job = target.submit(
        Submission(
            "one",
            "train",
            ("train", "--name", "one", "--workers", "7", "--log-format", "json"),
            config="data: {lanes: 3}\n",
        )
    )
    updates = list(target.follow(job))
    end = updates[-1]
    assert isinstance(end, Ended)
    assert end.job == target.find("one")
    assert end.job.phase == "failed"
    assert str(end.job.message).startswith("--workers 7: the run has data.lanes 3")
    told = [update.text for update in updates if isinstance(update, LogLine)]
    assert told
    assert "Running entrypoint" not in "".join(told)
    assert target.find("one", "evaluate") is None
    assert target.find("two") is None


@pytest.mark.slow
def test_launch_watch_interrupt_stop_resume_and_evaluate(client: Client) -> None:
    launch = ("launch", "--config", "toy.yaml", "--name", "one", "--storage", client.storage)
    launch += ("--nodes", "2")

    watched = client.start(*launch)
    watched.wait_for(lambda: len(client.steps("one")) > 3)
    watched.wait_for(lambda: "step " in watched.text())
    os.killpg(watched.process.pid, signal.SIGINT)
    assert watched.end() == 130
    assert "on 2 workers" in watched.text()
    assert "not watched any more; one goes on" in watched.text()
    assert "Traceback" not in watched.text()

    # It goes on, and whoever asks is told.
    again, text = client.babelray(*launch)
    assert again == 2, text
    assert "the run one is not over" in text
    status, text = client.babelray("status", "one")
    assert status == 0, text
    assert "one" in text
    following = client.start("logs", "one", "--follow")
    before = client.steps("one")[-1]
    following.wait_for(lambda: client.steps("one")[-1] > before + 2)
    url, text = client.babelray("dashboard", "one")
    assert client.address in text, (url, text)

    stopped, text = client.babelray("stop", "one")
    assert stopped == 0, text
    following.end()
    run = client.storage / "runs" / "one"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "finished"] == ["stopped"]
    last = client.steps("one")[-1]

    resumed, text = client.babelray(*launch, "--set", f"trainer.max_steps={last + 10}")
    assert resumed == 0, text
    assert f"resumed from step {last}" in text
    assert client.steps("one")[-1] == last + 10

    scored, text = client.babelray(
        "evaluate", "one", "--test-set", "valid", "--set", "evaluation.beam=1"
    )
    assert scored == 0, text
    assert "BLEU" in text
    assert list((run / "evaluation").glob("valid-*.json"))


@pytest.mark.slow
def test_a_job_is_ended_at_once(client: Client) -> None:
    launch = ("launch", "--config", "toy.yaml", "--name", "two", "--storage", client.storage)
    launched, text = client.babelray(*launch, "--detach")
    assert launched == 0, text
    target = RayJobsTarget(Place("ray", str(client.storage), address=client.address))
    job = target.find("two")
    assert job is not None
    assert not job.is_over
    ended, text = client.babelray("stop", "two", "--now")
    assert ended == 0, text
    updates = list(target.follow(job))
    assert isinstance(updates[-1], Ended)
    assert updates[-1].job.phase == "stopped"

"""Groups of workers on several Ray nodes of this machine: nodes come, go, are drained and killed.

The ranks only count steps (``tests/group.py``): what they compute is tested elsewhere.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import session
from cluster.failures import failures_path
from tests.group import SAVE_EVERY, count_steps
from trainer.config import RecoveryConfig

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.timeout(300),
    # Ray Data warns of settings that it reads itself when it is imported.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    # Ray leaves the sockets to the garbage collector with which it looks for free ports.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 90

# A lost node is noticed after seconds; the head reads these.
HEARTBEATS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """A Ray cluster on the loopback interface: a head without CPUs, and nodes with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._options = {"node_ip_address": session.LOOPBACK, "object_store_memory": 80 * 2**20}
        self._cluster.add_node(num_cpus=0, include_dashboard=False, **self._options)
        self.address = self._cluster.address

    def add(self) -> Any:
        """A node with one CPU, known to the head."""
        return self._cluster.add_node(num_cpus=1, **self._options)

    def kill(self, node: Any) -> None:
        """SIGKILL for every process of a node, as if its power were cut."""
        for process in [*self._processes(node), *self._descendants(node)]:
            process.kill()

    def remove_all(self) -> None:
        """Leave the head alone."""
        for node in list(self._cluster.worker_nodes):
            self._cluster.remove_node(node)

    def shutdown(self) -> None:
        """End the head, too."""
        self._cluster.shutdown()

    def drain(self, node_id: str) -> None:
        """Tell a node that it will be taken away in a minute."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(time.time() * 1000) + 60_000
        accepted, why = GcsClient(address=self.address).drain_node(
            node_id, reason, "test", deadline_ms
        )
        assert accepted, why

    def controllers(self) -> list[psutil.Process]:
        """Processes of Ray Train's controllers on this cluster."""
        return [
            process
            for node in self._cluster.list_all_nodes()
            for process in self._descendants(node)
            if "RayTrainController" in process.name() or "TrainController" in _title(process)
        ]

    def _processes(self, node: Any) -> list[psutil.Process]:
        infos = [info for infos in node.all_processes.values() for info in infos]
        return [psutil.Process(info.process.pid) for info in infos if info.process.poll() is None]

    def _descendants(self, node: Any) -> list[psutil.Process]:
        return [child for process in self._processes(node) for child in process.children(True)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    import ray
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        # Else Ray takes the machine's own address, and listens on all interfaces.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        for name, value in {**session._ENVIRONMENT, **HEARTBEATS}.items():
            patch.setenv(name, value)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Its actor asks the dashboard, and waits half a minute for one that is not there.
        patch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Nodes()
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.remove_all()
            cluster.shutdown()
            gc.collect()  # here, where Ray's warnings are expected


class Run:
    """A run of counting ranks, supervised in a thread as the command does it."""

    def __init__(self, run_dir: Path, workers: int | tuple[int, int]) -> None:
        self.run_dir, self._workers = run_dir, workers
        failures_path(run_dir).parent.mkdir(parents=True)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        from cluster.recovery import Judge, supervise

        try:
            supervise(self._trainer, Judge(self.run_dir, 3))
        except BaseException as error:
            self.error = error

    def _trainer(self) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.backend import BackendConfig

        from cluster.recovery import Trainer

        return Trainer(
            count_steps,
            train_loop_config={"run_dir": str(self.run_dir)},
            backend_config=BackendConfig(),
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                resources_per_worker={"CPU": 1},
                elastic_resize_monitor_interval_s=1.0,
            ),
            run_config=RunConfig(name="counting", storage_path=str(self.run_dir / ".ray")),
            run_dir=self.run_dir,
            recovery=RecoveryConfig(),
        )

    def rows(self) -> list[dict[str, Any]]:
        """What rank 0 has logged."""
        return _read(self.run_dir / "rank-0.jsonl")

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first of rank 0's rows from now on that meets the condition."""
        first, deadline = len(self.rows()), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for row in self.rows()[first:]:
                if condition(row):
                    return row
            assert self._thread.is_alive(), (self.error, self.notes())
            time.sleep(0.05)
        raise AssertionError(f"waited {PATIENCE_S} s in vain: {self.notes()}")

    def notes(self) -> list[dict[str, Any]]:
        """What was decided, in order."""
        return _read(failures_path(self.run_dir))

    def redone(self) -> int:
        """Steps that rank 0 has taken more than once; it must have left out none."""
        steps = [row["step"] for row in self.rows()]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
        return len(steps) - len(set(steps))

    def end(self) -> None:
        """Let the ranks end; the run must have had no error."""
        (self.run_dir / "done").touch()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.error is None


@pytest.fixture
def start(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run of so many workers; it is over at the end of the test, and so are the nodes."""
    runs: list[Run] = []

    def start_run(workers: int | tuple[int, int]) -> Run:
        runs.append(Run(tmp_path / "run", workers))
        return runs[-1]

    yield start_run
    for run in runs:
        run.end()
    nodes.remove_all()


def _read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_run_grows_and_shrinks_with_the_cluster(nodes: Nodes, start: Callable[..., Run]) -> None:
    first = nodes.add()
    run = start((1, 4))
    assert run.wait_for(lambda row: row["step"] >= 5)["world_size"] == 1

    second = nodes.add()
    run.wait_for(lambda row: row["world_size"] == 2)
    (resized,) = run.notes()
    assert (resized["from"], resized["to"], resized["planned"]) == (1, 2, True)
    assert isinstance(resized["saved_at"], int)
    assert run.redone() == 0

    nodes.kill(second)
    # It is counted out before its heartbeats are missed: the first new group is of the right size.
    after = run.wait_for(lambda row: row["world_size"] == 1)
    assert after["node"] == first.node_id
    failed, shrunk = run.notes()[1:]
    assert (failed["cause"], failed["restarts_left"]) == ("killed", 2)
    assert (shrunk["from"], shrunk["to"], shrunk["planned"]) == (2, 1, False)
    assert run.redone() <= SAVE_EVERY
    run.end()


def test_a_run_leaves_a_drained_node_and_outlives_its_controller(
    nodes: Nodes, start: Callable[..., Run]
) -> None:
    from cluster.elastic import own_placement_groups

    run = start(1)
    nodes.add()
    before = run.wait_for(lambda row: row["step"] >= 5)

    # The node is told to go: the ranks save and hand over, and the next group is elsewhere, though
    # the old node is still there.
    spare = nodes.add()
    nodes.drain(before["node"])
    moved = run.wait_for(lambda row: row["node"] != before["node"])
    assert moved["node"] == spare.node_id
    (handed_over,) = [note for note in run.notes() if note["event"] == "worker_failed"]
    assert (handed_over["cause"], handed_over["restarts_left"]) == ("preempted", 3)
    assert run.redone() == 0

    # The controller dies, its workers with it: another takes over.
    (controller,) = nodes.controllers()
    controller.kill()
    run.wait_for(lambda row: row["pid"] != moved["pid"])
    assert (run.notes()[-1]["cause"], run.notes()[-1]["restarts_left"]) == ("controller", 2)
    assert run.redone() <= SAVE_EVERY
    run.end()
    assert own_placement_groups() == []

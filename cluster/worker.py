"""What runs in each of Ray Train's workers: the supervisor of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import targets
from cluster.exporter import Target
from cluster.local_ranks import run_rank
from cluster.ranks import Place, RankServer, Task, end_with_parent
from trainer.control import HOLD_FILE

# How often a supervisor looks whether its machine is to be given back.
_NOTICE_INTERVAL_S = 0.5

# More than any machine has ranks: each occupies one of the server's threads.
_RANKS_A_MACHINE = 256


def work(task: Task) -> None:
    """Supervise one rank of the group that Ray Train has set up around this process."""
    import ray.train

    end_with_parent()
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    if task.door is not None:
        run_rank(task.door, cloudpickle.dumps(task), place, dict(os.environ))
        return
    server = rank_server(task, ray.get_runtime_context().get_node_id())
    outcome = server.run.remote(cloudpickle.dumps(task), place, dict(os.environ), os.getpid())
    while not ray.wait([outcome], timeout=_NOTICE_INTERVAL_S)[0]:
        if _preempted():
            (task.run_dir / HOLD_FILE).touch()
    try:
        ray.get(outcome)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as the rank raised it


def rank_server(task: Task, node_id: str) -> Any:
    """The machine's server of the run; started by whoever asks first, and ends with that one.

    The driver asks first for the machines that are there, the controller for those that come.
    """
    metrics = Target.of(task.config, task.run_dir.name, task.commanded_at)
    return (
        ray.remote(_RankServer)
        .options(
            name=f"babelray-ranks-{task.run_dir.name}-{node_id}",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=_RANKS_A_MACHINE,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(warm=task.config.recovery.standby, metrics=metrics)
    )


def prepare(task: Task, node_id: str) -> Callable[[], bool]:
    """Start a machine's server and keep it; the result tells whether it can start ranks quickly."""
    if task.door is not None:
        return lambda: True
    server = rank_server(task, node_id)
    ready = server.ready.remote()

    def is_ready(server: Any = server) -> bool:
        return bool(ray.wait([ready], timeout=0)[0])

    return is_ready


class _RankServer(RankServer):
    """As an actor."""

    def __init__(self, *, warm: bool, metrics: Target | None) -> None:
        end_with_parent()
        super().__init__(warm=warm, metrics=metrics)

    def __ray_shutdown__(self) -> None:
        """Ray's hook: the run has left this machine, and nobody holds the actor any more."""
        self.close()


def _preempted() -> bool:
    """Whether Ray has told that a machine of the group is to be taken away.

    ``ray.train.get_preemption_info`` tells the same, but waits for all ranks.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


class ServersCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Starts rank servers on machines that are new to the run; runs in the controller."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._servers: dict[str, Any] = {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller's own process; called once."""
        from cluster.ray_train import leave_out_barrier  # which workers need not import

        leave_out_barrier()
        if self._task.door is None:
            end_with_parent()

    def after_worker_group_start(self, worker_group: Any) -> None:
        """A server on every machine of the group."""
        nodes = {worker.metadata.node_id for worker in worker_group.get_workers()}
        if self._task.door is None:
            # Those of machines that are gone go too; those kept stay alive through their handles.
            # Asked for each time, so that one that has died is replaced.
            self._servers = {node: rank_server(self._task, node) for node in nodes}
        trainer = self._task.config.trainer
        if trainer.metrics_port:
            targets.write(
                self._task.run_dir,
                [worker.metadata.node_ip for worker in worker_group.get_workers()],
                host=trainer.metrics_host,
                port=trainer.metrics_port,
            )


class _Rendezvous(Backend):  # type: ignore[misc]
    """Tells the ranks where to meet. They join torch.distributed themselves."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        worker_group.execute(_set_environment, environment)


@dataclass
class RendezvousConfig(BackendConfig):  # type: ignore[misc]
    """Ray's own ``TorchConfig`` would import torch into supervisors and controller."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Ray Train's hook."""
        return _Rendezvous


def _set_environment(values: dict[str, str]) -> None:
    os.environ.update(values)


def _free_address() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    address, port = get_address_and_port()
    return str(address), int(port)

"""Ray Train's part of a run, in a thread of its own."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.ranks import Task
from cluster.session import Session

if TYPE_CHECKING:
    from cluster.ray_train import LocalController

# A number of workers, or the least and the most.
Workers = int | tuple[int, int]

# How long the controller may take to let go.
_ABANDON_S = 2.0


class Fit(threading.Thread):
    """The training in a thread of its own, so that the main thread keeps the signals.

    (In the main thread Ray Train would take SIGINT for itself and kill the workers with it.)
    """

    def __init__(self, task: Task, workers: Workers, ray_session: Session) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._task, self._workers = task, workers
        self._use_gpu, self._is_local = ray_session.num_gpus > 0, ray_session.is_local
        self._page = ray_session.page
        self._control: LocalController | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train until the run ends; ``error`` has what it failed with."""
        task = self._task
        # Ray warns of what it calls itself; when imported, it puts a filter of its own before ours.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
        try:
            from cluster.recovery import Judge, supervise

            # They import while Ray Train starts its own processes, and live as long as this list.
            servers = self._rank_servers()
            supervise(self._trainer, Judge(task.run_dir, task.config.recovery.max_failures))
            del servers
        except BaseException as error:
            self.error = error

    def abandon(self) -> None:
        """Let go of the workers, if that was not done: Ray is about to end them."""
        if self._control is not None:
            self._control.abandon()
            self.join(_ABANDON_S)

    def _rank_servers(self) -> list[Any]:
        if self._task.door is not None:
            from cluster.ray_train import LocalController

            self._control = LocalController(self._page)
            return []
        import ray

        from cluster.worker import rank_server

        return [
            rank_server(self._task, node["NodeID"])
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("GPU" if self._use_gpu else "CPU")
        ]

    def _trainer(self) -> Any:
        """Ray's trainer for the run, ready to ``fit()``."""
        from ray.train import LoggingConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig

        from cluster.recovery import Trainer
        from cluster.worker import RendezvousConfig, ServersCallback, prepare, work

        task, recovery = self._task, self._task.config.recovery
        # A Ray of our own hands its environment down. Elsewhere the workers need theirs set, at the
        # price of a slower start: they cannot be taken from Ray's pool.
        environment = {"OMP_NUM_THREADS": str(task.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return Trainer(
            lambda: work(task),
            backend_config=RendezvousConfig(),
            scaling_config=ScalingConfig(
                num_workers=self._workers,
                use_gpu=self._use_gpu,
                resources_per_worker={"CPU": 1, "GPU": 1} if self._use_gpu else {"CPU": 1},
                elastic_resize_monitor_interval_s=recovery.resize_interval_s,
            ),
            run_config=RayRunConfig(
                name=task.run_dir.name,
                storage_path=str(task.run_dir / ".ray"),
                callbacks=[ServersCallback(task)],
                worker_runtime_env=None if self._is_local else {"env_vars": environment},
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
            run_dir=task.run_dir,
            recovery=recovery,
            prepare=partial(prepare, task),
            control=self._control,
        )

"""Ray Train with fewer processes: its parts that are of no use here left out or kept in this one.

Stock Ray Train starts four actors beside its workers: the controller, one that asks an autoscaler
for machines, one that keeps the state for the dashboard, one that ranks meet at to report. Each
takes one or two seconds of CPU time to start and wakes up a hundred times a second from then on
(``benchmarks/overhead.py``). A run on this machine alone needs none of them. All of this leans on
Ray's inner parts: Ray is pinned to one release (docs/decisions.md).
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.v2._internal.callbacks import state_manager as state_callbacks
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state as group_state
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2._internal.state.state_actor import get_or_create_state_actor
from ray.train.v2._internal.state.state_manager import TrainStateManager

from cluster.no_barrier import NoBarrier
from cluster.ray_page import RUNS_PATH, RayPage

# Ray's dashboard takes a controller that it does not know for one that lives.
_NO_ACTOR = "driver"


def leave_out_barrier() -> None:
    """Groups that this process starts from now on have no ``SynchronizationActor``."""
    worker_group.SynchronizationActor = NoBarrier
    group_state._shutdown_sync_actor = lambda barrier: None


class _Group(worker_group.WorkerGroup):  # type: ignore[misc]
    """Its workers know of no actor that controls them."""

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[number] for name, values in train_context_args.items()},
                )
                for number, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    """Ray Train's controller as an object of this process."""

    worker_group_cls = _Group


class LocalController:
    """Runs Ray Train's controller in the thread that calls, with its state kept for ``page``."""

    def __init__(self, page: RayPage | None) -> None:
        self._state = _State()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._run: asyncio.Task[None] | None = None
        if page is not None:
            page.attach(self._state.answer, self._state.publish)

    def __call__(self, **arguments: Any) -> Any:
        """Train until the run ends; Ray Train's result."""
        with self._state.kept_here():
            controller = _Controller(**arguments)
            asyncio.run(self._drive(controller))
            return controller.get_result()

    async def _drive(self, controller: _Controller) -> None:
        self._loop = asyncio.get_running_loop()
        self._run = asyncio.ensure_future(controller.run())
        await self._run

    def abandon(self) -> None:
        """Stop controlling, from another thread; the workers end with Ray."""
        if self._loop is not None and self._run is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._run.cancel)


class _State:
    """What Ray Train's state actor would know, until there is a dashboard to read it there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, Any] = {}
        self._attempts: dict[str, Any] = {}
        self._actor: Any = None

    @contextmanager
    def kept_here(self) -> Iterator[None]:
        """Within the block Ray Train's callback writes to this object."""
        state = self

        class Manager(TrainStateManager):  # type: ignore[misc]
            """Needs no actor."""

            def __init__(self) -> None:
                self._state_actor = None
                self._runs: dict[str, Any] = {}
                self._run_attempts: dict[str, dict[str, Any]] = defaultdict(dict)

            def create_train_run(self, **values: Any) -> None:
                """No actor controls the run."""
                super().create_train_run(**{**values, "controller_actor_id": _NO_ACTOR})

            def _create_or_update_train_run(self, run: Any, *, block: bool = False) -> None:
                state.put_run(run)

            def _create_or_update_train_run_attempt(
                self, run_attempt: Any, *, block: bool = False
            ) -> None:
                state.put_attempt(run_attempt)

        state_callbacks.TrainStateManager = Manager
        try:
            yield
        finally:
            state_callbacks.TrainStateManager = TrainStateManager

    def put_run(self, run: Any) -> None:
        """A run is new or has changed."""
        with self._lock:
            self._runs[run.id] = run
            if self._actor is not None:
                self._actor.create_or_update_train_run.remote(run)

    def put_attempt(self, attempt: Any) -> None:
        """An attempt is new or has changed."""
        with self._lock:
            self._attempts[attempt.attempt_id] = attempt
            if self._actor is not None:
                self._actor.create_or_update_train_run_attempt.remote(attempt)

    def publish(self) -> None:
        """The dashboard has started: from now on its actor knows, too."""
        with self._lock:
            self._actor = get_or_create_state_actor()
            for run in self._runs.values():
                self._actor.create_or_update_train_run.remote(run)
            for attempt in self._attempts.values():
                self._actor.create_or_update_train_run_attempt.remote(attempt)

    def answer(self, path: str) -> bytes | None:
        """See ``cluster.ray_page.Answer``."""
        if path != RUNS_PATH:
            return None
        with self._lock:
            runs = [
                {
                    **json.loads(run.json()),
                    "attempts": [
                        json.loads(attempt.json())
                        for attempt in self._attempts.values()
                        if attempt.run_id == run.id
                    ],
                }
                for run in reversed(self._runs.values())
            ]
        return json.dumps({"train_runs": runs}).encode()

"""What a run does when something fails: the one place that decides whether and how it goes on.

Three layers notice failures. Ray Train's controller sees its workers and asks ``RunFailurePolicy``;
it sees the cluster through ``cluster.elastic``; and the command itself sees when the controller is
gone, and ``supervise`` starts another. All of them ask a ``Judge``, whose decisions are one JSON
line each in the run's ``logs/failures.jsonl``.

The policies are subclasses of Ray Train's internal ones: Ray is pinned to one release
(docs/decisions.md says why this is worth it).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import PreemptionError

from cluster.elastic import LiveElasticPolicy, Prepare, ResizeCallback, own_placement_groups
from cluster.failures import (
    RankDiedError,
    StopRequested,
    hopeless,
    is_broken_connection,
    note,
    summarize,
)
from cluster.progress import Tail
from trainer.config import RecoveryConfig
from trainer.control import Handover
from trainer.watchdog import EXIT_HUNG

logger = logging.getLogger(__name__)

Cause = Literal["killed", "hung", "exception", "preempted", "start", "controller"]

_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Diagnosis:
    """What happened, and whether it counts against the restarts of the run."""

    cause: Cause
    message: str
    ranks: tuple[int, ...] = ()
    charged: bool = True
    final: bool = False


def diagnose(error: BaseException) -> Diagnosis:
    """Tell the failures apart that Ray Train's controller meets.

    Args:
        error: one of Ray's ``TrainingFailedError``s.
    """
    if isinstance(error, PreemptionError):
        ranks = tuple(error.preemption_info.preempted_ranks)
        text = f"the machine of rank {_listed(ranks)} was taken away"
        late = ", before a checkpoint was saved" if error.drain_timed_out else ""
        return Diagnosis("preempted", text + late, ranks, charged=False)
    if isinstance(error, WorkerGroupError):
        return _diagnose_group(error.worker_failures)
    failure = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(failure, WorkerGroupStartupTimeoutError):
        text = f"no room for {failure.num_workers} workers, though there seemed to be"
        return Diagnosis("start", text, charged=False)
    message = summarize({0: failure}).removeprefix("rank 0: ")
    final = hopeless([failure]) is not None or isinstance(
        failure, InsufficientClusterResourcesError | StopRequested
    )
    started = not isinstance(failure, WorkerGroupStartupFailedError)
    return Diagnosis("controller" if started else "start", message, final=final)


def _diagnose_group(failures: dict[int, BaseException]) -> Diagnosis:
    ranks = tuple(sorted(failures))
    errors = [failures[rank] for rank in ranks]
    message = summarize(failures)
    if hopeless(errors) is not None:
        return Diagnosis("exception", message, ranks, final=True)
    handover = next((error for error in errors if isinstance(error, Handover)), None)
    if handover is not None:  # whatever else was met came after the checkpoint
        return Diagnosis("preempted", str(handover), ranks, charged=False)
    preempted = tuple(rank for rank in ranks if _is_preempted_actor(failures[rank]))
    if preempted:
        text = f"the machine of rank {_listed(preempted)} was taken away"
        return Diagnosis("preempted", text, preempted, charged=False)
    hung = tuple(rank for rank in ranks if _has_hung(failures[rank]))
    if hung:
        text = (
            f"rank {_listed(hung)} waited in vain, for itself or for another rank; its stacks are "
            "in its log"
        )
        return Diagnosis("hung", text, hung)
    is_dead = any(isinstance(error, RankDiedError | RayActorError) for error in map(_inner, errors))
    is_killed = is_dead or all(is_broken_connection(error) for error in errors)
    return Diagnosis("killed" if is_killed else "exception", message, ranks)


def _inner(error: BaseException) -> BaseException:
    """What Ray Train's health check met, where that is what ``error`` tells."""
    return getattr(error, "health_check_failure", error)


def _has_hung(error: BaseException) -> bool:
    return isinstance(error, WorkerHealthCheckTimeoutError) or (
        isinstance(error, RankDiedError) and error.exit_code == EXIT_HUNG
    )


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(str(rank) for rank in ranks)


class Judge:
    """Decides after each failure whether the run goes on, notes it, and paces the restarts.

    ``max_failures`` failures in a row are borne; a checkpoint that was committed since the last one
    begins the count anew, so that a long run does not use its restarts up.

    Args:
        run_dir: the run's folder.
        max_failures: see ``RecoveryConfig``.
        pause: waits so many seconds.
    """

    def __init__(
        self, run_dir: Path, max_failures: int, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._run_dir, self._max_failures, self._pause = run_dir, max_failures, pause
        self._failures = 0
        # The run's own log tells of each commit. Asking the storage would take an import of torch
        # here, and may take long just when something is wrong.
        self._events = Tail(run_dir / "events.jsonl")

    def goes_on(self, diagnosis: Diagnosis) -> bool:
        """Whether to start again after this; returns when it is time to."""
        pause_s = 0.0
        if diagnosis.charged and not diagnosis.final:
            self._charge()
            # The first restart is at once; a failure that comes again may need time to pass.
            pause_s = min(2.0 ** (self._failures - 2), _LONGEST_PAUSE_S) * (self._failures > 1)
        left = self._max_failures - self._failures
        final = diagnosis.final or (diagnosis.charged and left < 0)
        note(
            self._run_dir,
            "worker_failed",
            cause=diagnosis.cause,
            ranks=list(diagnosis.ranks),
            message=diagnosis.message,
            restarts_left=max(0, left),
            final=final,
        )
        if not final and pause_s:
            self._pause(pause_s)
        return not final

    def _charge(self) -> None:
        try:
            kinds = {event.get("event") for event in self._events.read()}
        except OSError:
            logger.warning("the run's events cannot be read", exc_info=True)
            kinds = set()
        self._failures = 1 if "checkpoint" in kinds else self._failures + 1


class RunFailurePolicy(FailurePolicy):  # type: ignore[misc]
    """Asks the judge after each failure that Ray Train's controller meets; runs in its process."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(FailureConfig())
        self._judge = judge

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Ray Train's hook: ``RETRY`` starts another group, ``RAISE`` ends the run."""
        if isinstance(getattr(training_failed_error, "controller_failure", None), StopRequested):
            return FailureDecision.RAISE  # no failure
        goes_on = self._judge.goes_on(diagnose(training_failed_error))
        return FailureDecision.RETRY if goes_on else FailureDecision.RAISE


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer with the policies of this package.

    Args:
        run_dir: the run's folder.
        recovery: how much is borne.
        prepare: see ``LiveElasticPolicy``.
        control: runs Ray Train's controller; by default it is an actor.
        *arguments, **named: of ``DataParallelTrainer``.
    """

    def __init__(
        self,
        *arguments: Any,
        run_dir: Path,
        recovery: RecoveryConfig,
        prepare: Prepare | None = None,
        control: Callable[..., Any] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._run_dir, self._recovery, self._prepare = run_dir, recovery, prepare
        self._control = control

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        run_dir, recovery = self._run_dir, self._recovery
        arguments["scaling_policy"] = LiveElasticPolicy(
            self.scaling_config,
            run_dir,
            prepare=self._prepare,
            asks_autoscaler=self._control is None,
        )
        arguments["failure_policy"] = RunFailurePolicy(Judge(run_dir, recovery.max_failures))
        # First, because it clears up after a start that failed in one of the others.
        arguments["callbacks"] = [
            ResizeCallback(run_dir, recovery.grace_s),
            *(callback for callback in arguments["callbacks"] if not _is_superfluous(callback)),
        ]
        if self._control is not None:
            return self._control(**arguments)
        return super()._initialize_and_run_controller(**arguments)


def _is_superfluous(callback: Any) -> bool:
    """What costs a process and is of no use here.

    Ray Train's watcher of the controller does ``supervise``'s work a second later, and is waited
    for at the end of every run; its manager of Ray Data's datasets starts anew with each group.
    """
    return isinstance(callback, PlacementGroupCleanerCallback | DatasetsCallback)


def supervise(build: Callable[[], Trainer], judge: Judge) -> None:
    """Train until the run ends, with a new controller whenever one is lost.

    Args:
        build: makes the trainer, anew for each controller.
        judge: counts the controllers that were lost.

    Raises:
        ray.train.TrainingFailedError: the run failed.
        ray.exceptions.RayActorError: controllers were lost too often.
    """
    while True:
        trainer = build()
        try:
            trainer.fit()
        except RayActorError:
            text = "the process of Ray Train's controller ended unexpectedly"
            if not judge.goes_on(Diagnosis("controller", text)):
                raise
            # Its workers end with it. What they stood on would be in the next one's way.
            for group in own_placement_groups():
                ray.util.remove_placement_group(group)
        else:
            return

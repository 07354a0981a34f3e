"""Which failures end a run, which are charged, and when the restarts are used up."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from cluster import recovery
from cluster.failures import RankDiedError, StopRequested, failures_path
from cluster.recovery import Diagnosis, Judge, RunFailurePolicy, diagnose, supervise
from data_shards.errors import DataError
from trainer.control import Handover
from trainer.watchdog import EXIT_HUNG

DEAD = WorkerHealthCheckFailedError("Worker died", ActorDiedError())
CLOSED = RuntimeError("Connection closed by peer")
DATA = DataError("shards/train-000000.tar is cut short: prepare it again")
HANDOVER = Handover("saved at step 7")
TAKEN = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [2, 3]})


def group(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("text", {int(rank[1:]): error for rank, error in failures.items()})


def preempted() -> Exception:
    error = ActorDiedError()
    error._preempted = True
    return WorkerHealthCheckFailedError("Worker died", error)


@pytest.mark.parametrize(
    ("error", "cause", "ranks", "charged", "final"),
    [
        (group(r1=DEAD), "killed", (1,), True, False),
        (group(r1=RankDiedError(1, 99, -9), r0=CLOSED), "killed", (0, 1), True, False),
        (group(r1=RankDiedError(1, 99, EXIT_HUNG), r0=CLOSED), "hung", (1,), True, False),
        (group(r0=WorkerHealthCheckTimeoutError("silent")), "hung", (0,), True, False),
        # The dead one's own end is noticed later.
        (group(r0=CLOSED), "killed", (0,), True, False),
        (group(r0=CLOSED, r1=OSError("disk")), "exception", (0, 1), True, False),
        (group(r0=OSError("disk")), "exception", (0,), True, False),
        (group(r0=CLOSED, r1=DATA), "exception", (0, 1), True, True),
        (group(r0=KeyError("x")), "exception", (0,), True, True),
        (group(r0=HANDOVER, r1=HANDOVER), "preempted", (0, 1), False, False),
        (group(r0=HANDOVER, r1=DEAD), "preempted", (0, 1), False, False),
        (group(r0=CLOSED, r1=preempted()), "preempted", (1,), False, False),
        (PreemptionError(TAKEN), "preempted", (2, 3), False, False),
        (ControllerError(WorkerGroupStartupTimeoutError(4)), "start", (), False, False),
        (ControllerError(WorkerGroupStartupFailedError("x")), "start", (), True, False),
        (ControllerError(InsufficientClusterResourcesError("x")), "controller", (), True, True),
        (ControllerError(OSError("no route")), "controller", (), True, False),
        (ControllerError(AttributeError("x")), "controller", (), True, True),
        (ControllerError(RayTaskError("f", "", CLOSED)), "controller", (), True, False),
    ],
    ids=lambda value: str(value)[:60].replace("\n", " "),
)
def test_failures_are_told_apart(
    error: Exception, cause: str, ranks: tuple[int, ...], charged: bool, final: bool
) -> None:
    found = diagnose(error)
    assert (found.cause, found.ranks, found.final) == (cause, ranks, final)
    assert final or found.charged == charged
    assert found.message
    assert "\n" not in found.message


def test_messages_say_what_a_person_needs() -> None:
    assert diagnose(group(r0=HANDOVER, r1=DEAD)).message == "saved at step 7"
    assert diagnose(group(r0=CLOSED, r1=DATA)).message == f"rank 1: {DATA}"
    assert "rank 2, 3 was taken" in diagnose(PreemptionError(TAKEN)).message
    assert "before a checkpoint" in diagnose(PreemptionError(TAKEN, drain_timed_out=True)).message
    assert "4 workers" in diagnose(ControllerError(WorkerGroupStartupTimeoutError(4))).message


class Run:
    """A run's folder, and a judge whose pauses are only written down."""

    def __init__(self, folder: Path, max_failures: int) -> None:
        self.folder = folder
        failures_path(folder).parent.mkdir(exist_ok=True)
        self.pauses: list[float] = []
        self.judge = Judge(folder, max_failures, pause=self.pauses.append)
        self.policy = RunFailurePolicy(self.judge)

    def fails(self, error: Exception) -> FailureDecision:
        return self.policy.make_decision(error)

    def saves(self, step: int) -> None:
        with (self.folder / "events.jsonl").open("a") as events:
            events.write(json.dumps({"event": "step", "step": step}) + "\n")
            events.write(json.dumps({"event": "checkpoint", "step": step}) + "\n")

    @property
    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in failures_path(self.folder).read_text().splitlines()]


RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def test_restarts_without_progress_are_used_up(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    assert [run.fails(group(r0=DEAD)) for _ in range(4)] == [RETRY, RETRY, RETRY, RAISE]
    assert [note["restarts_left"] for note in run.notes] == [2, 1, 0, 0]
    assert [note["final"] for note in run.notes] == [False, False, False, True]
    assert {(note["event"], note["cause"]) for note in run.notes} == {("worker_failed", "killed")}
    assert run.pauses == [1.0, 2.0]  # the first is at once, and there is none before giving up


def test_a_run_may_bear_no_failure(tmp_path: Path) -> None:
    assert Run(tmp_path, 0).fails(group(r0=DEAD)) is RAISE


def test_a_checkpoint_refills_the_restarts(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    for step in range(10):
        assert run.fails(group(r0=DEAD)) is RETRY
        run.saves(step)
    assert [note["restarts_left"] for note in run.notes] == [1] * 10
    assert run.pauses == []
    # Those that were saved before the last failure do not count again.
    assert [run.fails(group(r0=DEAD)) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_steps_alone_are_no_progress(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.fails(group(r0=DEAD))
    (tmp_path / "events.jsonl").write_text('{"event": "step", "step": 9}\nnot json\n[1]\n{"a": 1}')
    assert run.fails(group(r0=DEAD)) is RAISE


def test_checkpoints_of_before_the_start_are_no_progress(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "checkpoint", "step": 9}\n')
    run = Run(tmp_path, 1)
    assert [run.fails(group(r0=DEAD)) for _ in range(2)] == [RETRY, RAISE]


def test_events_that_cannot_be_read_are_no_progress(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    (tmp_path / "events.jsonl").mkdir()
    assert [run.fails(group(r0=DEAD)) for _ in range(2)] == [RETRY, RAISE]


def test_what_is_nobodys_fault_is_not_charged(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    no_room = ControllerError(WorkerGroupStartupTimeoutError(4))
    for error in (group(r0=HANDOVER), PreemptionError(TAKEN), no_room, group(r0=preempted())) * 3:
        assert run.fails(error) is RETRY
    assert {note["restarts_left"] for note in run.notes} == {1}
    assert run.pauses == []
    assert [run.fails(group(r0=DEAD)) for _ in range(2)] == [RETRY, RAISE]


def test_what_would_come_again_ends_the_run_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    assert run.fails(group(r0=CLOSED, r1=DATA)) is RAISE
    (note,) = run.notes
    assert note["final"] is True
    assert note["message"] == f"rank 1: {DATA}"


def test_a_stop_while_nothing_runs_is_no_failure(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    assert run.fails(ControllerError(StopRequested())) is RAISE
    assert not failures_path(tmp_path).exists()


def test_pauses_grow_to_a_limit(tmp_path: Path) -> None:
    run = Run(tmp_path, 9)
    for _ in range(9):
        run.fails(group(r0=DEAD))
    assert run.pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_policy_can_be_sent_to_the_controller(tmp_path: Path) -> None:
    policy = pickle.loads(pickle.dumps(RunFailurePolicy(Judge(tmp_path, 1))))
    failures_path(tmp_path).parent.mkdir()
    assert policy.make_decision(group(r0=DEAD)) is RETRY
    assert policy.make_decision(group(r0=CLOSED, r1=DATA)) is RAISE


class Controllers:
    """Stands in for trainers: each ``fit()`` meets the next of ``errors``."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)

    def __call__(self) -> Any:
        return self

    def fit(self) -> None:
        error = self.errors.pop(0)
        if error is not None:
            raise error


def test_a_lost_controller_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(recovery, "own_placement_groups", lambda: ["left behind"])
    monkeypatch.setattr("ray.util.remove_placement_group", removed.append)
    run = Run(tmp_path, 2)
    controllers = Controllers(ActorDiedError(), ActorDiedError(), None)
    supervise(controllers, run.judge)
    assert controllers.errors == []
    assert removed == ["left behind"] * 2
    assert [(note["cause"], note["restarts_left"]) for note in run.notes] == [
        ("controller", 1),
        ("controller", 0),
    ]


def test_controllers_that_are_lost_again_and_again_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "own_placement_groups", list)
    with pytest.raises(ActorDiedError):
        supervise(Controllers(*[ActorDiedError()] * 3), Run(tmp_path, 2).judge)


def test_a_run_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    controllers = Controllers(group(r0=DATA), None)
    with pytest.raises(WorkerGroupError):
        supervise(controllers, Run(tmp_path, 2).judge)
    assert controllers.errors == [None]


def test_a_diagnosis_that_is_final_is_not_charged(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    assert not run.judge.goes_on(Diagnosis("controller", "text", final=True))
    assert run.judge.goes_on(Diagnosis("controller", "text"))

"""Which nodes count, how many workers they have room for, and what a planned resize waits for."""

from __future__ import annotations

import json
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    SchedulingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
)

from cluster import elastic
from cluster.elastic import LiveElasticPolicy, Prepare, ResizeCallback, View, view
from cluster.failures import StopRequested, failures_path
from trainer.config import STOP_FILE
from trainer.control import HELD_FILE, HOLD_FILE


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    failures_path(tmp_path).parent.mkdir()
    return tmp_path


def notes(run_dir: Path) -> list[dict[str, Any]]:
    file = failures_path(run_dir)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def node(name: str, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive}


def test_only_nodes_that_are_alive_and_stay_count() -> None:
    seen = view(
        [node("a"), node("dead", alive=False), node("leaving"), node("silent"), node("b")],
        draining=["leaving", "dead"],
        silent=["silent"],
        available={
            name: {"CPU": 2.0, "GPU": 1.0} for name in ("a", "dead", "leaving", "silent", "b")
        },
        held=[],
    )
    assert seen.free == {"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0, "GPU": 1.0}}
    # Ray itself places nothing on nodes that it knows to be dead.
    assert seen.excluded == ("leaving", "silent")


def test_what_the_runs_own_groups_hold_is_theirs_to_have() -> None:
    seen = view(
        [node("a"), node("b")],
        draining=[],
        silent=[],
        available={"a": {"CPU": 1.0}, "b": {}},
        held=[("a", {"CPU": 1.0}), ("b", {"CPU": 1.0, "GPU": 1.0}), ("lost", {"CPU": 1.0})],
    )
    assert seen.free == {"a": {"CPU": 2.0}, "b": {"CPU": 1.0, "GPU": 1.0}}


def test_a_node_that_does_not_answer_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_door, socket.socket() as closed_door:
        closed_door.bind(("127.0.0.1", 0))  # bound, but not listening: refused
        nodes = [
            {
                "NodeID": name,
                "Alive": name != "dead",
                "NodeManagerAddress": "127.0.0.1",
                "NodeManagerPort": door.getsockname()[1],
            }
            for name, door in [("a", open_door), ("b", closed_door), ("dead", closed_door)]
        ]
        assert elastic._silent(nodes) == ["b"]


class Cluster:
    """A cluster that shows one of ``views`` at each look, then the last again and again."""

    def __init__(self, *rooms: int | Exception) -> None:
        self.rooms = list(rooms)
        self.excluded: tuple[str, ...] = ()
        self.knocks: list[bool] = []

    def look(self, *, knock: bool) -> View:
        self.knocks.append(knock)
        room = self.rooms.pop(0) if len(self.rooms) > 1 else self.rooms[0]
        if isinstance(room, Exception):
            raise room
        return View({f"node-{index}": {"CPU": 1.0} for index in range(room)}, self.excluded)


class Coordinator:
    def maybe_send_resource_request(self, scaling_config: Any, num_workers: int) -> None:
        pass


def policy(
    run_dir: Path,
    workers: int | tuple[int, int],
    cluster: Cluster,
    prepare: Prepare | None = None,
) -> LiveElasticPolicy:
    config = ScalingConfig(
        num_workers=workers, resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0
    )
    made = LiveElasticPolicy(
        config, run_dir, prepare=prepare, look=cluster.look, pause=lambda seconds: None
    )
    made._coordinator_client = Coordinator()
    return made


def starts(made: LiveElasticPolicy) -> int | None:
    decision = made.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision | NoopDecision)
    return getattr(decision, "num_workers", None)


def resizes(made: LiveElasticPolicy, running: int) -> int | None:
    state = SimpleNamespace(start_time=float("-inf"), num_workers=running)
    decision = made.make_decision_for_running_worker_group(state, None)
    assert isinstance(decision, ResizeDecision | NoopDecision)
    return getattr(decision, "num_workers", None)


@pytest.mark.parametrize(
    ("workers", "room", "expected"),
    [
        ((1, 4), 1, 1), ((1, 4), 3, 3), ((1, 4), 9, 4), ((2, 4), 1, None), ((2, 4), 0, None),
        (2, 1, None), (2, 2, 2), (2, 5, 2),
    ],
)  # fmt: skip
def test_a_group_starts_as_large_as_there_is_room(
    run_dir: Path, workers: int | tuple[int, int], room: int, expected: int | None
) -> None:
    cluster = Cluster(room)
    assert starts(policy(run_dir, workers, cluster)) == expected
    assert set(cluster.knocks) == {True}


def test_a_start_waits_until_two_looks_agree(run_dir: Path) -> None:
    # What a group that just ended held is given back with a delay.
    assert starts(policy(run_dir, (1, 4), Cluster(1, 2, 3, 3))) == 3
    assert starts(policy(run_dir, (1, 4), Cluster(1, 4))) == 4


def test_a_running_group_is_resized_when_two_looks_agree(run_dir: Path) -> None:
    cluster = Cluster(3)
    assert resizes(policy(run_dir, (1, 4), cluster), running=2) == 3
    assert set(cluster.knocks) == {False}
    assert resizes(policy(run_dir, (1, 4), Cluster(1)), running=2) == 1
    assert resizes(policy(run_dir, (1, 4), Cluster(3, 2)), running=2) is None
    assert resizes(policy(run_dir, (1, 4), Cluster(2)), running=2) is None
    assert resizes(policy(run_dir, (2, 4), Cluster(1)), running=2) is None  # below the least
    assert resizes(policy(run_dir, 2, Cluster(5)), running=2) is None


def test_a_group_grows_when_the_nodes_are_ready_for_it(run_dir: Path) -> None:
    asked: list[str] = []
    ready: set[str] = set()

    def prepare(node: str) -> Callable[[], bool]:
        asked.append(node)
        return lambda: node in ready

    cluster = Cluster(3)
    made = policy(run_dir, (1, 2), cluster, prepare=prepare)
    assert resizes(made, running=1) is None
    assert resizes(made, running=1) is None
    assert asked == ["node-0", "node-1"]  # once, and no more than there can be workers
    ready.update(asked)
    assert resizes(made, running=1) == 2
    # A group that has to shrink waits for nothing.
    cluster.rooms = [1]
    ready.clear()
    assert resizes(made, running=2) == 1
    assert starts(made) == 1


def test_a_cluster_that_cannot_be_seen_changes_nothing(run_dir: Path) -> None:
    away = OSError("the head is away")
    assert resizes(policy(run_dir, (1, 4), Cluster(away)), running=2) is None
    assert starts(policy(run_dir, (1, 4), Cluster(away))) is None
    assert starts(policy(run_dir, (1, 4), Cluster(away, 2, 2))) == 2


def test_waiting_is_told_once_for_each_change(run_dir: Path) -> None:
    cluster = Cluster(1)
    made = policy(run_dir, 3, cluster)
    assert [starts(made) for _ in range(3)] == [None] * 3
    cluster.rooms = [2]
    assert starts(made) is None
    assert [(note["event"], note["room"], note["needed"]) for note in notes(run_dir)] == [
        ("waiting", 1, 3),
        ("waiting", 2, 3),
    ]
    cluster.rooms = [3]
    assert starts(made) == 3
    cluster.rooms = [2]
    assert starts(made) is None
    assert len(notes(run_dir)) == 3


def test_workers_keep_off_the_nodes_that_do_not_count(run_dir: Path) -> None:
    cluster = Cluster(2)
    made = policy(run_dir, (1, 4), cluster)
    starts(made)
    assert made.on_controller_start_worker_group(scaling_config=None, num_workers=2) is None
    cluster.excluded = ("aa", "bb")
    starts(made)
    assert made.on_controller_start_worker_group(scaling_config=None, num_workers=2) == {
        "ray.io/node-id": "!in(aa,bb)"
    }


def test_a_stop_ends_the_wait(run_dir: Path) -> None:
    made = policy(run_dir, 3, Cluster(0))
    assert starts(made) is None
    (run_dir / STOP_FILE).touch()
    with pytest.raises(StopRequested):
        starts(made)


def test_the_next_controller_takes_over_what_this_one_asked_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveElasticPolicy, "_send_resource_request", lambda self: None)
    made = policy(run_dir, 3, Cluster(0))
    made.after_controller_start(SimpleNamespace(run_id="of this controller"))
    assert made._requester_id == f"train-{run_dir}"


def test_the_policy_can_be_sent_to_the_controller(run_dir: Path) -> None:
    config = ScalingConfig(num_workers=(1, 3))
    made = pickle.loads(pickle.dumps(LiveElasticPolicy(config, run_dir)))
    assert isinstance(made, LiveElasticPolicy)
    assert not isinstance(made, FixedScalingPolicy)


class Group:
    """A worker group whose ranks answer the request to save after ``answers_after`` polls."""

    def __init__(
        self, run_dir: Path, *, size: int, answers_after: int | None, fails_after: int | None = None
    ) -> None:
        self.run_dir, self.size = run_dir, size
        self.answers_after, self.fails_after = answers_after, fails_after
        self.polls = 0
        self.was_aborted = False

    def get_workers(self) -> list[object]:
        return [object()] * self.size

    def poll_status(self, timeout: float) -> Any:
        assert (self.run_dir / HOLD_FILE).exists()
        self.polls += 1
        if self.polls == self.answers_after:
            (self.run_dir / HELD_FILE).write_text('{"step": 70}')
        return SimpleNamespace(errors={}, finished=self.polls == self.fails_after)

    def abort(self) -> None:
        self.was_aborted = True


def resize(made: ResizeCallback, group: Group, to: int, *, planned: bool = True) -> None:
    """What Ray Train's controller does, step by step."""
    made.after_controller_start(None)
    schedule(made, InitializingState(), group.size)
    made.before_worker_group_start(None)
    made.after_worker_group_start(group)
    decision = ResizeDecision(num_workers=to, resources_per_worker={})
    schedule(made, ResizingState(decision) if planned else RestartingState(OSError()), to)
    made.after_worker_group_shutdown(None)


def schedule(made: ResizeCallback, before: TrainControllerState, workers: int) -> None:
    decision = ResizeDecision(num_workers=workers, resources_per_worker={})
    made.after_controller_state_update(before, SchedulingState(decision))
    made.before_controller_execute_resize_decision(decision)


def requests(run_dir: Path) -> list[str]:
    return [name for name in (HOLD_FILE, HELD_FILE) if (run_dir / name).exists()]


def test_ranks_save_before_a_planned_resize(run_dir: Path) -> None:
    group = Group(run_dir, size=1, answers_after=2)
    resize(ResizeCallback(run_dir, 30.0), group, to=2)
    (note,) = notes(run_dir)
    assert note.items() >= {
        "event": "resized", "from": 1, "to": 2, "planned": True, "saved_at": 70,
    }.items()  # fmt: skip
    assert requests(run_dir) == []
    assert group.polls == 2


def test_a_resize_goes_on_without_a_checkpoint_when_it_takes_too_long(run_dir: Path) -> None:
    began = time.monotonic()
    resize(ResizeCallback(run_dir, 0.3), Group(run_dir, size=1, answers_after=None), to=2)
    assert 0.3 <= time.monotonic() - began < 5
    assert notes(run_dir)[0]["saved_at"] is None
    assert requests(run_dir) == []


def test_a_group_that_ends_while_it_saves_is_not_waited_for(run_dir: Path) -> None:
    began = time.monotonic()
    group = Group(run_dir, size=1, answers_after=None, fails_after=2)
    resize(ResizeCallback(run_dir, 30.0), group, to=2)
    assert time.monotonic() - began < 5
    # Ranks that have answered end, too.
    group = Group(run_dir, size=2, answers_after=1, fails_after=1)
    resize(ResizeCallback(run_dir, 30.0), group, to=1)
    assert [note["saved_at"] for note in notes(run_dir)] == [None, 70]


def test_a_restart_after_a_failure_asks_nobody(run_dir: Path) -> None:
    group = Group(run_dir, size=3, answers_after=1)
    resize(ResizeCallback(run_dir, 30.0), group, to=2, planned=False)
    assert group.polls == 0
    (note,) = notes(run_dir)
    assert (note["from"], note["to"], note["planned"]) == (3, 2, False)


def test_a_start_that_is_tried_again_is_noted_once(run_dir: Path) -> None:
    made = ResizeCallback(run_dir, 30.0)
    resize(made, Group(run_dir, size=3, answers_after=1), to=2, planned=False)
    for workers in (2, 2, 1):
        schedule(made, ReschedulingState(OSError()), workers)
    assert [(note["from"], note["to"]) for note in notes(run_dir)] == [(3, 2), (2, 1)]


def test_a_restart_at_the_same_size_is_no_resize(run_dir: Path) -> None:
    group = Group(run_dir, size=2, answers_after=1)
    resize(ResizeCallback(run_dir, 30.0), group, to=2, planned=False)
    assert notes(run_dir) == []


def test_requests_that_a_lost_controller_left_are_removed(run_dir: Path) -> None:
    (run_dir / HOLD_FILE).touch()
    (run_dir / HELD_FILE).touch()
    ResizeCallback(run_dir, 30.0).after_controller_start(None)
    assert requests(run_dir) == []


def test_a_group_that_failed_half_way_gives_back_what_it_holds(run_dir: Path) -> None:
    made = ResizeCallback(run_dir, 30.0)
    first, second = (Group(run_dir, size=1, answers_after=None) for _ in range(2))
    for group in (first, second):
        made.before_worker_group_start(None)
        made.after_worker_group_start(group)
    assert first.was_aborted
    assert not second.was_aborted


def test_the_door_is_knocked_at_for_a_second_at_most() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address: tuple[str, int] = full.getsockname()
        blocked = [_connect(address) for _ in range(3)]
        began = time.monotonic()
        assert not elastic._answers(address)
        assert time.monotonic() - began < 3
        for knock in blocked:
            knock()


def _connect(address: tuple[str, int]) -> Callable[[], None]:
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex(address)
    return connection.close

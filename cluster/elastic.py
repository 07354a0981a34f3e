"""How many workers the cluster has room for now, and changing their number without losing a step.

Ray Train's own elastic policy counts what the cluster's ``AutoscalingCoordinator`` has reserved,
which may be 20 s old, holds nodes that are about to go, and keeps what a controller that died had
reserved for minutes. ``LiveElasticPolicy`` asks the cluster itself, knocks at each node's door
before it starts a group (a node that was lost counts as alive until its heartbeats are missed), and
keeps the group off the nodes that do not count. ``ResizeCallback`` has the ranks save a checkpoint
first when a group that is well is to be resized.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
)
from ray.util.placement_group import PlacementGroup

from cluster.failures import StopRequested, note
from trainer.config import STOP_FILE
from trainer.control import HELD_FILE, HOLD_FILE

logger = logging.getLogger(__name__)

# By node, then by resource.
Resources = dict[str, dict[str, float]]

Prepare = Callable[[str], Callable[[], bool]]

# How long the cluster's view of what is free may be behind what has been given back (0.1 s was
# measured); two looks as far apart must agree before a group is made smaller or larger.
_SETTLE_S = 0.3
_MAX_LOOKS = 5

_KNOCK_S = 1.0
_KNOCKS_AT_ONCE = 32


@dataclass(frozen=True)
class View:
    """The cluster as one run may use it.

    Args:
        free: what a group could have on each node: what is free, and what this run's groups hold.
        excluded: nodes that Ray may still place workers on, and must not.
    """

    free: Resources
    excluded: tuple[str, ...]


def view(
    nodes: Iterable[Mapping[str, Any]],
    *,
    draining: Iterable[str],
    silent: Iterable[str],
    available: Mapping[str, Mapping[str, float]],
    held: Iterable[tuple[str, Mapping[str, float]]],
) -> View:
    """Put together what Ray tells about a cluster.

    Args:
        nodes: as of ``ray.nodes()``.
        draining: ids of nodes that are to be given back.
        silent: ids of nodes that do not answer.
        available: what is free, by node.
        held: node and resources of each bundle that the run's own placement groups occupy.
    """
    alive = {str(node["NodeID"]) for node in nodes if node["Alive"]}
    excluded = alive & {*draining, *silent}
    free: Resources = {node: dict(available.get(node, {})) for node in sorted(alive - excluded)}
    for node, bundle in held:
        for name, amount in bundle.items():
            if node in free:
                free[node][name] = free[node].get(name, 0.0) + amount
    return View(free, tuple(sorted(excluded)))


def look(*, knock: bool) -> View:
    """The cluster now, as Ray's head knows it.

    Args:
        knock: find out, too, which nodes do not answer; takes up to a second where one does not.
    """
    nodes = ray.nodes()
    return view(
        nodes,
        draining=cluster_state.get_draining_nodes(),
        silent=_silent(nodes) if knock else (),
        available=cluster_state.available_resources_per_node(),
        held=[
            (bundle.node_id.hex(), bundle.unit_resources)
            for group in _own_groups()
            for bundle in group.bundles
            if bundle.node_id
        ],
    )


def own_placement_groups() -> list[PlacementGroup]:
    """Those that this driver's controllers have made and not removed."""
    return [
        PlacementGroup(ray.PlacementGroupID(group.placement_group_id)) for group in _own_groups()
    ]


def _own_groups() -> list[Any]:
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    accessor = cluster_state._connect_and_get_accessor()
    groups = map(PlacementGroupTableData.FromString, accessor.get_placement_group_table())
    return [
        group
        for group in groups
        if group.creator_job_id == job and group.state != PlacementGroupTableData.REMOVED
    ]


def _silent(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    doors = {
        str(node["NodeID"]): (node["NodeManagerAddress"], node["NodeManagerPort"])
        for node in nodes
        if node["Alive"]
    }
    with ThreadPoolExecutor(_KNOCKS_AT_ONCE) as pool:
        answers = pool.map(_answers, doors.values())
        return [node for node, answer in zip(doors, answers, strict=True) if not answer]


def _answers(door: tuple[str, int]) -> bool:
    try:
        socket.create_connection(door, timeout=_KNOCK_S).close()
    except OSError:
        return False
    return True


class LiveElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as there is room for now, within ``scaling_config``'s bounds.

    Serves a fixed number, too: then it waits until there is room for all, and starts them at once
    when there is. Runs in the controller's process.

    Args:
        scaling_config: ``num_workers`` is a number, or the least and the most.
        run_dir: the run's folder.
        prepare: begins to make a node ready for ranks; what it returns tells whether it is.
        asks_autoscaler: tell Ray what the run would like to have; on one machine it cannot grow.
        look: tells what the cluster has.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        run_dir: Path,
        *,
        prepare: Prepare | None = None,
        asks_autoscaler: bool = True,
        look: Callable[..., View] = look,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(scaling_config)
        self._run_dir, self._look, self._pause = run_dir, look, pause
        self._prepare, self._asks_autoscaler = prepare, asks_autoscaler
        self._prepared: dict[str, Callable[[], bool]] = {}
        self._seen = View({}, ())
        self._is_running = False
        self._told: int | None = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Ray Train's hook: a ``ResizeDecision``, or a ``NoopDecision`` to be asked again.

        Raises:
            StopRequested: the person who waits for the workers has asked to stop.
        """
        if (self._run_dir / STOP_FILE).exists():
            raise StopRequested("stopped while no workers were running")
        self._is_running = False
        decision = super().make_decision_for_non_running_worker_group()
        for _ in range(_MAX_LOOKS):
            if getattr(decision, "num_workers", 0) == self.scaling_config.max_workers:
                break
            self._pause(_SETTLE_S)
            before, decision = decision, super().make_decision_for_non_running_worker_group()
            if decision == before:
                break
        if isinstance(decision, NoopDecision):
            self._tell_waiting()
        else:
            self._told = None
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Ray Train's hook, at each poll; it looks every ``elastic_resize_monitor_interval_s``."""
        self._is_running = True
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision):
            self._pause(_SETTLE_S)
            if self._room() != decision.num_workers:
                return NoopDecision()
            if decision.num_workers > worker_group_state.num_workers and not self._is_prepared():
                self._latest_monitor_time = float("-inf")  # look again at the next poll
                return NoopDecision()
        return decision

    def on_controller_start_worker_group(
        self, *, scaling_config: Any, num_workers: int
    ) -> dict[str, str] | None:
        """Ray Train's hook: the label selector of the workers to be placed."""
        if not self._seen.excluded:
            return None
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({','.join(self._seen.excluded)})"}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train's hook: tell the cluster's autoscaler what the run would like to have.

        In the name of the run, not of the controller, so that the next one takes over what this one
        has asked for, however it ends.
        """
        if self._asks_autoscaler:
            super().after_controller_start(SimpleNamespace(run_id=str(self._run_dir)))

    def _maybe_send_resource_request(self) -> None:
        if self._asks_autoscaler:
            super()._maybe_send_resource_request()

    def _get_reserved_resources(self) -> Resources | None:
        """What Ray Train's policy counts workers in; None where it cannot be known now."""
        try:
            # A group that is running shows by itself when a node is gone.
            self._seen = self._look(knock=not self._is_running)
        except Exception:  # whatever Ray's clients raise while its head is busy or away
            logger.warning("the cluster's resources cannot be seen", exc_info=True)
            return None
        return self._seen.free

    def _room(self) -> int:
        free = self._get_reserved_resources()
        return 0 if free is None else self._count_possible_workers(free)

    def _is_prepared(self) -> bool:
        """Whether the nodes that a larger group may be on are ready for it.

        The group goes on meanwhile; it would wait for them, were it larger already.
        """
        if self._prepare is None:
            return True
        useful = [
            node
            for node, free in self._seen.free.items()
            if self._count_possible_workers({node: free})
        ]
        # What was prepared comes first, and is kept: ranks may depend on it.
        useful.sort(key=lambda node: node not in self._prepared)
        for node in useful[: self.scaling_config.max_workers]:
            if node not in self._prepared:
                self._prepared[node] = self._prepare(node)
        return all(self._prepared[node]() for node in useful if node in self._prepared)

    def _tell_waiting(self) -> None:
        room = self._room()
        if room != self._told:
            self._told = room
            note(self._run_dir, "waiting", room=room, needed=self.scaling_config.min_workers)


class ResizeCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Has the ranks save before a group that is well is resized; runs in the controller's process.

    Args:
        run_dir: the run's folder.
        grace_s: the longest wait for the ranks' checkpoint.
    """

    def __init__(self, run_dir: Path, grace_s: float) -> None:
        self._run_dir, self._grace_s = run_dir, grace_s
        self._group: Any = None
        self._num_workers: int | None = None  # of the last group, or what was to be one
        self._is_planned = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """A controller that was lost may have left its request behind."""
        self._clear()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Give back what a group holds whose start failed half-way: Ray Train forgets it."""
        if self._group is not None:
            self._group.abort()
            self._group = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The group's processes are there."""
        self._group = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """No rank is left that could see the request."""
        self._group = None
        self._clear()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Tells a resize of a running group from the restart of a failed one."""
        if isinstance(current_state, SchedulingState):
            self._is_planned = isinstance(previous_state, ResizingState)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Called before the old group, if there is one, is shut down."""
        before, after = self._num_workers, resize_decision.num_workers
        self._num_workers = after
        step = self._hold() if self._is_planned and self._group is not None else None
        if before is not None and before != after:
            note(
                self._run_dir,
                "resized",
                **{"from": before, "to": after, "planned": self._is_planned, "saved_at": step},
            )

    def _hold(self) -> int | None:
        """Ask the ranks to save; the step of their checkpoint, None if there was none in time."""
        deadline = time.monotonic() + self._grace_s
        is_over = False
        while not is_over:
            # Again and again: ranks that are just starting remove the file as an old one.
            (self._run_dir / HOLD_FILE).touch()
            status = self._group.poll_status(timeout=_SETTLE_S)
            is_over = bool(
                status.errors or status.finished or time.monotonic() > deadline
            )  # then what they have answered is all
            step = self._held()
            if step is not None:
                return step
            time.sleep(_SETTLE_S / 3)
        return None

    def _held(self) -> int | None:
        try:
            answer = json.loads((self._run_dir / HELD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return int(answer["step"])

    def _clear(self) -> None:
        for name in (HOLD_FILE, HELD_FILE):
            (self._run_dir / name).unlink(missing_ok=True)

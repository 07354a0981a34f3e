"""Where a run's events go besides ``events.jsonl``: TensorBoard, or a tracker of the user's own.

A tracker is a class of three methods, found by a name in ``trainer.trackers``: a built-in one, an
entry point of the group ``babelray.trackers``, or ``package.module:factory``.

Trackers live in the process of ``babelray train``, not in a rank: there they hear everything, the
scores and the failures of workers too, outlive every restart, and take nothing from a step. Each
runs in a thread of its own, so that a slow server delays nothing; one that raises is told of once
and left out.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from data_shards.errors import UserError

log = logging.getLogger(__name__)

GROUP = "babelray.trackers"
BUILT_IN = {"tensorboard": "trainer.tracker_tensorboard:TensorBoard"}

# Events that may wait for a tracker; more are left out.
_MAX_WAITING = 10_000
# How long the end of a run waits for its trackers, together.
_CLOSE_S = 30.0

Event = dict[str, Any]


class Tracker(Protocol):
    """What takes the events of a run. All calls come from one thread, in the order below."""

    def begin(
        self, run: str, run_dir: Path, config: dict[str, Any], resumed_from: int | None
    ) -> None:
        """The run begins, or goes on after step ``resumed_from``: what came later is void."""

    def event(self, event: Event) -> None:
        """An event, as ``events.jsonl`` holds it; no step comes twice after ``begin``."""

    def close(self) -> None:
        """The end: write what waits."""


Factory = Callable[[], Tracker]


def find_trackers(names: Iterable[str]) -> dict[str, Factory]:
    """What makes the trackers of these names; nothing is begun.

    Raises:
        UserError: a name is not known, or what it names cannot be imported or called.
    """
    return {name: _find(name) for name in names}


def _find(name: str) -> Factory:
    where = f"trainer.trackers: {name}"
    if name in BUILT_IN:
        return _import(BUILT_IN[name], where)
    if ":" in name:
        return _import(name, where)
    installed = {point.name: point.value for point in entry_points(group=GROUP)}
    if name in installed:
        return _import(installed[name], where)
    known = ", ".join([*BUILT_IN, *sorted(installed)])
    raise UserError(
        f"{where} is not known here: give {known}, or package.module:factory for a tracker of "
        "your own"
    )


def _import(reference: str, where: str) -> Factory:
    module_name, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a script's path begins at the script, not at the user
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where} cannot be imported: {error}") from None
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"{where} is a {type(found).__name__}, not a class or a function")
    factory: Factory = found
    return factory


class Trackers:
    """Gives a run's events to its trackers.

    Args:
        factories: of ``find_trackers``.
        run, run_dir, config: handed to each tracker as the run begins.
        complain: takes a line about a tracker that is left out.
    """

    def __init__(
        self,
        factories: Mapping[str, Factory],
        run: str,
        run_dir: Path,
        config: dict[str, Any],
        complain: Callable[[str], None] = log.warning,
    ) -> None:
        self._begin = run, run_dir, config
        self._feeds = [_Feed(name, factory, complain) for name, factory in factories.items()]
        self._has_begun = False
        self._last: dict[str, int] = {}  # step of each kind of event

    def event(self, event: Event) -> None:
        """Take an event; never raises, never waits.

        The first that says where the run begins begins the trackers. After a restart of the
        workers, the steps that are done again are left out: they are the same.
        """
        kind, step = str(event.get("event")), event.get("step")
        if kind in {"started", "resumed"} and not self._has_begun:
            self._has_begun = True
            resumed_from = step if kind == "resumed" else None
            for feed in self._feeds:
                feed.begin(*self._begin, resumed_from)
        if not self._has_begun:
            return
        if kind in _REPEATED and isinstance(step, int):
            if step <= self._last.get(kind, -1):
                return
            self._last[kind] = step
        for feed in self._feeds:
            feed.put(event)

    def close(self) -> None:
        """Let the trackers write what waits; one that takes too long is left behind."""
        deadline = time.monotonic() + _CLOSE_S
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))


# Events that a group of workers logs again, when it goes on from a checkpoint.
_REPEATED = frozenset({"step", "validated", "checkpoint", "skipped"})


class _Feed:
    """One tracker, its queue and its thread, which begins with the run."""

    def __init__(self, name: str, factory: Factory, complain: Callable[[str], None]) -> None:
        self._name, self._factory, self._complain = name, factory, complain
        self._queue: queue.Queue[Event | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._is_left_out = False
        self._num_lost = 0

    def begin(self, *arguments: Any) -> None:
        self._thread = threading.Thread(
            target=self._run, args=arguments, name=f"tracker-{self._name}", daemon=True
        )
        self._thread.start()

    def put(self, event: Event) -> None:
        if self._is_left_out:
            return
        try:
            self._queue.put_nowait(dict(event))
        except queue.Full:
            self._num_lost += 1

    def end(self) -> None:
        if self._thread is not None and not self._is_left_out:
            try:
                self._queue.put(None, timeout=1.0)
            except queue.Full:
                self._is_left_out = True

    def join(self, timeout_s: float) -> None:
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._complain(f"tracker {self._name}: it does not end; left behind")
        elif self._num_lost:
            self._complain(f"tracker {self._name}: too slow for {self._num_lost} events")

    def _run(self, *arguments: Any) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._factory()
            tracker.begin(*arguments)
            while (event := self._queue.get()) is not None:
                tracker.event(event)
            tracker.close()
        except Exception as error:  # training matters more
            self._is_left_out = True
            log.debug("tracker %s", self._name, exc_info=error)
            self._complain(
                f"tracker {self._name} failed and is left out: {type(error).__name__}: {error}"
            )


def scalars(event: Event) -> dict[str, float]:
    """An event's numbers under the names that all trackers share, such as ``train/loss``.

    Empty for an event that has none, or no ``step``; what is not known (null) is left out.
    """
    kind = str(event.get("event"))
    values = {name: event.get(key) for key, name in _SCALARS.get(kind, {}).items()}
    if kind == "step":
        for group, prefix in (("phases", "phases/"), ("gpu_memory_bytes", "gpu_memory_bytes/")):
            inner = event.get(group)
            if isinstance(inner, dict):
                values |= {f"{prefix}{name}": value for name, value in inner.items()}
    elif kind == "evaluated" and "best" not in event:  # by hand, searched as one likes
        values = {
            name.replace("valid/", f"evaluation/{event.get('test_set')}/"): value
            for name, value in values.items()
        }
    if not isinstance(event.get("step"), int):
        return {}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as ``{"trainer.seed": 1, ...}``."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


# By kind of event and by its field.
_SCALARS = {
    "step": {
        "mean_loss": "train/loss",
        "mean_nll": "train/nll",
        "epoch": "train/epoch",
        "target_tokens": "train/target_tokens",
        "learning_rate": "optimizer/learning_rate",
        "grad_norm": "optimizer/grad_norm",
        "loss_scale": "optimizer/loss_scale",
        "tokens_per_second": "speed/tokens_per_second",
        "mfu": "speed/mfu",
        "padding_efficiency": "speed/padding_efficiency",
        "world_size": "workers/world_size",
        "slowest_rank": "workers/slowest_rank",
        "skew": "workers/skew",
        "gpu_memory_bytes": "gpu_memory_bytes/all",
        "flops": "cost/flops",
        "energy_joules": "cost/energy_joules",
    },
    "validated": {
        "valid_nll": "valid/nll",
        "perplexity": "valid/perplexity",
        "seconds": "valid/seconds",
    },
    "evaluated": {"bleu": "valid/bleu", "chrf": "valid/chrf", "ter": "valid/ter"},
    "checkpoint": {
        "bytes": "checkpoint/bytes",
        "seconds": "checkpoint/seconds",
        "stall_seconds": "checkpoint/stall_seconds",
    },
    "recovered": {"seconds": "recovery/seconds"},
}

"""All that a run's folder tells of it, read once: what its page, comparison and numbers start from.

``events`` is one history without what was undone; ``raw`` is every line, so that it tells as well
what was done twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from trainer.config import RunConfig
from trainer.evaluate import Result, read_results
from trainer.run import events_path, read_config, read_events

Event = dict[str, Any]

_BEGINNINGS = frozenset({"started", "resumed"})

# Of the run's beginning, in its log; what is undone is taken off again.
SUMS = ("elapsed_s", "flops", "energy_joules")


@dataclass(frozen=True)
class Attempt:
    """A group of workers from its start to its end: the ``started`` or ``resumed`` line and what
    followed it.

    Attributes:
        start: its first line.
        lines: all that it logged, the first line included.
        begun_with: what the run's sums (``SUMS``) were at its start.
        failures: lines of ``logs/failures.jsonl`` that came between it and the one before.
    """

    start: Event
    lines: list[Event]
    begun_with: dict[str, float]
    failures: list[Event] = field(default_factory=list)

    @property
    def first_step(self) -> int:
        """The step that it went on from; 0 for a start."""
        return int(self.start.get("step") or 0)

    @property
    def last_step(self) -> int:
        """The last step that it is known to have made."""
        return max([self.first_step, *(int(line.get("step") or 0) for line in self.steps)])

    @property
    def steps(self) -> list[Event]:
        """Its logged steps."""
        return [line for line in self.lines if line["event"] == "step"]

    def ended_with(self, key: str) -> float:
        """A sum at its end, as far as it was logged."""
        return max([self.begun_with[key], *(value for _, value in _points(self.lines, key))])

    def gained(self, key: str) -> float:
        """What it added to a sum, whether or not the work was kept."""
        return self.ended_with(key) - self.begun_with[key]

    @property
    def training_s(self) -> float:
        """Seconds that it trained."""
        return self.gained("elapsed_s")

    @property
    def began_at(self) -> float | None:
        """Unix seconds."""
        return _moment(self.start)

    @property
    def ended_at(self) -> float | None:
        """Unix seconds of its last line."""
        return max((t for t in map(_moment, self.lines) if t is not None), default=None)

    @property
    def num_workers(self) -> int:
        """Workers, each on a device of its own."""
        told = [line["world_size"] for line in [self.start, *self.steps] if line.get("world_size")]
        return int(told[0]) if told else 1


@dataclass(frozen=True)
class RunLog:
    """A run's folder, read.

    Attributes:
        name: the folder's.
        manifest: the corpus; None, with the reason in ``missing``, where it is not at hand.
        is_live: whether somebody trains it now; None: not known.
    """

    run_dir: Path
    name: str
    config: RunConfig
    events: list[Event]
    raw: list[Event]
    failures: list[Event]
    evaluations: list[Result]
    manifest: Manifest | None
    missing: str = ""
    is_live: bool | None = None
    dashboard: Event = field(default_factory=dict)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """Every group of workers, oldest first."""
        return _attempts(self.raw, self.failures)

    def of(self, *kinds: str) -> list[Event]:
        """The history's events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def steps(self) -> list[Event]:
        """The history's logged steps."""
        return self.of("step")

    def last(self, key: str, *kinds: str) -> Any:
        """The newest value of a field that is not null, of these kinds of events (or of any)."""
        for event in reversed(self.events):
            if (not kinds or event["event"] in kinds) and event.get(key) is not None:
                return event[key]
        return None

    @property
    def main(self) -> Result | None:
        """The evaluation to show first: of the test set, of the best checkpoint, the newest."""
        return max(
            self.evaluations,
            key=lambda r: (r.test_set == "test", r.checkpoint == "best", r.time),
            default=None,
        )


def read_run(run_dir: Path, *, is_live: bool | None = None) -> RunLog:
    """Read a run's folder; only its ``config.json`` must be there.

    Raises:
        UserError: there is no such run.
    """
    config = read_config(run_dir)
    manifest, missing = None, ""
    try:
        manifest = Manifest.load(config.data.folder())
    except UserError as error:
        missing = str(error)
    return RunLog(
        run_dir=run_dir,
        name=run_dir.resolve().name,
        config=config,
        events=read_events(run_dir),
        raw=read_lines(events_path(run_dir)),
        failures=read_lines(run_dir / "logs" / "failures.jsonl"),
        evaluations=read_results(run_dir),
        manifest=manifest,
        missing=missing,
        is_live=is_live,
        dashboard=_read_object(run_dir / "ray.json"),
    )


def read_lines(file: Path) -> list[Event]:
    """Events of a file, one JSON object a line; without the file none, and without torn lines."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found


def _read_object(file: Path) -> Event:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _attempts(raw: list[Event], failures: list[Event]) -> list[Attempt]:
    groups: list[list[Event]] = []
    for event in raw:
        if event["event"] == "evaluated":  # perhaps long after the end
            continue
        if event["event"] in _BEGINNINGS or not groups:
            groups.append([])
        groups[-1].append(event)
    attempts: list[Attempt] = []
    # Steps, and the sums at each, as far as they still count.
    points = {key: [(0.0, 0.0)] for key in SUMS}
    for lines in groups:
        is_begun = lines[0]["event"] in _BEGINNINGS
        start: Event = lines[0] if is_begun else {"event": "started", "step": 0}
        step = float(start.get("step") or 0)
        begun_with = {key: _at(step, points[key]) for key in SUMS}
        before = attempts[-1] if attempts else None
        attempts.append(Attempt(start, lines, begun_with, _between(failures, before, lines)))
        for key in SUMS:
            kept = [point for point in points[key] if point[0] < step]
            points[key] = [*kept, (step, begun_with[key]), *_points(lines, key)]
    return attempts


def _at(step: float, points: list[tuple[float, float]]) -> float:
    """A sum at a step; a checkpoint may lie between two logged ones."""
    steps, values = np.array(sorted(points)).T
    return float(np.interp(step, steps, values))


def _points(lines: list[Event], key: str) -> list[tuple[float, float]]:
    """Steps, and a sum at each."""
    found = []
    for line in lines:
        step, value = line.get("step"), line.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float):
            found.append((float(step), float(value)))
    return found


def _between(failures: list[Event], before: Attempt | None, lines: list[Event]) -> list[Event]:
    start, until = before.began_at if before else None, _moment(lines[0])
    if start is None or until is None:
        return []
    return [failure for failure in failures if start <= (_moment(failure) or -1.0) <= until]


def _moment(event: Event) -> float | None:
    value = event.get("time")
    return float(value) if isinstance(value, int | float) else None

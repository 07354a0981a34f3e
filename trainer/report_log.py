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
from trainer.events import BEGINNINGS, history
from trainer.report_lines import (
    ENDS,
    Event,
    has_sums,
    last_moment,
    moment,
    reached,
    read_failures,
    read_lines,
)
from trainer.run import events_path, read_config

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
        failures: lines of ``logs/failures.jsonl`` that led to it: none where a command began it.
        given_up: lines there from before that, a list for each time that the run was given up, or
            its command ended.
    """

    start: Event
    lines: list[Event]
    begun_with: dict[str, float]
    failures: list[Event] = field(default_factory=list)
    given_up: list[list[Event]] = field(default_factory=list)

    @property
    def first_step(self) -> int:
        """The step that it went on from; 0 for a start."""
        return int(self.start.get("step") or 0)

    @property
    def last_step(self) -> int:
        """The last step that it is known to have made."""
        return max([self.first_step, *(line.get("step") or 0 for line in self.lines)])

    @property
    def is_idle(self) -> bool:
        """Whether it made no update, as far as it was logged."""
        kinds = {line["event"] for line in self.lines}
        return self.last_step == self.first_step and "recovered" not in kinds

    @cached_property
    def steps(self) -> list[Event]:
        """Its logged steps."""
        return [line for line in self.lines if line["event"] == "step"]

    def ended_with(self, key: str) -> float:
        """A sum at its end, as far as it was logged."""
        return self._ends[key]

    @cached_property
    def _ends(self) -> dict[str, float]:
        return {
            key: max([start, *(value for _, value in _points(self.lines, key))])
            for key, start in self.begun_with.items()
        }

    def has_logged(self, key: str) -> bool | None:
        """Whether its newest line that could tell a sum does; None where there is no such line."""
        told = [
            line
            for line in self.lines
            if line["event"] == "step" or (line["event"] in ENDS and has_sums(line))
        ]
        return told[-1].get(key) is not None if told else None

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
        return moment(self.start)

    @cached_property
    def ended_at(self) -> float | None:
        """Unix seconds of its last line."""
        return last_moment(self.lines)

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
        """Every group of workers that logged something, oldest first."""
        return _attempts(self._groups, self.failures)

    @cached_property
    def failed_since(self) -> list[list[Event]]:
        """Lines of ``logs/failures.jsonl`` from after the last attempt's beginning, parted where
        the run was given up, or its command ended; the last are of the newest command.
        """
        return _parted(self.failures, self._groups, len(self._groups))

    @cached_property
    def _groups(self) -> list[list[Event]]:
        return _groups(self.raw)

    @cached_property
    def end(self) -> Event:
        """The newest event that tells how far the run has come, by its ``step``."""
        return max(
            reached(self.events, "step", "validated", "skipped", "checkpoint", *ENDS),
            key=lambda event: (event["step"], event.get("elapsed_s") or 0.0),
            default={},
        )

    @cached_property
    def timed(self) -> Event:
        """The newest event that tells how long the run has trained: ``elapsed_s``."""
        found = reached(self.events, "step", "validated", *ENDS)
        return max(
            (event for event in found if event.get("elapsed_s") is not None),
            key=lambda event: event["elapsed_s"],
            default={},
        )

    @cached_property
    def totals(self) -> Event:
        """The newest event with the run's sums: tokens, operations, energy, the data hash.

        A log of an earlier version has them in its steps alone, of which the last may be older
        than the run's end; then ``totals["step"] < end["step"]``.
        """
        found = [event for event in reached(self.events, "step", *ENDS) if has_sums(event)]
        return found[-1] if found else (self.steps or [{}])[-1]

    def told_place(self, event: Event) -> str:
        """Where an event's sums are older than the run's end: of which step they are."""
        step = event.get("step")
        if step is None or step >= self.end.get("step", 0):
            return ""
        return f", at step {step:,} (the last logged)"

    @property
    def epoch(self) -> int | None:
        """The epoch of the last step, from 0."""
        an_epoch = self.last("steps_per_epoch", *BEGINNINGS)
        if isinstance(an_epoch, int) and an_epoch > 0 and self.end:
            return max(0, int(self.end["step"]) - 1) // an_epoch
        return self.steps[-1].get("epoch") if self.steps else None

    @cached_property
    def hashed(self) -> Event:
        """The newest event with a data hash, which is of its step."""
        found = reached(self.events, "step", "skipped", *BEGINNINGS, *ENDS)
        return next((event for event in reversed(found) if event.get("data_hash")), {})

    def of(self, *kinds: str) -> list[Event]:
        """The history's events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @cached_property
    def steps(self) -> list[Event]:
        """The history's logged steps; of very many, evenly taken ones."""
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
    raw = read_lines(events_path(run_dir))
    return RunLog(
        run_dir=run_dir,
        name=run_dir.resolve().name,
        config=config,
        events=history(raw),
        raw=raw,
        failures=read_failures(run_dir / "logs" / "failures.jsonl"),
        evaluations=read_results(run_dir),
        manifest=manifest,
        missing=missing,
        is_live=is_live,
        dashboard=_read_object(run_dir / "ray.json"),
    )


def _read_object(file: Path) -> Event:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _attempts(groups: list[list[Event]], failures: list[Event]) -> list[Attempt]:
    attempts: list[Attempt] = []
    # Steps, and the sums at each, as far as they still count.
    points = {key: [(0.0, 0.0)] for key in SUMS}
    for number, lines in enumerate(groups):
        is_begun = lines[0]["event"] in BEGINNINGS
        start: Event = lines[0] if is_begun else {"event": "started", "step": 0}
        step = float(start.get("step") or 0)
        begun_with = {
            key: _at(step, points[key]) if start.get(key) is None else float(start[key])
            for key in SUMS
        }
        *given_up, led = _parted(failures, groups, number)
        attempts.append(Attempt(start, lines, begun_with, led, given_up))
        for key in SUMS:
            kept = [point for point in points[key] if point[0] < step]
            points[key] = [*kept, (step, begun_with[key]), *_points(lines, key)]
    return attempts


def _groups(raw: list[Event]) -> list[list[Event]]:
    """Lines by attempt."""
    groups: list[list[Event]] = []
    for event in raw:
        if event["event"] == "evaluated":  # perhaps long after the end
            continue
        if event["event"] in BEGINNINGS or not groups:
            groups.append([])
        groups[-1].append(event)
    return groups


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


def _parted(failures: list[Event], groups: list[list[Event]], number: int) -> list[list[Event]]:
    """Failures that came before an attempt (or after the last) and after the beginning of the one
    before it, parted at each command and behind each failure that the run was given up for.
    """
    after = _seen(failures, groups[number - 1][0]) if number else 0
    until = _seen(failures, groups[number][0]) if number < len(groups) else len(failures)
    parts: list[list[Event]] = [[]]
    for failure in failures[after:until]:
        if failure["event"] == "commanded":
            parts.append([])
        elif failure["event"] != "torn":
            parts[-1].append(failure)
            if failure.get("final"):
                parts.append([])
    return parts


def _seen(failures: list[Event], beginning: Event) -> int:
    """Failures that had been noted when an attempt began.

    It counted them itself; earlier versions did not, and the clocks of two machines must do.
    """
    if beginning["event"] in BEGINNINGS and beginning.get("failures_seen") is not None:
        return int(beginning["failures_seen"])
    began = moment(beginning)
    if began is None:
        return 0
    return sum((moment(failure) or 0.0) <= began for failure in failures)

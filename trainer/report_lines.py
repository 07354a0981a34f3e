"""Lines of a run's logs, as a report reads them: whatever is torn or foreign is passed over."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.events import BEGINNINGS, parsed

Event = dict[str, Any]

# Nothing is to be made of these without a step.
_STEPPED = frozenset({"step", "validated", "checkpoint", "skipped"})
# The last lines of workers that leave in order; they tell the run's sums.
ENDS = ("finished", "handed_over")

# Where these are neither a number nor null, somebody else wrote into the line.
_NUMBERS = (
    "bytes", "elapsed_s", "energy_joules", "epoch", "failures_seen", "flops", "grad_norm",
    "learning_rate", "loss", "mean_loss", "mean_nll", "mfu", "nll", "padding_efficiency",
    "parameters", "peak_flops", "perplexity", "seconds", "skew", "source_tokens", "stall_seconds",
    "sustained_flops", "target_tokens", "time", "tokens_per_second", "valid_nll", "world_size",
)  # fmt: skip

# A page shows far fewer; medians and means of so many are as good as those of all.
_MAX_STEPS = 10_000
# How the log's writer begins the line of a step.
_STEP_LINE = '{"event": "step",'


def read_lines(file: Path) -> list[Event]:
    """Events of a file, one JSON object a line; without the file none, and without torn lines.

    Of more than ``_MAX_STEPS`` steps only evenly taken ones are parsed, which takes most of a
    report's time else; those next to another event, with the sums so far, are always among them.
    """
    lines = _text_lines(file)
    places = [number for number, line in enumerate(lines) if line.startswith(_STEP_LINE)]
    stride = -(-len(places) // _MAX_STEPS)
    if stride <= 1:
        return [event for line in lines if (event := _parsed(line))]
    found: list[Event] = []
    pending: list[str] = []  # steps since the last event that was taken
    for number, line in enumerate([*lines, ""]):
        if not line.startswith(_STEP_LINE):
            _take_last(pending, found)
            if event := _parsed(line):
                found.append(event)
        else:
            pending.append(line)
            if number % stride == 0:
                _take_last(pending, found)
    return found


def _take_last(lines: list[str], found: list[Event]) -> None:
    """The newest of the lines that is whole; empties ``lines``."""
    event = next((event for line in reversed(lines) if (event := _parsed(line))), None)
    if event is not None:
        found.append(event)
    lines.clear()


def _text_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []


def _parsed(line: str) -> Event | None:
    """None for a line that was torn, or that another program wrote."""
    event = parsed(line)
    if event is None:
        return None
    step = event.get("step")
    if step is None:
        if event["event"] in _STEPPED:
            return None
    elif not isinstance(step, int) or isinstance(step, bool):
        return None
    return event if all(_is_number(event.get(key)) for key in _NUMBERS) else None


def _is_number(value: Any) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    )


def read_failures(file: Path) -> list[Event]:
    """Each line, so that they can be counted; a torn one as ``{"event": "torn"}``."""
    return [_parsed(line) or {"event": "torn"} for line in _text_lines(file)[:-1]]


def reached(events: list[Event], *kinds: str) -> list[Event]:
    """Of these kinds, what was not undone by going on from an earlier step, oldest first."""
    found: list[Event] = []
    bound = math.inf
    for event in reversed(events):
        step = event.get("step")
        if step is None:
            continue
        if event["event"] in BEGINNINGS:
            bound = min(bound, step)
        if event["event"] in kinds and step <= bound:
            found.append(event)
    return found[::-1]


def has_sums(event: Event) -> bool:
    """Whether an event tells the run's sums."""
    return event.get("target_tokens") is not None or event.get("flops") is not None


def moment(event: Event) -> float | None:
    """An event's Unix seconds."""
    value = event.get("time")
    return None if value is None else float(value)


def last_moment(events: Iterable[Event]) -> float | None:
    """The last one's Unix seconds."""
    return max((t for t in map(moment, events) if t is not None), default=None)

"""What happened to a run between two attempts, as its first rank finds it when it starts.

``logs/failures.jsonl`` is written by whoever restarts the ranks (``cluster.failures``); the ranks
themselves were not there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.events import BEGINNINGS, parsed
from trainer.metrics import CAUSES, Cause


@dataclass(frozen=True)
class Interruption:
    """The failures since the last update, as one: ``began`` is when the first was noted.

    Attributes:
        causes: of the restarts that no attempt has counted yet.
        cause, message: the last failure's.
        seen: lines of the failures' log up to now.
    """

    began: float
    cause: Cause
    message: str
    causes: tuple[Cause, ...]
    seen: int

    def seconds(self) -> float:
        """From its beginning until now."""
        return max(0.0, time.time() - self.began)


def failures_seen(run_dir: Path) -> int:
    """Lines of the failures' log, for an event that says what came before it."""
    return len(_lines(run_dir / "logs" / "failures.jsonl"))


def interruption(run_dir: Path) -> Interruption | None:
    """What this attempt comes after; None if it comes after nothing that went wrong.

    To be asked before the attempt is logged. What came before the last command that started or
    resumed the run does not count: it was not the run that recovered from it. The two logs are
    written on different machines, so it is lines that are compared and not times.
    """
    counted = recovered = 0
    for line in _lines(run_dir / "events.jsonl"):
        if any(mark in line for mark in _MARKS) and (event := parsed(line)):
            seen = int(event.get("failures_seen", 0))
            if event["event"] == "recovered":
                recovered = seen
            elif event["event"] in BEGINNINGS:
                counted = seen
    lines = _lines(run_dir / "logs" / "failures.jsonl")
    failures: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines):
        event = parsed(line) or {}
        kind = event.get("event")
        if kind == "commanded" or event.get("final"):
            failures = []
        elif kind == "resized" and event.get("planned"):
            failures.append((number, {**event, "cause": "resized", "message": "another size"}))
        elif kind == "worker_failed" and event.get("cause") in CAUSES:
            failures.append((number, event))
    failures = [(number, event) for number, event in failures if number >= recovered]
    if not failures:
        return None
    last = failures[-1][1]
    return Interruption(
        began=failures[0][1]["time"],
        cause=cast("Cause", last["cause"]),
        message=str(last.get("message", "")),
        causes=tuple(
            cast("Cause", event["cause"]) for number, event in failures if number >= counted
        ),
        seen=len(lines),
    )


# Of the events that matter; the many others are not even parsed.
_MARKS = tuple(f'"event": "{kind}"' for kind in ("started", "resumed", "recovered"))


def _lines(file: Path) -> list[str]:
    """Whole lines."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []

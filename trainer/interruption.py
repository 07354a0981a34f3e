"""What happened to a run between two attempts, as its first rank finds it when it starts.

``logs/failures.jsonl`` is written by whoever restarts the ranks (``cluster.failures``); the ranks
themselves were not there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainer.metrics import CAUSES, Cause


@dataclass(frozen=True)
class Interruption:
    """The failures since the last update, as one: ``began`` is when the first was noted.

    ``causes`` are of the restarts that no attempt has counted yet; ``cause`` and ``message`` are
    the last failure's.
    """

    began: float
    cause: Cause
    message: str
    causes: tuple[Cause, ...]

    def seconds(self) -> float:
        """From its beginning until now."""
        return max(0.0, time.time() - self.began)


def interruption(run_dir: Path) -> Interruption | None:
    """What this attempt comes after; None if it comes after nothing that went wrong.

    To be asked before the attempt is logged. A run that was given up and is resumed by hand has not
    recovered: what came before does not count.
    """
    counted_until = recovered_at = 0.0
    for event in _lines(run_dir / "events.jsonl", ("started", "resumed", "recovered", "finished")):
        moment = float(event.get("time", 0.0))
        if event["event"] in {"started", "resumed"}:
            counted_until = moment
        else:
            recovered_at = moment
    failures: list[dict[str, Any]] = []
    for event in _lines(run_dir / "logs" / "failures.jsonl", ("worker_failed", "resized")):
        if event.get("time", 0.0) <= recovered_at:
            continue
        if event.get("final"):
            failures = []
        elif event["event"] == "worker_failed":
            failures.append(event)
        elif event.get("planned"):
            failures.append({**event, "cause": "resized", "message": "resized"})
    failures = [event for event in failures if event.get("cause") in CAUSES]
    if not failures:
        return None
    return Interruption(
        began=failures[0]["time"],
        cause=cast("Cause", failures[-1]["cause"]),
        message=str(failures[-1].get("message", "")),
        causes=tuple(
            cast("Cause", event["cause"]) for event in failures if event["time"] > counted_until
        ),
    )


def _lines(file: Path, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The events of these kinds; others are not even parsed."""
    marks = [f'"event": "{kind}"' for kind in kinds]
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):
        if any(mark in line for mark in marks):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") in kinds:
                yield event

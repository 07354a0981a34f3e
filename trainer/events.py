"""``events.jsonl``: one JSON object a line, appended by rank 0; what the run has to tell."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Never logged again by a resume from after them, and what an audit counts on.
_LASTING = frozenset({"skipped", "rewound"})
# With these an attempt begins, after the step that they name.
BEGINNINGS = frozenset({"started", "resumed"})
# Logged again by whoever trains again from an earlier step.
_PROGRESS = frozenset({"step", "validated", "checkpoint", "skipped", "rewound"})
# Lines kept for later while the disk takes none.
_MAX_PENDING = 10_000


class EventLog:
    """Appends events to a run's file, each as one line that is written at once.

    While the disk is full the lines wait, as long as this process lives.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        # A killed writer may have left half a line: end it, so that the next event stands alone.
        self._is_torn = _ends_torn(file)
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._pending: deque[bytes] = deque(maxlen=_MAX_PENDING)
        self._is_failing = False

    def write(self, event: str, **values: Any) -> None:
        """Append one event; ``time`` (Unix seconds) is added, NaN and infinity become null."""
        line = {"event": event, **{name: _plain(value) for name, value in values.items()}}
        line["time"] = round(time.time(), 3)
        self._pending.append(json.dumps(line).encode() + b"\n")
        self._flush()
        if event in _LASTING and not self._pending:
            os.fsync(self._descriptor)

    def _flush(self) -> None:
        try:
            while self._pending:
                self._append(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            if not self._is_failing:
                log.warning("%s: %s; its lines wait for better times", self._file, error.strerror)
            self._is_failing = True
        else:
            self._is_failing = False

    def _append(self, line: bytes) -> None:
        data = b"\n" + line if self._is_torn else line
        written = os.write(self._descriptor, data)
        if written < len(data):  # the disk took a part
            self._is_torn = True
            raise OSError(None, "no space for a whole line")
        self._is_torn = False

    def close(self) -> None:
        """Write what waits, if that can be, and close the file."""
        self._flush()
        if self._pending:
            log.error("%s: %d lines are lost, the disk is full", self._file, len(self._pending))
        os.close(self._descriptor)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_torn(file: Path) -> bool:
    if not file.exists() or file.stat().st_size == 0:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def parsed(line: str | bytes) -> dict[str, Any] | None:
    """The event that a line holds; None for one that was torn, or is somebody else's."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def history(logged: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a run logged as one history, without the parts that were undone.

    A run that resumes from step s logs the steps after s anew: what was logged after s before is
    dropped (all of it, where a run starts anew), and of one step logged twice the later wins.
    """
    events: list[dict[str, Any]] = []
    for event in logged:
        if event["event"] in BEGINNINGS and isinstance(event.get("step"), int):
            start = event["step"]
            events = [
                e for e in events if not (e["event"] in _PROGRESS and (e.get("step") or 0) > start)
            ]
        events.append(event)
    last = {(event["event"], event.get("step")): number for number, event in enumerate(events)}
    return [
        event
        for number, event in enumerate(events)
        if event["event"] not in _PROGRESS or last[event["event"], event.get("step")] == number
    ]

"""``events.jsonl``: one JSON object a line, appended by rank 0; what the run has to tell."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to a run's file, each as one flushed line."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(file)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Append one event; ``time`` (Unix seconds) is added, NaN and infinity become null."""
        line = {"event": event, **{name: _plain(value) for name, value in values.items()}}
        line["time"] = round(time.time(), 3)
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_last_line(file: Path) -> None:
    """A killed writer may have left half a line: end it, so that the next event stands alone."""
    if not file.exists() or file.stat().st_size == 0:
        return
    with file.open("rb+") as stream:
        stream.seek(-1, 2)
        if stream.read(1) != b"\n":
            stream.write(b"\n")

"""``events.jsonl``: one JSON object a line, appended by rank 0; what the run has to tell."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Never logged again by a resume from after them, and what an audit counts on.
_LASTING = frozenset({"skipped", "rewound"})
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

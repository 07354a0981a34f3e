"""A run's log as it grows, without most of its steps: all that tells how the run stands."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from trainer.events import parsed

Event = dict[str, Any]

# As ``trainer.events`` writes them. Parsing them all would be all the time that reading takes.
_STEP = b'{"event": "step"'

# The newest lines are all kept: the time left is reckoned from up to 1000 intervals.
_NUM_RECENT = 1500


class History:
    """The events of a JSON-lines file; each reading takes up only what is new.

    Of the steps there are the newest, and of the older ones the last before each other event. Lines
    cut short by a crash are passed over.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._begin()

    def _begin(self) -> None:
        self._inode: int | None = None
        self._offset = 0
        self._old: list[Event] = []
        self._recent: deque[bytes | Event] = deque()

    def read(self) -> list[Event]:
        """The events up to now, oldest first; all anew of a file that was begun anew."""
        try:
            with self._file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._begin()
                    self._inode = status.st_ino
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # its rest is still to come
                    self._offset += len(line)
                    self._add(line)
        except FileNotFoundError:
            self._begin()
        recent = [event for line in self._recent if (event := _parsed(line)) is not None]
        self._recent = deque(recent)
        return self._old + recent

    def _add(self, line: bytes) -> None:
        self._recent.append(line)
        if len(self._recent) <= _NUM_RECENT:
            return
        oldest = self._recent.popleft()
        if _is_step(oldest) and _is_step(self._recent[0]):
            return
        event = _parsed(oldest)
        if event is not None:
            self._old.append(event)


class Histories:
    """Those of several runs, for whoever looks at them again and again."""

    def __init__(self) -> None:
        self._histories: dict[Path, History] = {}

    def events(self, run_dir: Path) -> list[Event]:
        """What the run has logged until now."""
        if run_dir not in self._histories:
            self._histories[run_dir] = History(run_dir / "events.jsonl")
        return self._histories[run_dir].read()


def _is_step(line: bytes | Event) -> bool:
    return line.startswith(_STEP) if isinstance(line, bytes) else line["event"] == "step"


def _parsed(line: bytes | Event) -> Event | None:
    return parsed(line) if isinstance(line, bytes) else line

"""How a run is asked to leave its machines: files in its folder, and what its ranks answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Whoever makes it asks the run to save a checkpoint and leave, to go on elsewhere or at another
# size. (trainer.config.STOP_FILE asks it to save and end.)
HOLD_FILE = "hold"

# Asks a run that does not improve any more to save and end: it has stopped early.
EARLY_STOP_FILE = "early_stop"

# Rank 0's answer to HOLD_FILE, after the commit: {"step": s}.
HELD_FILE = "held"


class Handover(Exception):  # noqa: N818 - not an error: the run goes on
    """Raised by every rank after a checkpoint that was asked for by ``HOLD_FILE``.

    It ends this group of ranks, and the run goes on from that checkpoint with another group.
    """


class Requests:
    """Which of a few files lie in a folder, for one who asks at every step.

    They are looked for when the folder has changed since the last look, and every ``interval_s``
    all the same: times are coarse, and a file server may tell of them late. That is one question a
    step to the file system instead of one a file.

    Args:
        folder: where the files are made and removed.
        names: of the files.
        interval_s: between two looks at a folder that does not seem to change.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._names = folder, names
        self._interval_s, self._clock = interval_s, clock
        self._changed_ns: int | None = None
        self._next_s = float("-inf")
        self._there: list[bool] = []

    def look(self) -> list[bool]:
        """Whether each of the files is there."""
        changed_ns, now_s = self._folder.stat().st_mtime_ns, self._clock()
        if changed_ns != self._changed_ns or now_s >= self._next_s:
            self._changed_ns, self._next_s = changed_ns, now_s + self._interval_s
            self._there = [(self._folder / name).exists() for name in self._names]
        return self._there

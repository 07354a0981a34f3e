"""A run's logs as lines for a person: the last ones of several files in order, and what follows.

Files grow while they are read, are begun anew by ``--overwrite``, and come up late: a rank's log
when its process starts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.naming import is_claimed, logs_dir
from cluster.status import say_failure

# What is looked at of a file for its last lines.
_END_BYTES = 1 << 22

_POLL_S = 0.25

# As ``cluster.ranks.LOG_FORMAT`` begins; the lines of a traceback begin otherwise.
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(,\d+)?")


@dataclass(frozen=True)
class Line:
    """A line of a log; ``stamp`` is its time as text, or that of the line that it belongs to."""

    stamp: str
    label: str
    text: str


@dataclass
class Log:
    """One file from its end on, as it grows.

    ``reword`` makes a line from what stands there, or None, where it is not to be shown.
    """

    file: Path
    label: str
    reword: Callable[[str], str | None] = str
    _offset: int = field(default=0, init=False)
    _inode: int | None = field(default=None, init=False)
    _rest: bytes = field(default=b"", init=False)
    _stamp: str = field(default="", init=False)

    def read(self) -> list[Line]:
        """The whole lines since the last call; all of a file that was begun anew."""
        try:
            with self.file.open("rb") as stream:
                status = self.file.stat()
                is_first = self._inode is None
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self._rest = status.st_ino, 0, b""
                if is_first and status.st_size > _END_BYTES:
                    stream.seek(status.st_size - _END_BYTES)
                    stream.readline()
                    self._offset = stream.tell()
                stream.seek(self._offset)
                content = stream.read()
        except FileNotFoundError:
            return []
        self._offset += len(content)
        *whole, self._rest = (self._rest + content).split(b"\n")
        return self._lines(whole)

    def rest(self) -> list[Line]:
        """A last line that was never ended: its writer is dead."""
        rest, self._rest = self._rest, b""
        return self._lines([rest]) if rest else []

    def _lines(self, lines: Iterable[bytes]) -> list[Line]:
        return [found for line in lines if (found := self._line(line)) is not None]

    def _line(self, line: bytes) -> Line | None:
        text = self.reword(line.decode("utf-8", errors="replace").rstrip("\r"))
        if text is None:
            return None
        if match := _STAMP.match(text):
            self._stamp = match[0]
        return Line(self._stamp, self.label, text)


def rank_logs(run_dir: Path) -> list[Log]:
    """The logs of all ranks that there are or were."""
    numbers = (file.stem.partition("-")[2] for file in logs_dir(run_dir).glob("rank-*.log"))
    return [rank_log(run_dir, int(number)) for number in sorted(numbers) if number.isdecimal()]


def rank_log(run_dir: Path, rank: int) -> Log:
    """One rank's log."""
    return Log(logs_dir(run_dir) / f"rank-{rank:03d}.log", f"rank {rank}")


def driver_log(run_dir: Path) -> Log:
    """What the command and Ray said."""
    return Log(logs_dir(run_dir) / "driver.log", "driver")


def failures_log(run_dir: Path) -> Log:
    """What went wrong and what was done about it, in words."""
    return Log(logs_dir(run_dir) / "failures.jsonl", "failures", _failure_in_words)


def last_lines(logs: Iterable[Log], number: int) -> list[Line]:
    """The last ``number`` lines of all ``logs`` together, in the order of their times."""
    found = [line for log in logs for line in log.read()]
    # Sorting is stable: lines of one file keep their order, and tracebacks stay with their line.
    return sorted(found, key=lambda line: line.stamp)[-number:] if number else []


def follow(
    run_dir: Path, logs: list[Log], *, more: Callable[[], Iterable[Log]] = lambda: ()
) -> Iterator[Line]:
    """The lines that come from now on, until no command trains the run any more.

    Args:
        run_dir: the run's folder.
        logs: each already read up to where the following begins.
        more: gives logs that may have come up since; those known already are passed over.
    """
    is_over = False
    while not is_over:
        is_over = not is_claimed(run_dir)  # then what is read now is all
        known = {log.file for log in logs}
        logs += [log for log in more() if log.file not in known]
        lines = [line for log in logs for line in log.read()]
        if is_over:
            lines += [line for log in logs for line in log.rest()]
        yield from sorted(lines, key=lambda line: line.stamp)
        if not is_over:
            time.sleep(_POLL_S)


def _failure_in_words(line: str) -> str | None:
    try:
        event = json.loads(line)
        if event["event"] == "commanded":
            return None  # only says where the failures of an earlier command end
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    except (ValueError, KeyError, TypeError):
        return line
    return f"{when}  {say_failure(event)}"

"""A job's log in whole lines, however it comes: in pieces, twice, or with Ray's own lines first."""

from __future__ import annotations

import re
from collections.abc import Iterator

_RAYS_OWN = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\t[A-Z]+ ")


class JobLog:
    """What was read of the log of the job ``id``.

    Ray writes lines of its own until the job's command begins; they are left out. That it has begun
    Ray notes only afterwards, so that a quick command's first lines may come before that.

    Attributes:
        has_begun: the job's command has.
    """

    def __init__(self, id: str) -> None:
        self._mark = f"Running entrypoint for job {id}: "
        self._num_read = 0  # characters, since the beginning
        self._num_to_skip = 0  # that come again
        self._unfinished = ""
        self._early: list[str] = []
        self.has_begun = False

    def cut(self) -> None:
        """The next piece is from the log's beginning again."""
        self._num_to_skip = self._num_read

    def read(self, piece: str) -> Iterator[str]:
        """The lines that ``piece`` completes."""
        skipped = min(self._num_to_skip, len(piece))
        self._num_to_skip -= skipped
        piece = piece[skipped:]
        self._num_read += len(piece)
        *lines, self._unfinished = (self._unfinished + piece).split("\n")
        for line in lines:
            if self.has_begun:
                yield line.removesuffix("\r")
            elif line.startswith(self._mark):
                self.has_begun = True
                yield from self._early
            elif not _RAYS_OWN.match(line):
                self._early.append(line.removesuffix("\r"))

    def read_all(self, text: str) -> Iterator[str]:
        """The new lines of ``text``, the whole log so far."""
        self.cut()
        yield from self.read(text)

    def rest(self) -> Iterator[str]:
        """A last line that nothing has ended."""
        line, self._unfinished = self._unfinished, ""
        if line and self.has_begun:
            yield line

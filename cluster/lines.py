"""Lines as they come: from a file in large chunks, from a slow pipe as soon as they are there, from
a person at a terminal one after the other.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO

from data_shards.errors import UserError

# A pipe that brings nothing for this long gets the answers to what it brought; a pipe that brings
# line after line gets them at the latest so long after the first.
_QUIET_S, _LONGEST_WAIT_S = 0.02, 0.25
_READ_BYTES = 1 << 16


def chunks(stream: BinaryIO, limit: int) -> Iterator[list[bytes]]:
    """Lines, up to ``limit`` at a time, without waiting for more where none are ready.

    A file comes in chunks of exactly ``limit`` lines. Of a pipe, nothing may have been read before.
    """
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # text in memory
        while chunk := list(islice(stream, limit)):
            yield chunk
        return
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    lines: list[bytes] = []
    tail: list[bytes] = []  # of a line whose end has not come
    deadline = 0.0
    while data := os.read(descriptor, _READ_BYTES):
        had_lines = bool(lines)
        first, *others = data.split(b"\n")
        tail.append(first)
        if others:
            lines += [b"".join(tail), *others[:-1]]
            tail = [others[-1]]
        while len(lines) >= limit:
            yield lines[:limit]
            lines, had_lines = lines[limit:], False
        if not lines or is_file:
            continue
        if not had_lines:
            deadline = time.monotonic() + _LONGEST_WAIT_S
        if time.monotonic() >= deadline or not select.select([descriptor], [], [], _QUIET_S)[0]:
            yield lines
            lines = []
    if last := b"".join(tail):
        lines.append(last)
    yield from (lines[start : start + limit] for start in range(0, len(lines), limit))


def converse(answer: Callable[[str], str], *, prompt: str, say: Callable[[str], None]) -> None:
    """Ask a person at a terminal for lines and answer each, until Ctrl-D.

    Ctrl-C gives up the line, or its answer. The prompt and the editing of lines go to standard
    error, the answers to standard output, which may be redirected.

    Args:
        answer: gives the text to print; a ``UserError`` or ``ValueError`` (of text that is not
            Unicode) is told, and the next line read.
        say: prints a message for the person.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives ``input`` the editing of lines, and their history)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        # ``input`` edits lines only on a standard output that is a terminal, and writes to it.
        sys.stdout.flush()
        os.dup2(2, 1)
        try:
            while True:
                try:
                    output.write(answer(input(prompt)))
                    output.flush()
                except EOFError:
                    say("")
                    return
                except KeyboardInterrupt:
                    say("")
                except (UserError, ValueError) as error:
                    say(str(error))
        finally:
            os.dup2(output.fileno(), 1)

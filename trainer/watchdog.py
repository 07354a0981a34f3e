"""Ends a rank that hangs, with its threads' stacks in the log, so that the run can restart.

A rank that waits for ever (a peer that is silent, a lock, a dead file system) fails nobody: without
this the run would stand still until somebody looked. Two clocks watch:

- a thread, which sees that no beat came for ``timeout_s``. It knows what the rank was doing, says
  so, and ends the process with ``EXIT_HUNG``;
- behind it faulthandler's timer, which is a thread in C and needs no GIL. The first thread winds it
  up at each of its ticks; so it fires only if that thread itself stands still for ``timeout_s``: a
  native call keeps the GIL, or the log cannot be written. It shows the stacks and ends the process
  with status 1. Python has one such timer a process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

log = logging.getLogger(__name__)

# Times its time-out, for torch's own collectives: the watchdog can say more, so it comes first.
COLLECTIVE_TIMEOUTS = 2.0

# EX_TEMPFAIL of sysexits.h: trying again may succeed.
EXIT_HUNG = 75

# The timer costs 40 microseconds to wind up: nothing once a second, too much at every step.
_MAX_TICK_S = 1.0
# What is left to say good-bye in, once the rank is known to hang: the log may be what it hangs on.
_LAST_WORDS_S = 20.0


def end_process() -> None:
    """End at once, without clean-up: that would wait for the thread that hangs."""
    os._exit(EXIT_HUNG)


class Watchdog:
    """Watches from ``__enter__`` to ``__exit__`` that ``beat`` is called.

    Args:
        timeout_s: longest time between two beats.
        what: says what the rank is doing ("step 120, waiting in all_reduce"). Called in the
            watchdog's thread: it must only read.
        rank: for the message.
        dump_to: file that the threads' stacks go to, the rank's log; it must have a file
            descriptor and stay open. By default standard error.
        on_hang: what comes after the message and the stacks.
    """

    def __init__(
        self,
        timeout_s: float,
        what: Callable[[], str],
        *,
        rank: int,
        dump_to: TextIO | None = None,
        on_hang: Callable[[], None] = end_process,
    ) -> None:
        self._timeout_s, self._what, self._rank = timeout_s, what, rank
        self._dump_to = dump_to or sys.stderr
        self._on_hang = on_hang
        self._tick_s = min(_MAX_TICK_S, timeout_s / 4)
        self._last_beat = time.monotonic()
        self._paused = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
        # Here, too, so that a file without a descriptor is an error now and not in the thread.
        self._wind_up(self._timeout_s)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """The rank makes progress. Costs nothing: one attribute is written."""
        self._last_beat = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For a wait that may rightly be long; only a held GIL is still noticed."""
        self._paused = True
        try:
            yield
        finally:
            self.beat()
            self._paused = False

    def _watch(self) -> None:
        while not self._done.wait(self._tick_s):
            self._wind_up(self._timeout_s)
            waited_s = time.monotonic() - self._last_beat
            if waited_s > self._timeout_s and not self._paused:
                self._wind_up(_LAST_WORDS_S)
                self._say(waited_s)
                self._on_hang()
                return

    def _wind_up(self, timeout_s: float) -> None:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._dump_to)

    def _say(self, waited_s: float) -> None:
        try:
            what = self._what()
        except Exception as error:
            what = f"(what it was doing cannot be told: {error!r})"
        log.critical(
            "rank %d hangs: no progress for %.0f s; %s. The stacks of its threads follow; if they "
            "show it waiting for other ranks, look for the cause in those ranks' logs. The process "
            "ends now, so that the run can restart from its last checkpoint. If a step of this run "
            "may rightly take so long, raise recovery.hang_timeout_s (now %g)",
            self._rank,
            waited_s,
            what,
            self._timeout_s,
        )
        self._dump_to.flush()
        faulthandler.dump_traceback(file=self._dump_to, all_threads=True)

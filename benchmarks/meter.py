"""A contestant's side of taking turns; needs nothing but Python, so that peers can use it too.

A contestant is a process that trains while it has a turn and otherwise stands still.
Turns are asked for on its standard input and answered on its standard output, a line each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What a contestant did in one turn; ``cpu_s`` is user and system time of all threads."""

    tokens: int
    steps: int
    cpu_s: float
    wall_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """The rate that is compared."""
        return self.tokens / self.cpu_s


class Meter:
    """The process' side: counts steps, and waits between turns inside ``stepped``.

    Standard output carries the answers; what else is printed goes to standard error.
    ``clock`` gives the seconds of processor time that were used, by default by this process.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def start(self) -> None:
        """Set-up is over; returns when the first turn begins."""
        self._cpu_s = self._clock()
        self._answer({})

    def stepped(self, tokens: int) -> None:
        """A step is over; ends the turn, and waits for the next, if the turn's time is up."""
        self._tokens += tokens
        self._steps += 1
        cpu_s = self._clock()
        # Counted from the end of the last turn: what a prefetching thread did since is work too.
        if cpu_s - self._cpu_s < self._seconds:
            return
        wall_s = time.perf_counter() - self._began
        turn = Turn(self._tokens, self._steps, cpu_s - self._cpu_s, wall_s)
        self._cpu_s = cpu_s
        self._answer(asdict(turn))

    def _answer(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self._answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            self.end()
        self._seconds, self._tokens, self._steps = float(line), 0, 0
        self._began = time.perf_counter()

    def end(self) -> None:
        """There are no more turns: leave from wherever this is, other threads with it."""
        os._exit(0)

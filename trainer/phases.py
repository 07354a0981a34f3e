"""Where a step's time goes: every moment of a rank's step belongs to exactly one phase.

Phases nest: while an inner one runs, the outer one's clock stands. So a reduction that DeepSpeed
makes inside the backward pass counts as communication alone, and the phases of a step add up to it.

On a CPU the clock is the host's. On a GPU, where the host only queues work, marks are CUDA events
on the current stream: what is measured is when the device got there, so waiting for data or for
another rank counts only as far as the device really stood idle. Events are read a step later, when
they have long happened, and so cost no synchronisation.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # whoever only reads the names does without
    import torch

Phase = Literal[
    "data_wait",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "checkpoint",
    "validation",
    "other",
]
PHASES: tuple[Phase, ...] = get_args(Phase)

# What a rank spends for itself: what is left waits for others, or for a checkpoint.
BUSY: tuple[Phase, ...] = ("data_wait", "forward", "backward", "optimizer", "other")

# Not divided further: what ranks exchange while they validate belongs to the validation.
_WHOLE: tuple[Phase, ...] = ("validation", "checkpoint")

Seconds = dict[Phase, float]


class Phases:
    """A rank's clock.

    Attributes:
        annotate: show the phases in a trace of ``torch.profiler``, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._open: list[Phase] = ["other"]
        self.annotate = False

    def __call__(self, phase: Phase) -> AbstractContextManager[None]:
        """The block belongs to ``phase``."""
        return _Block(self, phase)

    def restart(self) -> None:
        """Begin a step now, whatever came before."""
        self._clock.restart()

    def lap(self) -> Seconds | None:
        """End the step, and begin the next: seconds by phase.

        On a GPU those of the step before; None where that is not known yet.
        """
        self._clock.mark(self._open[-1])
        return self._clock.lap()

    def _enter(self, phase: Phase) -> None:
        self._clock.mark(self._open[-1])
        outer = self._open[-1]
        self._open.append(outer if outer in _WHOLE else phase)

    def _leave(self) -> None:
        self._clock.mark(self._open.pop())


class _Block(AbstractContextManager[None]):
    """Enters and leaves a phase; written out, because a step has dozens of them."""

    __slots__ = ("_label", "_phase", "_phases")

    def __init__(self, phases: Phases, phase: Phase) -> None:
        self._phases, self._phase = phases, phase
        self._label: torch.profiler.record_function | None = None

    def __enter__(self) -> None:
        if self._phases.annotate:
            import torch

            self._label = torch.profiler.record_function(f"phase: {self._phase}")
            self._label.__enter__()  # type: ignore[no-untyped-call]
        self._phases._enter(self._phase)

    def __exit__(self, *exception: object) -> None:
        self._phases._leave()
        if self._label is not None:
            self._label.__exit__(None, None, None)


class _HostClock:
    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._seconds: Seconds = dict.fromkeys(PHASES, 0.0)

    def mark(self, phase: Phase) -> None:
        """Until now it was ``phase``."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._since
        self._since = now

    def lap(self) -> Seconds | None:
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


class _DeviceClock:
    """The same with events on one stream of the device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        # DeepSpeed makes some collectives on streams of its own: marks of two do not compare.
        self._stream = torch.cuda.current_stream(device)
        self.restart()

    def restart(self) -> None:
        self._last = self._event()
        self._marks: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self._before: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self, phase: Phase) -> None:
        now = self._event()
        self._marks.append((phase, self._last, now))
        self._last = now

    def lap(self) -> Seconds | None:
        past, self._before, self._marks = self._before, self._marks, []
        if not past:
            return None
        past[-1][2].synchronize()  # has happened: the step since then has waited for the device
        seconds: Seconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in past:
            seconds[phase] += max(0.0, start.elapsed_time(end) / 1000.0)
        return seconds

    def _event(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

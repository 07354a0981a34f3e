"""How long a run still takes, reckoned from what it logs, and said no finer than it is known."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainerConfig

# Logged intervals looked back on: a third of those there are, within these bounds.
_LEAST_WINDOW, _MOST_WINDOW = 20, 1000
# An interval counts as so many typical ones at most: that a machine slept once, or that a storage
# hung, says nothing of what comes.
_MOST_TIMES_TYPICAL = 5.0
# The pace is known when there are so many intervals and its standard error is that small.
_LEAST_KNOWN, _MOST_ERROR = 3, 0.15
_VALIDATIONS_KEPT = 5


@dataclass(frozen=True)
class Left:
    """Training time left.

    Attributes:
        seconds: the estimate.
        is_least: a validation is due before the end, and how long one takes is not known yet.
        is_most: the run may stop earlier, when it does not improve any more.
    """

    seconds: float
    is_least: bool = False
    is_most: bool = False

    def __str__(self) -> str:
        text = rough(self.seconds)
        if self.is_least == self.is_most:
            return text
        bound = "at least" if self.is_least else "at most"
        return f"{bound} {text.removeprefix('about ')}"


class TimeLeft:
    """Estimates the time to the nearer of the two limits, ``max_steps`` and ``max_minutes``.

    The pace is that of a long window of logged intervals, validations taken out; those still due
    are added, each as long as the latest ones took. Time without training (restarts) is in neither.
    A group of another size begins anew.
    """

    def __init__(self, trainer: TrainerConfig) -> None:
        self._trainer = trainer
        self._intervals: deque[tuple[int, float]] = deque(maxlen=_MOST_WINDOW)  # steps, seconds
        self._validations_s: deque[float] = deque(maxlen=_VALIDATIONS_KEPT)
        self._world_size: int | None = None
        self._validated_at = 0  # step of the newest validation
        self._mark: tuple[int, float] | None = None  # step and clock of the last logged step
        self._paused_s = 0.0  # by validations since then

    def hear(self, event: dict[str, Any]) -> None:
        """Take notice of what the run logged."""
        kind = event.get("event")
        if kind in {"started", "resumed"}:
            self._mark, self._paused_s = None, 0.0
            self._validated_at = event.get("step") or 0
            self._is_of(event.get("world_size"))
        elif kind == "validated" and isinstance(event.get("seconds"), int | float):
            self._validations_s.append(event["seconds"])
            self._validated_at = event["step"]
            self._paused_s += event["seconds"]
        elif kind == "step" and isinstance(event.get("elapsed_s"), int | float):
            self._is_of(event.get("world_size"))
            self._stepped(event["step"], event["elapsed_s"])

    def left(self) -> Left | None:
        """After the last logged step; None where it is not known well enough."""
        if self._mark is None:
            return None
        step, elapsed_s = self._mark
        trainer, validation_s = self._trainer, self._validation_s()
        limits: list[tuple[float, int]] = []  # seconds, and validations to add to them
        if trainer.max_minutes is not None:
            # Its validations are within the limit, but for the one at the end.
            limits.append((trainer.max_minutes * 60 - elapsed_s + (validation_s or 0.0), 0))
        pace_s = self._pace_s()
        if trainer.max_steps is not None and pace_s is not None:
            due = self._validations_due(step, trainer.max_steps)
            seconds = (trainer.max_steps - step) * pace_s + due * (validation_s or 0.0)
            limits.append((seconds, due))
        if not limits:
            return None
        seconds, due = min(limits)
        if seconds <= 0 or step == trainer.max_steps:
            return None
        return Left(
            seconds,
            is_least=due > 0 and validation_s is None,
            is_most=trainer.patience is not None,
        )

    def _is_of(self, world_size: Any) -> None:
        if world_size != self._world_size:
            self._intervals.clear()
            self._validations_s.clear()
            self._world_size = world_size

    def _stepped(self, step: int, elapsed_s: float) -> None:
        if self._mark is not None and step > self._mark[0]:
            seconds = max(0.0, elapsed_s - self._mark[1] - self._paused_s)
            self._intervals.append((step - self._mark[0], seconds))
        self._mark, self._paused_s = (step, elapsed_s), 0.0

    def _pace_s(self) -> float | None:
        """Seconds a step without validations."""
        number = len(self._intervals)
        if number < _LEAST_KNOWN:
            return None
        window = list(self._intervals)[-max(_LEAST_WINDOW, number // 3) :]
        paces = [seconds / steps for steps, seconds in window]
        most = _MOST_TIMES_TYPICAL * statistics.median(paces)
        paces = [min(pace, most) for pace in paces]
        steps = [steps for steps, _ in window]
        mean = statistics.fmean(paces, weights=steps)
        error = statistics.stdev(paces) / len(paces) ** 0.5
        return mean if error <= _MOST_ERROR * mean else None

    def _validation_s(self) -> float | None:
        return statistics.median(self._validations_s) if self._validations_s else None

    def _validations_due(self, step: int, last: int) -> int:
        """From here to step ``last``; there is one at the end in any case."""
        every = self._trainer.validate_every
        done = min(last, max(step - 1, self._validated_at))  # that of ``step`` itself follows it
        return last // every - done // every + (last % every != 0 and self._validated_at < last)


def rough(seconds: float) -> str:
    """A time as a person would say an estimate: ``40 s``, ``12 min``, ``about 2 h``."""
    if seconds < 95:
        return f"{max(5, _to(seconds, 5 if seconds < 20 else 10)):.0f} s"
    minutes = seconds / 60
    if minutes < 95:
        nearest = 1 if minutes < 20 else 5 if minutes < 57.5 else 10
        return f"{_to(minutes, nearest):.0f} min"
    hours = minutes / 60
    if hours < 36:
        return f"about {_to(hours, 0.5 if hours < 4 else 1):g} h"
    return f"about {_to(hours / 24, 0.5 if hours < 24 * 7 else 1):g} days"


def _to(value: float, nearest: float) -> float:
    return round(value / nearest) * nearest

"""A run's events as lines for a person who watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.config import RunConfig


class Tail:
    """New whole lines of a JSON-lines file, each time it is asked.

    The file need not exist yet; it begins at its present end.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = file.stat().st_size if file.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects appended since the last call; a line cut short waits for its rest."""
        try:
            with self._file.open("rb") as stream:
                size = stream.seek(0, 2)
                # A file that was rewritten and is shorter now: what it holds was shown already.
                self._offset = min(self._offset, size)
                stream.seek(self._offset)
                chunk = stream.read()
        except FileNotFoundError:
            return
        whole = chunk.rfind(b"\n") + 1
        self._offset += whole
        for line in chunk[:whole].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


class Narrator:
    """Turns events into lines; remembers the pace, for the time that is left."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._previous: tuple[int, float] | None = None
        self.last_step = 0
        self.reason: str | None = None
        self.valid_nll: float | None = None
        self._failure: tuple[str | None, str | None] = None, None
        self._tellers: dict[str, Callable[[dict[str, Any]], str | None]] = {
            "started": self._started,
            "resumed": self._resumed,
            "step": self._step,
            "validated": self._validated,
            "checkpoint": self._checkpoint,
            "save_failed": self._save_failed,
            "skipped": self._skipped,
            "rewound": self._rewound,
            "handed_over": self._handed_over,
            "worker_failed": self._worker_failed,
            "waiting": self._waiting,
            "resized": self._resized,
            "evaluated": self._evaluated,
            "finished": self._finished,
        }

    def line(self, event: dict[str, Any]) -> str | None:
        """The line for an event, or None where it has nothing to say to a person."""
        teller = self._tellers.get(str(event.get("event")))
        if teller is None:
            return None
        # A checkpoint is told of when it is committed, steps after the one that it holds.
        if isinstance(event.get("step"), int) and event["event"] not in {
            "checkpoint",
            "save_failed",
            "evaluated",
        }:
            self.last_step = event["step"]
        return teller(event)

    def _step(self, event: dict[str, Any]) -> str:
        left = self._seconds_left(event)
        return (
            f"step {event['step']:>6}  epoch {_number(event.get('epoch'), 'd'):>3}"
            f"  loss {_number(event.get('mean_loss'), '.4f'):>8}"
            f"  {_number(event.get('tokens_per_second'), ',.0f'):>8} tokens/s"
            f"  rate {_number(event.get('learning_rate'), '.2e')}"
            + (f"  left {duration(left)}" if left is not None else "")
        )

    def _validated(self, event: dict[str, Any]) -> str:
        self.valid_nll = event.get("valid_nll")
        return (
            f"step {event['step']:>6}  validated: nll {_number(self.valid_nll, '.4f')}"
            f", perplexity {_number(event.get('perplexity'), '.2f')}"
        )

    def _checkpoint(self, event: dict[str, Any]) -> str:
        best = ", the best so far" if event.get("best") else ""
        megabytes = (event.get("bytes") or 0) / 1e6
        return (
            f"step {event['step']:>6}  checkpoint saved: {megabytes:.1f} MB"
            f" in {_number(event.get('seconds'), '.1f')} s{best}"
        )

    def _evaluated(self, event: dict[str, Any]) -> str:
        best = ", the best so far" if event.get("best") else ""
        return (
            f"step {event['step']:>6}  BLEU {_number(event.get('bleu'), '.2f')} on "
            f"{event.get('test_set')}{best}"
        )

    def _started(self, event: dict[str, Any]) -> str:
        self._previous = None
        return (
            f"started: {event.get('parameters', 0):,} parameters, "
            f"{event.get('steps_per_epoch', 0):,} steps an epoch"
        )

    def _resumed(self, event: dict[str, Any]) -> str:
        self._previous = None
        passed_over = "".join(
            f"passed over the checkpoint of step {step}: {'; '.join(why)}\n"
            for step, why in event.get("passed_over", {}).items()
        )
        return f"{passed_over}resumed from step {event.get('step')}"

    def _save_failed(self, event: dict[str, Any]) -> str:
        return f"step {event['step']:>6}  checkpoint NOT saved: {event.get('error')}" + (
            f"; trying again in {event['retry_seconds']:.0f} s"
            if event.get("retry_seconds")
            else ""
        )

    def _skipped(self, event: dict[str, Any]) -> str:
        return (
            f"step {event['step']:>6}  not trained on: {str(event.get('reason')).replace('_', ' ')}"
            f" (loss {_number(event.get('loss'), '.4f')}, gradient norm "
            f"{_number(event.get('grad_norm'), '.3g')})"
        )

    def _rewound(self, event: dict[str, Any]) -> str:
        return (
            f"step {event['step']:>6}  back to the weights of step {event.get('to_step')}; "
            "the data goes on from here"
        )

    def _handed_over(self, event: dict[str, Any]) -> str:
        return f"step {event['step']:>6}  saved, to go on with other workers"

    def _worker_failed(self, event: dict[str, Any]) -> str | None:
        if event.get("final"):
            return None  # the error message that follows says it
        message, cause = event.get("message"), event.get("cause")
        if (message, cause) == self._failure and cause == "start":
            return None  # tried again and again: once is enough
        self._failure = message, cause
        if cause == "start":
            return f"the workers do not start: {message}; trying again"
        if cause == "preempted":
            return f"moving on: {message}"
        left = event.get("restarts_left")
        bears = f" ({left} more without a new checkpoint are borne)" if left is not None else ""
        return f"failed: {message}; restarting from the last checkpoint{bears}"

    def _waiting(self, event: dict[str, Any]) -> str:
        room, needed = event.get("room"), event.get("needed")
        return f"waiting for machines: room for {room} of at least {needed} workers"

    def _resized(self, event: dict[str, Any]) -> str:
        number = event.get("to")
        workers = f"{number} worker{'' if number == 1 else 's'}"
        change = f"going on with {workers} instead of {event.get('from')}"
        if event.get("planned") and event.get("saved_at") is None:
            return f"{change}; no checkpoint was saved in time: some steps will be done again"
        return change

    def _finished(self, event: dict[str, Any]) -> str:
        self.reason = event.get("reason")
        return f"step {self.last_step:>6}  finished: {self.reason}"

    def _seconds_left(self, event: dict[str, Any]) -> float | None:
        """What is left to the nearer of the two limits, at the pace since the last logged step."""
        step, elapsed_s = event["step"], event.get("elapsed_s")
        if elapsed_s is None:
            return None
        previous, self._previous = self._previous, (step, elapsed_s)
        limits = []
        trainer = self._config.trainer
        if trainer.max_minutes is not None:
            limits.append(trainer.max_minutes * 60 - elapsed_s)
        if trainer.max_steps is not None and previous is not None and step > previous[0]:
            pace_s = (elapsed_s - previous[1]) / (step - previous[0])
            limits.append((trainer.max_steps - step) * pace_s)
        return max(0.0, min(limits)) if limits else None


def duration(seconds: float) -> str:
    """Seconds as a clock: ``0:42``, ``12:03``, ``3:25:45``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) else "-"

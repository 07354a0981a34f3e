"""A run's events as news for a person who watches: a line for each, and where the run stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.time_left import Left, TimeLeft
from trainer import startup
from trainer.config import RunConfig
from trainer.schedule import progress

Level = Literal["info", "warning", "error"]

_WARNINGS = frozenset({"worker_failed", "save_failed", "skipped", "rewound", "waiting"})
# Events whose ``step`` is where the run stands. (A checkpoint is told of when it is committed,
# steps after the one that it holds.)
_STANDING = frozenset(
    {
        "started", "resumed", "step", "validated", "skipped", "rewound", "handed_over", "recovered",
        "finished",
    }
)  # fmt: skip
# What an event means for what the run is doing.
_DOING = {
    "started": "training",
    "resumed": "training",
    "step": "training",
    "handed_over": "starting workers",
    "worker_failed": "restarting",
    "waiting": "waiting for machines",
    "resized": "starting workers",
    "finished": "finishing",
}


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        doing: in a word or three.
        step: the last logged one; ``max_steps`` is the limit, if there is one.
        done: the part of the run that is done, in [0, 1], by the limit that will end it first.
        loss, tokens_per_second: of the last logged step; None before there is one.
        left: from the last logged step on; None where it is not known well enough.
    """

    doing: str = "starting workers"
    step: int = 0
    max_steps: int | None = None
    done: float = 0.0
    loss: float | None = None
    tokens_per_second: float | None = None
    left: Left | None = None


@dataclass(frozen=True)
class News:
    """An event, its line for a person (None: it has nothing to say to one), and the state after."""

    event: dict[str, Any]
    line: str | None
    level: Level
    status: Status


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
    """Turns events into news; remembers the pace, for the time that is left.

    Args:
        past: what the run logged before, oldest first.
    """

    def __init__(self, config: RunConfig, past: Iterable[dict[str, Any]] = ()) -> None:
        self._config = config
        self._time_left = TimeLeft(config.trainer)
        self._stale = 0  # validations, or scores, since the best one
        self.last_step = 0
        for event in past:
            self._count_stale(event)
            self._follow_step(event)
        self._status = Status(step=self.last_step, max_steps=config.trainer.max_steps)
        self._restarts, self._down_s = 0, 0.0
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
            "recovered": self._recovered,
            "waiting": self._waiting,
            "resized": self._resized,
            "evaluated": self._evaluated,
            "finished": self._finished,
        }

    def hear(self, event: dict[str, Any]) -> News:
        """What an event of the run says to a person; events come in the order of the log."""
        kind = str(event.get("event"))
        self._follow_step(event)
        self._time_left.hear(event)
        self._count_stale(event)
        self._status = self._status_after(kind, event)
        teller = self._tellers.get(kind)
        level: Level = "warning" if kind in _WARNINGS else "info"
        if event.get("final"):
            level = "error"
        return News(event, teller(event) if teller is not None else None, level, self._status)

    def line(self, event: dict[str, Any]) -> str | None:
        """The line for an event, or None where it has nothing to say to a person."""
        return self.hear(event).line

    def _status_after(self, kind: str, event: dict[str, Any]) -> Status:
        status = replace(
            self._status, doing=_DOING.get(kind, self._status.doing), step=self.last_step
        )
        if kind != "step":
            return status
        elapsed_s = event.get("elapsed_s")
        return replace(
            status,
            done=progress(
                self._config.trainer, steps_done=event["step"], elapsed_s=elapsed_s or 0.0
            ),
            loss=event.get("mean_loss"),
            tokens_per_second=event.get("tokens_per_second"),
            left=self._time_left.left(),
        )

    def _follow_step(self, event: dict[str, Any]) -> None:
        if isinstance(event.get("step"), int) and event.get("event") in _STANDING:
            self.last_step = event["step"]

    def _count_stale(self, event: dict[str, Any]) -> None:
        """As the trainer, or who scores the checkpoints, counts: for ``patience``."""
        kind = event.get("event")
        judged = "validated" if self._config.trainer.best_by == "loss" else "evaluated"
        if kind == "started":
            self._stale = 0
        elif kind == judged and isinstance(event.get("best"), bool):
            self._stale = 0 if event["best"] else self._stale + 1

    def _staleness(self) -> str:
        """How near the run is to stopping early."""
        patience = self._config.trainer.patience
        if patience is None or self._stale == 0:
            return ""
        return f"; {self._stale} without a better one, the run stops at {patience}"

    def _step(self, event: dict[str, Any]) -> str:
        left = self._status.left
        return (
            f"step {event['step']:>6}  epoch {_number(event.get('epoch'), 'd'):>3}"
            f"  loss {_number(event.get('mean_loss'), '.4f'):>8}"
            f"  {_number(event.get('tokens_per_second'), ',.0f'):>8} tokens/s"
            f"  rate {_number(event.get('learning_rate'), '.2e')}"
            + (f"  left {left}" if left is not None else "")
        )

    def _validated(self, event: dict[str, Any]) -> str:
        self.valid_nll = event.get("valid_nll")
        return (
            f"step {event['step']:>6}  validated: nll {_number(self.valid_nll, '.4f')}"
            f", perplexity {_number(event.get('perplexity'), '.2f')}"
            + (self._staleness() if self._config.trainer.best_by == "loss" else "")
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
        counts = self._config.trainer.best_by == "bleu" and "best" in event
        return (
            f"step {event['step']:>6}  BLEU {_number(event.get('bleu'), '.2f')} on "
            f"{event.get('test_set')}{best}{self._staleness() if counts else ''}"
        )

    def _started(self, event: dict[str, Any]) -> str:
        return (
            f"started: {event.get('parameters', 0):,} parameters, "
            f"{event.get('steps_per_epoch', 0):,} steps an epoch{_start(event)}"
        )

    def _resumed(self, event: dict[str, Any]) -> str:
        passed_over = "".join(
            f"passed over the checkpoint of step {step}: {'; '.join(why)}\n"
            for step, why in event.get("passed_over", {}).items()
        )
        return f"{passed_over}resumed from step {event.get('step')}{_start(event)}"

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

    def _recovered(self, event: dict[str, Any]) -> str:
        seconds = event.get("seconds")
        self._restarts += 1
        self._down_s += seconds or 0.0
        return (
            f"step {event['step']:>6}  training again, {_number(seconds, '.1f')} s after the "
            "workers failed"
        )

    def _finished(self, event: dict[str, Any]) -> str:
        self.reason = event.get("reason")
        line = f"step {self.last_step:>6}  finished: {self.reason}"
        if not self._restarts:
            return line
        times = "once" if self._restarts == 1 else f"{self._restarts} times"
        return f"{line}; restarted {times}, {duration(self._down_s)} without training"


def duration(seconds: float) -> str:
    """Seconds as a clock: ``0:42``, ``12:03``, ``3:25:45``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _start(event: dict[str, Any]) -> str:
    """How long it took to get there, and what did."""
    parts = event.get("start_s")
    if not parts:
        return ""
    return f"; {sum(parts.values()):.1f} s after the command: {startup.described(parts)}"


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) else "-"

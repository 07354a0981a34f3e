"""What befell a run, and what it cost: restarts, lost seconds, steps done again, skipped steps."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer import exhibits_curves
from trainer.report_lines import Event, moment
from trainer.report_log import Attempt, RunLog
from trainer.run import open_checkpoints

_CAUSES = {
    "killed": "a worker was killed",
    "hung": "a worker hung",
    "exception": "a worker failed",
    "preempted": "a machine was taken away",
    "start": "workers could not start",
    "controller": "the controller was lost",
    "resized": "the number of workers changed",
    "stopped": "stopped on request, resumed by command",
    "ended": "had ended, resumed by command",
    "given_up": "was given up, resumed by command",
    "command": "the command itself ended, resumed by command",
}


def numbers(log: RunLog) -> dict[str, Any]:
    """Plain values.

    Returns:
        ``restarts`` (a row each: see ``restarts``), ``restarts_by_cause``, ``lost_seconds`` and
        ``redone_steps``, ``redone_seconds`` (sums over the restarts), ``useful_share`` (training
        time that was kept, of all time between the first line and the last; None where nothing was
        timed), ``checkpoints``, ``skipped_by_reason``, ``rewinds``, ``failed_saves``,
        ``data_hash`` with the ``data_hash_step`` that it is of.
    """
    rows = restarts(log)
    causes = Counter(row["cause"] for row in rows)
    saved = [line for line in log.raw if line["event"] == "checkpoint"]
    skipped = Counter(str(e.get("reason")) for e in log.raw if e["event"] == "skipped")
    return {
        "restarts": rows,
        "restarts_by_cause": dict(sorted(causes.items())),
        "lost_seconds": sum(row["lost_seconds"] or 0.0 for row in rows),
        "redone_steps": sum(row["redone_steps"] for row in rows),
        "redone_seconds": sum(row["redone_seconds"] for row in rows),
        "useful_share": _useful_share(log, rows),
        "checkpoints": {
            "written": len(saved),
            "stall_seconds": sum(line.get("stall_seconds") or 0.0 for line in saved),
            "write_seconds": sum(line.get("seconds") or 0.0 for line in saved),
            "bytes": next((e["bytes"] for e in reversed(saved) if e.get("bytes")), None),
        },
        "failed_saves": sum(line["event"] == "save_failed" for line in log.raw),
        "skipped_steps": sum(skipped.values()),
        "skipped_by_reason": dict(sorted(skipped.items())),
        "rewinds": sum(line["event"] == "rewound" for line in log.raw),
        "data_hash": log.hashed.get("data_hash"),
        "data_hash_step": log.hashed.get("step"),
        "log_every": log.config.trainer.log_every,
    }


def told_cause(cause: str) -> str:
    """A cause as one would say it."""
    return _CAUSES.get(cause, cause.replace("_", " "))


def told_restarts(rows: list[dict[str, Any]]) -> str:
    """How often the run started again by itself, and how often a command resumed it."""
    by_hand = sum(row["by_hand"] for row in rows)
    told = [
        f"{word} {_times(count)}"
        for word, count in (("restarted", len(rows) - by_hand), ("resumed", by_hand))
        if count
    ]
    return ", ".join(told)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def restarts(log: RunLog) -> list[dict[str, Any]]:
    """A row for each time that workers were started again, oldest first.

    ``by_hand``: by a command. ``step``, ``workers``: None for workers that logged nothing.
    ``lost_seconds``: from the failure to the next update, as the run measured it, or to the first
    line of the new workers; where they made no update, to what came next: another failure, or that
    the run was given up. None where a command went on. ``redone_steps``: those the earlier workers
    are known to have made beyond where these began: by what was logged, so at least.
    """
    rows: list[dict[str, Any]] = []
    # The row whose workers have made no update so far, and when the first failure was since one.
    pending: _Row | None = None
    failed_at: float | None = None
    attempts = log.attempts
    for number, attempt in enumerate([*attempts, None]):
        before = attempts[number - 1] if number else None
        parts = [*attempt.given_up, attempt.failures] if attempt else log.failed_since
        for place, part in enumerate(parts):
            if place:  # from here on it was another command
                pending = failed_at = None
            triggers = _triggers(part)
            for line in part:
                at = moment(line)
                if pending is not None and at is not None:
                    pending.lose_until(at)
                if any(line is trigger for trigger in triggers):
                    failed_at = at if failed_at is None else failed_at
                    pending = _Row(_failed(line, before), at)
                    rows.append(pending.values)
        if attempt is None:
            break
        recovered = next((line for line in attempt.lines if line["event"] == "recovered"), {})
        is_new = number > 0 and (
            bool(attempt.given_up) or not (_triggers(attempt.failures) or recovered)
        )
        own = pending.values if pending is not None and _triggers(attempt.failures) else None
        if is_new and before is not None:
            row = _failed({"cause": _end(attempt, before), "time": attempt.began_at}, before)
            row |= {"by_hand": True, "lost_seconds": None, "failures": 0}
            rows.insert(len(rows) - (own is not None), row)
            own = own or row
        elif own is None and recovered:
            pending = _Row(_failed(recovered, before), None)
            own = pending.values
            rows.append(own)
        if own is not None:
            own |= _begun(attempt, before)
        if pending is not None:
            pending.recover(attempt, recovered, failed_at)
            if not attempt.is_idle:
                pending = failed_at = None
    return rows


@dataclass
class _Row:
    """A row in the making, and the Unix seconds of the failure."""

    values: dict[str, Any]
    since: float | None

    def lose_until(self, at: float) -> None:
        """What was still being restarted at ``at`` had made no update."""
        if self.since is not None:
            self.values["lost_seconds"] = max(
                self.values["lost_seconds"] or 0.0, at - self.since, 0.0
            )

    def recover(self, attempt: Attempt, recovered: Event, failed_at: float | None) -> None:
        """The workers of ``attempt`` are there."""
        if recovered.get("seconds") is not None:
            # Measured from the first failure on; the earlier rows have their parts.
            earlier = self.since - failed_at if self.since and failed_at else 0.0
            self.values["lost_seconds"] = max(0.0, recovered["seconds"] - earlier)
        else:
            at = attempt.ended_at if attempt.is_idle else attempt.began_at
            if at is not None:
                self.lose_until(at)


def _triggers(part: list[Event]) -> list[Event]:
    """Lines of the failures' log that each made the workers be started again."""
    found = [
        line
        for line in part
        if (line["event"] == "worker_failed" and not line.get("final"))
        or (line["event"] == "resized" and line.get("planned"))
    ]
    return found or [line for line in part if line["event"] == "resized"][:1]


def _failed(line: Event, before: Attempt | None) -> dict[str, Any]:
    """A row as far as the failure tells it."""
    cause = "resized" if line.get("event") == "resized" else line.get("cause")
    return {
        "time": moment(line),
        "step": None,
        "cause": str(cause or "exception"),
        "by_hand": False,
        "message": str(line.get("message") or ""),
        "failures": 1,
        "workers_before": before.num_workers if before else None,
        "workers": None,
        "lost_seconds": 0.0,
        "redone_steps": 0,
        "redone_seconds": 0.0,
    }


def _begun(attempt: Attempt, before: Attempt | None) -> dict[str, Any]:
    """What the new workers add to a row."""
    found = {"time": attempt.began_at, "step": attempt.first_step, "workers": attempt.num_workers}
    if before is None:
        return found
    return {
        **found,
        "redone_steps": max(0, before.last_step - attempt.first_step),
        "redone_seconds": max(
            0.0, before.ended_with("elapsed_s") - attempt.begun_with["elapsed_s"]
        ),
    }


def _end(attempt: Attempt, before: Attempt) -> str:
    """Why a command had to go on with the run."""
    if any(failure.get("final") for part in attempt.given_up for failure in part):
        return "given_up"
    ends = [line for line in before.lines if line["event"] == "finished"]
    if ends:
        return "stopped" if ends[-1].get("reason") == "stopped" else "ended"
    return "command"


def _useful_share(log: RunLog, restarts: list[dict[str, Any]]) -> float | None:
    trained = sum(attempt.training_s for attempt in log.attempts)
    whole = trained + sum(row["lost_seconds"] or 0.0 for row in restarts)
    kept = trained - sum(row["redone_seconds"] for row in restarts)
    return kept / whole if whole > 0 else None


def history(log: RunLog) -> list[dict[str, Any]]:
    """What happened besides steps, validations, their BLEU and checkpoints."""
    told = []
    hidden = {"event", "time", "step", "elapsed_s", "machine", "versions", "pairs"}
    for event in log.events:
        if event["event"] in ("step", "validated", "checkpoint"):
            continue
        if exhibits_curves.is_validation_bleu(event):
            continue
        details = ", ".join(
            f"{name.replace('_', ' ')} {_detail(value)}"
            for name, value in event.items()
            if name not in hidden and value is not None
        )
        told.append(
            {
                "time": event.get("time"),
                "step": event.get("step"),
                "event": event["event"],
                "details": details,
            }
        )
    return told


def checkpoints(log: RunLog) -> dict[str, Any] | None:
    """How many were written, which are kept, their size and time; None where there are none."""
    written = log.of("checkpoint")
    kept = open_checkpoints(log.run_dir).committed()
    if not written and not kept:
        return None
    sizes = [event["bytes"] for event in written if event.get("bytes")]
    seconds = [event["seconds"] for event in written if event.get("seconds") is not None]
    return {
        "written": len(written),
        "kept": ", ".join(f"{step:,}" for step in kept) or "none",
        "bytes": sizes[-1] if sizes else None,
        "seconds": statistics.fmean(seconds) if seconds else None,
    }


def _detail(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

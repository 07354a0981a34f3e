"""What befell a run, and what it cost: restarts, lost seconds, steps done again, skipped steps."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from trainer import exhibits_curves
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
    "command": "the command itself ended, resumed by command",
}


def numbers(log: RunLog) -> dict[str, Any]:
    """Plain values.

    Returns:
        ``restarts`` (a row each: see ``_restart``), ``restarts_by_cause``, ``lost_seconds`` and
        ``redone_steps``, ``redone_seconds`` (sums over the restarts), ``useful_share`` (training
        time that was kept, of all time between the first line and the last; None where nothing was
        timed), ``checkpoints``, ``skipped_by_reason``, ``rewinds``, ``failed_saves``,
        ``data_hash``.
    """
    restarts = [
        _restart(log, number) for number in range(1, len(log.attempts))
    ]  # fmt: skip
    causes = Counter(
        str(failure.get("cause"))
        for failure in log.failures
        if failure["event"] == "worker_failed" and not failure.get("final")
    )
    causes.update(row["cause"] for row in restarts if not row["failures"])
    saved = [line for line in log.raw if line["event"] == "checkpoint"]
    skipped = Counter(str(e.get("reason")) for e in log.raw if e["event"] == "skipped")
    return {
        "restarts": restarts,
        "restarts_by_cause": dict(sorted(causes.items())),
        "lost_seconds": sum(row["lost_seconds"] or 0.0 for row in restarts),
        "redone_steps": sum(row["redone_steps"] for row in restarts),
        "redone_seconds": sum(row["redone_seconds"] for row in restarts),
        "useful_share": _useful_share(log, restarts),
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
        "data_hash": log.last("data_hash", "step", "skipped"),
        "log_every": log.config.trainer.log_every,
    }


def told_cause(cause: str) -> str:
    """A cause as one would say it."""
    return _CAUSES.get(cause, cause.replace("_", " "))


def _restart(log: RunLog, number: int) -> dict[str, Any]:
    """One attempt after the first, and what the change cost.

    ``lost_seconds``: from the failure to the next update, as the run measured it, or to the first
    line of the new workers; None where nothing was held between. ``redone_steps``: those the
    earlier attempt is known to have made beyond where this one began: by logged steps, so at least.
    """
    attempt, before = log.attempts[number], log.attempts[number - 1]
    recovered = next((line for line in attempt.lines if line["event"] == "recovered"), {})
    lost = recovered.get("seconds")
    if lost is None and attempt.failures and attempt.began_at is not None:
        since = attempt.failures[0].get("time") or before.ended_at
        lost = max(0.0, attempt.began_at - since) if since is not None else None
    messages = [f["message"] for f in attempt.failures if f.get("message")]
    return {
        "time": attempt.began_at,
        "step": attempt.first_step,
        "cause": _cause(attempt, before, recovered.get("cause")),
        "message": recovered.get("message") or (messages[0] if messages else ""),
        "failures": len(attempt.failures),
        "workers_before": before.num_workers,
        "workers": attempt.num_workers,
        "lost_seconds": lost,
        "redone_steps": max(0, before.last_step - attempt.first_step),
        "redone_seconds": max(
            0.0, before.ended_with("elapsed_s") - attempt.begun_with["elapsed_s"]
        ),
    }


def _cause(attempt: Attempt, before: Attempt, measured: str | None) -> str:
    for failure in attempt.failures:
        if failure["event"] == "worker_failed":
            return str(failure.get("cause") or measured)
    if measured:
        return str(measured)
    if any(failure["event"] == "resized" for failure in attempt.failures):
        return "resized"
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

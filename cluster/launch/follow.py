"""A launched job as its lines come, told as ``babelray train`` tells of a run on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any

from cluster.console import Console
from cluster.launch.target import Ended, Job, LogLine, Update, Waiting
from cluster.progress import Level, Narrator
from trainer.config import RunConfig

# What is to be typed next differs here.
_HINTS = ("next: ", "stopped at step ")
_LEVELS: tuple[Level, ...] = ("info", "warning", "error")


def follow_training(
    updates: Iterable[Update],
    config: RunConfig,
    console: Console,
    *,
    begun: Callable[[], None] = lambda: None,
) -> Job | None:
    """Tell the console of a job whose command logs as JSON (``--log-format json``).

    Args:
        updates: of the job.
        config: the run's, for the time that is left.
        console: takes all but hints of what to type next on the cluster.
        begun: called when ranks have taken up the run: its configuration was accepted.

    Returns:
        The job when it was over; None if the updates ended before.
    """
    narrator = Narrator(config)

    def tell(line: str) -> None:
        entry = read_entry(line)
        if entry is None:
            console.say(line)
            return
        event, message, level = entry
        if "event" not in event:
            if not message.startswith(_HINTS):
                console.say(message, level)
            return
        if event["event"] in {"started", "resumed"}:
            begun()
        news = narrator.hear(event)
        # It was put into words where the run's whole past is known.
        console.tell(replace(news, line=message if news.line is not None else None, level=level))

    job = follow_lines(updates, tell, waiting=console.say)
    if job is not None and job.phase == "succeeded" and narrator.reason == "stopped":
        return replace(job, phase="stopped")  # on request; for the cluster it ended well
    return job


def follow_lines(
    updates: Iterable[Update], tell: Callable[[str], None], *, waiting: Callable[[str], None]
) -> Job | None:
    """Hand on the lines of any job, and why it waits; returns as ``follow_training``."""
    for update in updates:
        match update:
            case LogLine(text):
                tell(text)
            case Waiting(reason):
                waiting(f"waiting: {reason}")
            case Ended(job):
                return job
    return None


def read_entry(line: str) -> tuple[dict[str, Any], str, Level] | None:
    """What ``cluster.console.JsonConsole`` has written; None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        values = json.loads(line)
        message, level = values["message"], values.pop("level")
        values["time"] = datetime.fromisoformat(values["time"]).timestamp()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(message, str) or level not in _LEVELS:
        return None
    return values, message, level

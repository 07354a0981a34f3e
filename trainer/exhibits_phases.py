"""Where a step's time went, phase by phase."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from trainer import figures
from trainer.figures import Series
from trainer.report_lines import Event
from trainer.report_log import RunLog

# In the order of a step, each with what it is.
PHASES = {
    "data_wait": "waiting for the next batch",
    "forward": "the forward pass and the loss",
    "backward": "the backward pass",
    "communication": "exchanging gradients, and waiting for slower workers",
    "optimizer": "clipping and the update",
    "checkpoint": "standing still for a checkpoint",
    "validation": "validating, spread over the steps",
    "other": "all else: logging, bookkeeping",
}
_MAX_POINTS = 120


def rows(log: RunLog) -> list[dict[str, Any]]:
    """Each phase's ``seconds`` a step, the mean over all steps, and its ``share`` of the step.

    The steps are rank 0's, those of the history; empty for logs that have no phases.
    """
    taken = _intervals(log)
    if not taken:
        return []
    weights = np.array([steps for steps, _ in taken], dtype=float)
    means = {
        name: float(np.average([_seconds(event, name) for _, event in taken], weights=weights))
        for name in _names(taken)
    }
    total = sum(means.values()) or 1.0
    return [
        {
            "phase": name,
            "what": PHASES.get(name, ""),
            "seconds": mean,
            "share": mean / total,
        }
        for name, mean in means.items()
    ]


def chart(log: RunLog) -> Markup | None:
    """The phases over the steps, one on the other; None for logs that have no phases."""
    taken = _intervals(log)
    taken = taken[1:] or taken  # the first step also warms up
    if not taken:
        return None
    groups = np.array_split(np.arange(len(taken)), min(len(taken), _MAX_POINTS))
    lines = []
    for name in _names(taken):
        values = [
            float(
                np.average(
                    [_seconds(taken[i][1], name) for i in group],
                    weights=[taken[i][0] for i in group],
                )
            )
            for group in groups
        ]
        steps = [float(taken[group[-1]][1]["step"]) for group in groups]
        lines.append(Series(name.replace("_", " "), steps, values))
    shares = ", ".join(f"{row['phase'].replace('_', ' ')} {row['share']:.0%}" for row in rows(log))
    picture = figures.areas(
        lines,
        name="phases",
        title=f"Phases of a step over the run, in seconds, one on the other. On average: {shares}.",
        y_label="seconds a step",
    )
    return Markup(picture)  # noqa: S704


def _intervals(log: RunLog) -> list[tuple[int, Event]]:
    """Logged steps that have phases, each with the number of steps that its means are over."""
    taken, before = [], 0
    for event in log.steps:
        if isinstance(event.get("phases"), dict) and event["phases"]:
            taken.append((max(1, event["step"] - before), event))
        before = event["step"]
    return taken


def _names(taken: list[tuple[int, Event]]) -> list[str]:
    logged = {name for _, event in taken for name in event["phases"]}
    return [name for name in PHASES if name in logged] + sorted(logged - set(PHASES))


def _seconds(event: Event, name: str) -> float:
    return float(event["phases"].get(name) or 0.0)

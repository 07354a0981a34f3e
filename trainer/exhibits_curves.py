"""What a report draws over a run's steps: curves, and marks where something happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from trainer import figures
from trainer.evaluate import Result
from trainer.figures import Mark, Series
from trainer.formats import format_number
from trainer.report_lines import Event
from trainer.report_log import RunLog

_MAX_CURVE_POINTS = 1500

# What the marks of these events are called, in the order of the legend.
_MARKED = ("resumed", "restarted", "resized", "skipped", "rewound")


@dataclass(frozen=True)
class Chart:
    """Curves that belong into one picture; their x are steps.

    Attributes:
        name: unique within a page, fit for an id.
    """

    name: str
    heading: str
    note: str
    y_label: str
    lines: list[Series]
    from_zero: bool = False


def charts(log: RunLog) -> list[Chart]:
    """All that this run has numbers for, the loss first."""
    steps = _thinned(log.steps)
    settled = steps[1:] or steps  # the first step also warms up
    validated = log.of("validated")
    workers = _series(steps, "world_size", "workers")
    if workers and len(set(workers[0].y)) == 1:
        workers = []
    scales = _series(steps, "loss_scale", "scale")
    if scales and len(set(scales[0].y)) == 1:
        scales = []
    memory = [_with_peak_memory(event) for event in steps]
    found = (
        Chart(
            "loss",
            "Loss",
            "Negative log-likelihood a target token, without label smoothing.",
            "nats a token",
            (_series(steps, "mean_nll", "training") or _series(steps, "nll", "training"))
            + _series(validated, "valid_nll", "validation"),
        ),
        Chart(
            "bleu",
            "BLEU",
            "Of single checkpoints, by test set.",
            "BLEU",
            _bleu(log.events, log.evaluations),
        ),
        Chart(
            "rate",
            "Learning rate",
            "Of each logged step.",
            "rate",
            _series(steps, "learning_rate", "rate"),
            from_zero=True,
        ),
        Chart(
            "speed",
            "Throughput",
            "Source and target tokens; padding is not counted.",
            "tokens a second",
            _series(settled, "tokens_per_second", "throughput"),
            from_zero=True,
        ),
        Chart(
            "norm",
            "Gradient norm",
            "Before clipping.",
            "norm",
            _series(steps, "grad_norm", "norm"),
            from_zero=True,
        ),
        Chart(
            "mfu",
            "Model FLOPs utilisation",
            "The model's own operations, of what the devices could do at their peak.",
            "per cent",
            _series(settled, "mfu", "MFU", scale=100),
            from_zero=True,
        ),
        Chart(
            "padding",
            "Padding efficiency",
            "Real tokens among all that were computed.",
            "per cent",
            _series(steps, "padding_efficiency", "real tokens", scale=100),
        ),
        Chart(
            "skew",
            "Skew between workers",
            "The slowest worker's own time a token over the median worker's; 1 is even.",
            "ratio",
            _series(settled, "skew", "skew"),
        ),
        Chart("workers", "Workers", "That train together.", "workers", workers, from_zero=True),
        Chart("scale", "Loss scale", "Of fp16.", "scale", scales),
        Chart(
            "memory",
            "GPU memory",
            "Of rank 0.",
            "GB",
            _series(memory, "gpu_memory", "allocated", scale=1e-9),
            from_zero=True,
        ),
    )
    return [chart for chart in found if chart.lines]


def drawn(log: RunLog) -> list[dict[str, Any]]:
    """The charts with their marks, each with ``heading``, ``note``, ``svg`` and ``wide``."""
    found = charts(log)
    places = marks(log)
    # Two in a row: of an odd number the first takes a row of its own.
    return [
        _drawn(chart, places, wide=number == 0 and len(found) % 2 == 1)
        for number, chart in enumerate(found)
    ]


def marks(log: RunLog) -> list[Mark]:
    """Where the run was resumed by hand, restarted by itself, resized, skipped or went back."""
    places: dict[str, list[float]] = {kind: [] for kind in _MARKED}
    for attempt, before in zip(log.attempts[1:], log.attempts, strict=False):
        kinds = {line["event"] for line in attempt.lines}
        was_failure = any(failure["event"] == "worker_failed" for failure in attempt.failures)
        if attempt.num_workers != before.num_workers:
            places["resized"].append(attempt.first_step)
        elif "recovered" in kinds or was_failure:
            places["restarted"].append(attempt.first_step)
        else:
            places["resumed"].append(attempt.first_step)
    for event in log.raw:
        if event["event"] in ("skipped", "rewound") and isinstance(event.get("step"), int):
            places[event["event"]].append(event["step"])
    return [Mark(kind, sorted(set(found))) for kind, found in places.items() if found]


def is_validation_bleu(event: Event) -> bool:
    """Whether the event is of a checkpoint that was scored beside the training."""
    return event["event"] == "evaluated" and event.get("checkpoint") == str(event.get("step"))


def against(log: RunLog, key: str, line: Series) -> Series:
    """The same curve over training time in hours (``hours``) or tokens (``tokens``) or ``step``.

    Between logged steps both are reckoned.
    """
    if key == "step":
        return line
    points = [(0.0, 0.0)]
    for event in log.steps:
        if event.get("elapsed_s") is not None:
            tokens = (event.get("source_tokens") or 0) + (event.get("target_tokens") or 0)
            points.append((event["step"], event["elapsed_s"] / 3600 if key == "hours" else tokens))
    steps, values = zip(*sorted(points), strict=True)
    return replace(line, x=np.interp(line.x, steps, values).tolist())


def _series(source: Sequence[Event], key: str, label: str, *, scale: float = 1) -> list[Series]:
    points = [(e["step"], scale * e[key]) for e in source if e.get(key) is not None]
    return [Series(label, *zip(*points, strict=True))] if points else []


def _with_peak_memory(event: Event) -> Event:
    """Memory may be one number, or several by kind."""
    value = event.get("gpu_memory_bytes")
    if isinstance(value, dict):
        value = value.get("peak") or value.get("allocated")
    return {"step": event.get("step"), "gpu_memory": value}


def _bleu(events: list[Event], evaluations: list[Result]) -> list[Series]:
    """A curve for each test set with two checkpoints at least, one point a step: those scored while
    training, and those evaluated since; averages and ensembles aside.
    """
    points: dict[str, dict[int, float]] = {}
    for event in events:
        if is_validation_bleu(event):
            points.setdefault(event["test_set"], {})[event["step"]] = event["bleu"]
    for result in evaluations:
        is_single = len(result.averaged_steps) == 1 and not result.ensemble
        if is_single and result.checkpoint != "ema":
            points.setdefault(result.test_set, {})[result.step] = result.bleu
    return [
        Series(test_set, *zip(*sorted(bleu.items()), strict=True))
        for test_set, bleu in points.items()
        if len(bleu) > 1
    ]


def _drawn(chart: Chart, places: list[Mark], *, wide: bool) -> dict[str, Any]:
    picture = figures.curves(
        chart.lines,
        name=chart.name,
        title=f"{chart.heading} over steps. {told(chart.lines)}{_told_marks(places)}",
        y_label=chart.y_label,
        marks=places,
        from_zero=chart.from_zero,
        wide=wide,
    )
    return {
        "heading": chart.heading,
        "note": chart.note,
        "svg": Markup(picture),  # noqa: S704
        "wide": wide,
    }


def told(lines: Sequence[Series]) -> str:
    """The curves in words, for who does not see them."""
    return (
        "; ".join(
            f"{line.label}: {format_number(line.y[-1])} at last, "
            f"between {format_number(min(line.y))} and {format_number(max(line.y))}"
            for line in lines
        )
        + "."
    )


def _told_marks(places: list[Mark]) -> str:
    named = [
        f"{mark.kind} at step {', '.join(f'{x:,.0f}' for x in mark.x[:10])}"
        + (" and others" if len(mark.x) > 10 else "")
        for mark in places
    ]
    return f" Marks: {'; '.join(named)}." if named else ""


def _thinned(steps: list[Event]) -> list[Event]:
    """Evenly taken points, the last one among them: a screen shows no more."""
    if len(steps) <= _MAX_CURVE_POINTS:
        return steps
    taken = np.linspace(0, len(steps) - 1, _MAX_CURVE_POINTS).round().astype(int)
    return [steps[index] for index in taken]

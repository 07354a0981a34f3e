"""Several runs side by side in one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_shards.errors import UserError
from trainer import exhibits_curves, exhibits_evaluation, exhibits_summary, figures
from trainer.exhibits_cost import Rate, format_flops
from trainer.exhibits_reliability import told_restarts
from trainer.figures import Series
from trainer.formats import format_duration, format_number, format_share
from trainer.report_log import RunLog, read_run
from trainer.report_numbers import bleu_interval, compared, numbers
from trainer.report_page import render
from trainer.storage import write_atomically

# What the curves can stand over: name, heading, label of the axis.
_AXES = (
    ("step", "Against steps", "step"),
    ("hours", "Against training time", "hours of training"),
    ("tokens", "Against tokens", "source and target tokens"),
)
_SHOWN = ("loss", "bleu", "speed", "mfu", "rate", "norm", "padding", "skew")


def default_output(runs: Path, names: Sequence[str]) -> Path:
    """Where the page of these runs goes if nobody says."""
    file = f"report-{'-'.join(names)}"
    return runs / f"{file[:200]}.html"


def read_runs(
    run_dirs: Sequence[Path], *, is_live: Callable[[Path], bool] | None = None
) -> list[RunLog]:
    """The runs, each under a name of its own: the folder's, with the parent's where two are alike.

    Args:
        is_live: tells whether a run is being trained now.

    Raises:
        UserError: a folder holds no run, or is given twice.
    """
    resolved = [folder.resolve() for folder in run_dirs]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{run_dirs[number]}: given twice; name each run once")
    logs = [read_run(folder, is_live=is_live(folder) if is_live else None) for folder in run_dirs]
    names = [log.name for log in logs]
    return [
        replace(log, name=f"{folder.parent.name}/{log.name}") if names.count(log.name) > 1 else log
        for log, folder in zip(logs, resolved, strict=True)
    ]


def write_comparison(logs: Sequence[RunLog], file: Path, *, rate: Rate | None = None) -> Path:
    """Write the page of several runs, one file without any reference to another.

    Raises:
        UserError: the file cannot be written.
    """
    _make_room(file)
    every = [numbers(log, rate) for log in logs]
    differences = compared(every)
    context = {
        "runs": [
            {
                "name": log.name,
                "color": number % len(figures.SERIES) + 1,
                "summary": exhibits_summary.summary(log),
                "state": exhibits_summary.state(log),
            }
            for number, log in enumerate(logs)
        ],
        "tiles": _tiles(every),
        "axes": [
            {"name": name, "heading": heading, "charts": _charts(logs, name, label)}
            for name, heading, label in _AXES
        ],
        "evaluations": [
            {**row, "run": log.name, "interval": bleu_interval(result)}
            for log in logs
            for row, result in zip(
                exhibits_evaluation.results(log.evaluations), log.evaluations, strict=True
            )
        ],
        "warnings": _warnings(logs),
        "signatures": exhibits_evaluation.signatures([r for log in logs for r in log.evaluations]),
        "comparisons": [
            one
            for log in logs
            for one in exhibits_evaluation.comparisons(log.evaluations)
            if _is_among(one, logs)
        ],
        "cost": _cost(every),
        "reliability": _reliability(every),
        "settings": differences["configuration_differences"],
        "environment": differences["environment_differences"],
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    write_atomically(file, render("comparison.html.j2", context))
    return file


def _make_room(file: Path) -> None:
    """Drawing takes seconds: a place that cannot be written is said first."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the page cannot be written: {file}: {error.strerror}: give --output another place"
        ) from None


def _tiles(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``label``, and of each run ``value`` and ``note``; what no run has is left out."""

    def bleu(one: dict[str, Any]) -> tuple[str | None, str]:
        ranked = sorted(
            one["evaluations"],
            key=lambda r: (r["test_set"] == "test", r["checkpoint"] == "best", r["time"]),
        )
        if not ranked:
            return None, "not evaluated"
        main = ranked[-1]
        interval = "" if main["bleu_interval"] is None else f", ± {main['bleu_interval']:.2f}"
        return f"{main['bleu']:.2f}", f"{main['test_set']}, {main['checkpoint']}{interval}"

    def plain(section: str, key: str, show: Any) -> Any:
        def read(one: dict[str, Any]) -> tuple[str | None, str]:
            value = one[section][key]
            return (None if value is None else show(value)), ""

        return read

    def tokens(one: dict[str, Any]) -> tuple[str | None, str]:
        found = one["training"]
        source, target, step = found["source_tokens"], found["target_tokens"], found["tokens_step"]
        if not source or not target:
            return None, ""
        place = f"at step {step:,} (the last logged)" if step < found["steps"] else ""
        return format_number(source + target), place

    def perplexity(one: dict[str, Any]) -> tuple[str | None, str]:
        found = one["validation"]
        if found["best_perplexity"] is None:
            return None, ""
        return f"{found['best_perplexity']:.2f}", f"step {found['best_step']:,}"

    listed = []
    for label, read in (
        ("BLEU", bleu),
        ("Validation perplexity", perplexity),
        ("Steps", plain("training", "steps", format_number)),
        ("Tokens trained on", tokens),
        ("Training time", plain("training", "training_seconds", format_duration)),
        ("Tokens a second", plain("training", "tokens_per_second", format_number)),
        ("MFU", plain("training", "mfu", format_share)),
        ("Workers", plain("training", "workers", str)),
        ("Parameters", plain("training", "parameters", format_number)),
    ):
        values = [read(one) for one in every]
        if any(value is not None for value, _ in values):
            listed.append(
                {
                    "label": label,
                    "values": [{"value": value or "–", "note": note} for value, note in values],
                }
            )
    return listed


def _charts(logs: Sequence[RunLog], axis: str, x_label: str) -> list[dict[str, Any]]:
    """One picture for each quantity that two runs or more have, a line a run."""
    lines: dict[tuple[str, str], list[Series]] = {}
    first: dict[tuple[str, str], exhibits_curves.Chart] = {}
    colors: dict[tuple[str, str], list[int]] = {}
    for number, log in enumerate(logs):
        for chart in exhibits_curves.charts(log):
            if chart.name not in _SHOWN:
                continue
            for line in chart.lines:
                key = chart.name, line.label
                moved = exhibits_curves.against(log, axis, line)
                lines.setdefault(key, []).append(replace(moved, label=log.name))
                colors.setdefault(key, []).append(number)
                first.setdefault(key, chart)
    drawn: list[dict[str, Any]] = []
    for key in sorted(lines, key=lambda key: _SHOWN.index(key[0])):
        name, label = key
        chart = first[key]
        heading = f"{chart.heading}: {label}" if name in ("loss", "bleu") else chart.heading
        picture = figures.curves(
            lines[key],
            name=f"{axis}-{name}-{len(drawn)}",
            title=f"{heading}, over {x_label}. {exhibits_curves.told(lines[key])}",
            y_label=chart.y_label,
            x_label=x_label,
            has_whole_x=axis != "hours",
            from_zero=chart.from_zero,
            looks=colors[key],
        )
        drawn.append({"heading": heading, "note": chart.note, "svg": Markup(picture)})  # noqa: S704
    return drawn


def _cost(every: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a name, and each run's value."""

    def energy(cost: dict[str, Any]) -> str:
        value = cost["energy_kwh"]
        return "not known" if value is None else f"{value:.4g} kWh"

    def price(cost: dict[str, Any]) -> str:
        return f"{cost['price']:,.2f} {cost['currency']}"

    shown: list[tuple[str, Any]] = [
        ("Operations, counted", lambda cost: format_flops(cost["counted_flops"])),
        ("Operations, the paper's method", lambda cost: format_flops(cost["paper_flops"])),
        ("Counted over the paper's", lambda cost: format_share(cost["ratio"])),
        ("Training time, all attempts", lambda cost: format_duration(cost["training_s"])),
        ("Device-hours, training", lambda cost: f"{cost['device_hours']:.3g}"),
        ("Device-hours, held", lambda cost: f"{cost['held_device_hours']:.3g}"),
        ("Energy", energy),
    ]
    if every[0]["cost"]["price"] is not None:
        shown.append(("Price", price))
    return [(name, [show(one["cost"]) for one in every]) for name, show in shown]


def _reliability(every: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def data_hash(found: dict[str, Any]) -> str:
        if not found["data_hash"]:
            return "–"
        return f"{found['data_hash']} at step {found['data_hash_step']:,}"

    shown: list[tuple[str, Any]] = [
        ("Restarts", lambda one: told_restarts(one["restarts"]) or "none"),
        ("Time lost", lambda one: format_duration(one["lost_seconds"])),
        ("Steps done again", lambda one: f"{one['redone_steps']:,}"),
        ("Time that was of use", lambda one: format_share(one["useful_share"])),
        (
            "Stood still for checkpoints",
            lambda one: format_duration(one["checkpoints"]["stall_seconds"]),
        ),
        ("Skipped steps", lambda one: f"{one['skipped_steps']:,}"),
        ("Data hash", data_hash),
    ]
    return [(name, [show(one["reliability"]) for one in every]) for name, show in shown]


def _is_among(comparison: dict[str, Any], logs: Sequence[RunLog]) -> bool:
    """Whether two of these runs were compared, rather than one run's checkpoints."""
    compared_runs = {system.get("run") for system in comparison.get("systems", [])}
    return len(compared_runs & {str(log.run_dir.resolve()) for log in logs}) > 1


def _warnings(logs: Sequence[RunLog]) -> list[str]:
    """Why some of the scores must not be compared."""
    found = []
    for test_set in sorted({r.test_set for log in logs for r in log.evaluations}):
        results = [r for log in logs for r in log.evaluations if r.test_set == test_set]
        if len({r.signature for r in results}) > 1:
            found.append(f"{test_set}: BLEU was computed in different ways (see the signatures).")
        if len({r.num_sentences for r in results}) > 1:
            found.append(f"{test_set}: the test sets are not the same, they differ in length.")
    corpora = {log.manifest.sha256 for log in logs if log.manifest is not None}
    if len(corpora) > 1:
        found.append("The runs were trained on different corpora, or on differently cut ones: "
                     "losses and perplexities a piece cannot be compared, BLEU can.")  # fmt: skip
    return found

"""A run's page, ``report.html``: what was trained, how it went, what it cost, how good it is.

Whatever a run has not got yet (checkpoints, evaluations, its corpus) leaves a note in its place.
"""

from __future__ import annotations

import time
from pathlib import Path

from trainer import (
    exhibits,
    exhibits_attention,
    exhibits_cost,
    exhibits_curves,
    exhibits_evaluation,
    exhibits_method,
    exhibits_phases,
    exhibits_reliability,
    exhibits_summary,
)
from trainer.exhibits_cost import Rate
from trainer.report_log import read_run
from trainer.report_page import render
from trainer.run import report_path
from trainer.storage import write_atomically


def write_report(run_dir: Path, *, rate: Rate | None = None, is_live: bool | None = None) -> Path:
    """Write the run's ``report.html`` and return its path.

    The page is one file without any reference to another: it can be mailed, archived, printed.

    Args:
        rate: what a device-hour costs, for the price.
        is_live: whether the run is being trained now; None if that is not known.

    Raises:
        UserError: there is no such run.
    """
    log = read_run(run_dir, is_live=is_live)
    main, evaluations, manifest = log.main, log.evaluations, log.manifest
    cost = exhibits_cost.cost(log, rate)
    context = {
        "name": log.name,
        "summary": exhibits_summary.summary(log),
        "state": exhibits_summary.state(log),
        "tiles": exhibits_summary.tiles(log),
        "curves": exhibits_curves.drawn(log),
        "validations": log.of("validated"),
        "phases": exhibits_phases.rows(log),
        "phase_chart": exhibits_phases.chart(log),
        "cost": exhibits_cost.rows(cost) if log.attempts else [],
        "reliability": exhibits_reliability.numbers(log),
        "reached": log.end.get("step", 0),
        "evaluations": exhibits_evaluation.results(evaluations),
        "signatures": exhibits_evaluation.signatures(evaluations),
        "by_length": exhibits_evaluation.by_length(main),
        "by_frequency": exhibits_evaluation.by_frequency(main),
        "worst": exhibits_evaluation.worst(main),
        "comparisons": exhibits_evaluation.comparisons(evaluations),
        "main": main,
        "samples": exhibits.samples(run_dir, main, manifest),
        "attention": exhibits_attention.attention(run_dir, manifest),
        "data": exhibits.data_section(log.config, manifest),
        "data_missing": log.missing,
        "changes": exhibits_method.changes(log.config),
        "settings": sorted(exhibits_method.flat(log.config.model_dump(mode="json")).items()),
        "environment": exhibits_method.environment_rows(log),
        "command": exhibits_method.command(log),
        "command_alone": exhibits_method.command_alone(log),
        "method": exhibits_method.method(log, cost),
        "references": exhibits_method.references(log),
        "history": exhibits_reliability.history(log),
        "checkpoints": exhibits_reliability.checkpoints(log),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": exhibits_summary.versions(log),
    }
    file = report_path(run_dir)
    write_atomically(file, render("report.html.j2", context))
    return file

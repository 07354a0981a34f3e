"""The numbers behind a run's page, for scripts: plain values under names that stay."""

from __future__ import annotations

import statistics
from typing import Any

from trainer import (
    exhibits_cost,
    exhibits_curves,
    exhibits_method,
    exhibits_phases,
    exhibits_reliability,
    exhibits_summary,
)
from trainer.evaluate import Result
from trainer.exhibits_cost import Rate
from trainer.report_log import RunLog

# Raised when a name goes or changes its meaning; not when one is added.
SCHEMA = 1


def numbers(log: RunLog, rate: Rate | None = None) -> dict[str, Any]:
    """One run's; units are in the names, a share is a part of 1, what is not known is None."""
    cost = exhibits_cost.cost(log, rate)
    return {
        "schema": SCHEMA,
        "run": log.name,
        "folder": str(log.run_dir),
        "summary": exhibits_summary.summary(log),
        "state": exhibits_summary.state(log),
        "training": _training(log),
        "validation": _validation(log),
        "evaluations": [_evaluation(result) for result in log.evaluations],
        "cost": exhibits_cost.numbers(cost),
        "phases": exhibits_phases.rows(log),
        "reliability": exhibits_reliability.numbers(log),
        "environment": exhibits_method.environment(log),
        "configuration": exhibits_method.flat(log.config.model_dump(mode="json")),
        "command": exhibits_method.command_alone(log),
        "method": exhibits_method.method(log, cost),
        "curves": {
            chart.name: {line.label: {"step": line.x, "value": line.y} for line in chart.lines}
            for chart in exhibits_curves.charts(log)
        },
    }


def compared(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs' ``numbers`` under ``runs``, with what differs between them."""
    return {
        "schema": SCHEMA,
        "runs": every,
        "configuration_differences": differences([one["configuration"] for one in every]),
        "environment_differences": differences(
            [exhibits_method.flat(one["environment"]) for one in every]
        ),
    }


def differences(every: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What is not the same in all of them: name to each one's value, None where it has none."""
    names = sorted({name for one in every for name in one})
    listed = {name: [one.get(name) for one in every] for name in names}
    return {
        name: values
        for name, values in listed.items()
        if any(value != values[0] for value in values)
    }


def _training(log: RunLog) -> dict[str, Any]:
    last = log.steps[-1] if log.steps else {}
    totals = log.totals
    return {
        "steps": log.end.get("step", 0),
        "logged_step": last.get("step"),
        "epoch": log.epoch,
        "source_tokens": totals.get("source_tokens"),
        "target_tokens": totals.get("target_tokens"),
        "tokens_step": totals.get("step"),
        "training_seconds": log.timed.get("elapsed_s", 0.0),
        "parameters": log.last("parameters", "started", "resumed"),
        "workers": log.attempts[-1].num_workers if log.attempts else None,
        "nll_nats": last.get("mean_nll"),
        "tokens_per_second": _median(log, "tokens_per_second"),
        "mfu": _median(log, "mfu"),
        "padding_efficiency": _median(log, "padding_efficiency"),
        "skew": _median(log, "skew"),
        "data_hash": log.hashed.get("data_hash"),
        "data_hash_step": log.hashed.get("step"),
    }


def _median(log: RunLog, key: str) -> float | None:
    values = [event[key] for event in log.steps if event.get(key) is not None]
    return statistics.median(values) if values else None


def _validation(log: RunLog) -> dict[str, Any]:
    validated = [event for event in log.of("validated") if event.get("valid_nll") is not None]
    best = min(validated, key=lambda event: event["valid_nll"], default={})
    last = validated[-1] if validated else {}
    return {
        "best_nll_nats": best.get("valid_nll"),
        "best_perplexity": best.get("perplexity"),
        "best_step": best.get("step"),
        "last_nll_nats": last.get("valid_nll"),
        "last_step": last.get("step"),
    }


def _evaluation(result: Result) -> dict[str, Any]:
    found = {
        name: getattr(result, name)
        for name in (
            "test_set", "checkpoint", "step", "num_sentences", "bleu", "signature", "chrf",
            "chrf_signature", "ter", "ter_signature", "paper_bleu", "paper_signature", "beam",
            "length_penalty", "sentences_per_second", "time",
        )
    }  # fmt: skip
    return {
        **found,
        "num_averaged": len(result.averaged_steps),
        "ensemble": list(result.ensemble),
        "bleu_interval": bleu_interval(result),
    }


def bleu_interval(result: Result) -> float | None:
    """Half of the confidence interval of BLEU, where the evaluation was a comparison."""
    if result.comparison is None:
        return None
    for row in result.comparison["rows"]:
        if row["metric"] == "bleu" and row["difference"] is None:
            return float(row["interval"])
    return None

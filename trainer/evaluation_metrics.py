"""Scores as Prometheus metrics: a file for node_exporter's textfile collector, or a gateway."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

from data_shards.errors import RunFailedError

if TYPE_CHECKING:
    from trainer.evaluate import Result

METRICS_NAME = "metrics.prom"
# Of one run, the newest: each test set and checkpoint is a time series of its own.
MOST_RESULTS = 100

_JOB = "babelray_evaluation"
_TIMEOUT_S = 10.0

# Suffix of the metric, field of the result, what it is.
_GAUGES = (
    ("bleu", "bleu", "sacreBLEU's BLEU, 0 to 100."),
    ("paper_bleu", "paper_bleu", "Tokenised, compound-split BLEU, 0 to 100."),
    ("chrf", "chrf", "chrF, 0 to 100."),
    ("ter", "ter", "Translation edit rate, from 0; lower is better."),
    ("step", "step", "Step of the checkpoint."),
    ("sentences", "num_sentences", "Sentences of the test set."),
    ("decoding_seconds", "seconds", "Time spent decoding, over all processes."),
    ("timestamp_seconds", "time", "Unix time of the evaluation."),
)


def registry(run: str, results: Sequence[Result]) -> CollectorRegistry:
    """The newest results of a run, by test set and checkpoint."""
    collected = CollectorRegistry()
    newest = sorted(results, key=lambda result: result.time)[-MOST_RESULTS:]
    for suffix, field, text in _GAUGES:
        gauge = Gauge(
            f"babelray_evaluation_{suffix}",
            text,
            ["run", "test_set", "checkpoint"],
            registry=collected,
        )
        for result in newest:
            value = getattr(result, field)
            if value is not None:
                gauge.labels(run, result.test_set, result.checkpoint).set(value)
    return collected


def write(folder: Path, run: str, results: Sequence[Result]) -> Path:
    """Write ``metrics.prom`` into the run's evaluation folder, whole or not at all."""
    file = folder / METRICS_NAME
    write_to_textfile(str(file), registry(run, results))
    return file


def push(gateway: str, run: str, results: Sequence[Result]) -> None:
    """Put the run's results in place of those that the gateway holds of it.

    Raises:
        RunFailedError: the gateway does not take them.
    """
    try:
        push_to_gateway(
            gateway,
            job=_JOB,
            registry=registry(run, results),
            grouping_key={"run": run},
            timeout=_TIMEOUT_S,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise RunFailedError(
            f"the results are written, but the push gateway {gateway} did not take them "
            f"({reason}): correct --push-gateway, or have {METRICS_NAME} collected instead"
        ) from None

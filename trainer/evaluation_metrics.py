"""Scores as Prometheus metrics: a file for node_exporter's textfile collector, or a gateway."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, write_to_textfile

from data_shards.errors import RunFailedError
from trainer.metrics import EVALUATION_GAUGES, EVALUATION_LABELS, PREFIX

if TYPE_CHECKING:
    from trainer.evaluate import Result

METRICS_NAME = "metrics.prom"
# Of one run, the newest: each test set and checkpoint is a time series of its own.
MOST_RESULTS = 100

_JOB = "babelray_evaluation"
_TIMEOUT_S = 10.0


def registry(run: str, results: Sequence[Result]) -> CollectorRegistry:
    """The newest results of a run, by test set and checkpoint."""
    collected = CollectorRegistry()
    newest = sorted(results, key=lambda result: result.time)[-MOST_RESULTS:]
    for suffix, field, text in EVALUATION_GAUGES:
        gauge = Gauge(
            f"{PREFIX}evaluation_{suffix}",
            text,
            EVALUATION_LABELS,
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

"""``docs/metrics.md``, made of the declarations: ``python -m trainer.metrics_page`` writes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainer.metrics import Declared, declared, declared_evaluation
from trainer.storage import write_atomically

_PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"

_TEXT = """\
# Metrics

<!-- Made of trainer/metrics.py by `make docs`; do not edit. -->

While a run trains, each machine that it trains on serves Prometheus metrics at
`http://127.0.0.1:9400/metrics`, and at `/healthz` that it does. `trainer.metrics_port` chooses
another port (0 serves none), `trainer.metrics_host` another address (`0.0.0.0` to be scraped from
other machines).

- One target a machine: all its ranks, and all runs of one user that are told the same port, share
  it. It keeps its address when ranks are started anew. A port that another program listens on is
  refused before anything starts.
- Outside Kubernetes, `runs/.prometheus/*.json` names the targets for Prometheus' file discovery,
  and follows the machines. Prometheus, Grafana and alerts: [monitoring.md](monitoring.md).
- Every metric has the label `run`, the run's name. Those of the run as a whole come from the
  machine of its first rank, those of ranks from every machine: sum or take the maximum by `run`.
- Counters and histograms go on when a rank is started anew in a dead one's place on its machine; a
  run that is stopped and resumed by hand begins at 0 again, as `rate` expects. Steps that are done
  again after a failure count again: they are work. The totals of the run are in `events.jsonl`.
- Gauges go with the rank that wrote them, except times of events and what validation and
  checkpoints found: an alert on them must see that nothing new comes.
- A run's metrics go when it ends.

| metric | type | labels | what it is |
|---|---|---|---|
{training}

## Of an evaluation

`babelray evaluate` leaves its scores in `evaluation/metrics.prom` for node exporter's textfile
collector, and pushes them with `--push-gateway` ([evaluation.md](evaluation.md)). `babelray serve`
has Ray's own metrics.

| metric | type | labels | what it is |
|---|---|---|---|
{evaluation}
"""


def page() -> str:
    """The whole page."""
    return _TEXT.replace("{training}", _rows(declared())).replace(
        "{evaluation}", _rows(declared_evaluation())
    )


def _rows(metrics: Iterable[Declared]) -> str:
    return "\n".join(
        f"| `{metric.name}` | {metric.kind} | {_labels(metric)} | {metric.help} |"
        for metric in metrics
    )


def _labels(metric: Declared) -> str:
    return ", ".join(f"`{label}`" for label in metric.labels if label != "run")


if __name__ == "__main__":
    write_atomically(_PAGE, page())

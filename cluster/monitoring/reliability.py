"""Reliability: what failed, what it cost, and what a failure now would cost."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as dm

from cluster.monitoring import promql as q
from cluster.monitoring.panels import Row, assemble, curve, number, states

EVENTS = ((None, "green"), (1, "orange"))
LATE = ((None, "green"), (1.5, "orange"), (2, "red"))


def draw() -> dm.Dashboard:
    """The dashboard to open after a night."""
    rows = [_glance(), _failures(), _checkpoints(), _numbers()]
    return assemble("reliability", "Failures, recoveries, checkpoints and bad numbers.", rows)


def _glance() -> Row:
    return Row(
        "At a glance",
        [
            number(
                "Time spent stepping",
                "Part of the last hour, or of the run if that is shorter, that went into steps; "
                "the rest is starting, recovering and validating.",
                f"clamp_max({q.increase('step_seconds_sum', window='1h')} / clamp_max(time() - "
                f"{q.newest('run_started_timestamp_seconds')}, 3600), 1)",
                "percentunit",
                decimals=1,
                steps=((None, "red"), (0.5, "orange"), (0.9, "green")),
            ),
            number(
                "Restarts in 24 h",
                "Starts of the workers anew; resizes are not counted.",
                q.increase("restarts_total", 'cause!="resized"', window="24h"),
                "short",
                decimals=0,
                steps=EVENTS,
            ),
            number(
                "Lost to failures in 24 h",
                "From each failure or resize to the next update.",
                q.increase("recovery_seconds_sum", window="24h"),
                "s",
                steps=((None, "green"), (60, "orange"), (3600, "red")),
            ),
            number(
                "Steps at risk",
                "Steps since the last committed checkpoint: what a failure now would cost.",
                q.STEPS_AT_RISK,
                "locale",
                decimals=0,
            ),
            number(
                "Intervals at risk",
                "The same in intervals between checkpoints; two, and 15 minutes, wake somebody.",
                q.INTERVALS_AT_RISK,
                "short",
                decimals=1,
                steps=LATE,
            ),
            number(
                "Failed checkpoints in 24 h",
                "Each is tried again; five in a row end the run.",
                q.increase("checkpoint_failures_total", window="24h"),
                "short",
                decimals=0,
                steps=EVENTS,
            ),
            number(
                "Size of a checkpoint",
                "The last committed one.",
                q.of_latest("last_checkpoint_size_bytes", "last_checkpoint_timestamp_seconds"),
                "bytes",
                decimals=1,
            ),
            number(
                "Alerts",
                "Alerts that fire now; 0 also where Prometheus has not loaded alerts.yaml.",
                'count(ALERTS{alertname=~"Babelray.*",alertstate="firing",run=~"$run|"})'
                " or vector(0)",
                "short",
                legend="firing",
                steps=((None, "green"), (1, "red")),
            ),
        ],
    )


def _failures() -> Row:
    alerts = [
        "max by (alertname, run) "
        f'(ALERTS{{alertname=~"Babelray.*",alertstate="{state}",run=~"$run|"}}) * {value}'
        for state, value in (("firing", 2), ("pending", 1))
    ]
    quiet = 'label_replace(vector(0), "alertname", "none", "", "")'
    return Row(
        "Failures",
        [
            curve(
                "Restarts, by cause",
                "In five minutes; preempted is a machine taken back, start a group that did not "
                "come up, resized no fault.",
                [
                    (
                        q.increase("restarts_total", by="run, cause", window="5m"),
                        "{{run}} {{cause}}",
                    )
                ],
                "short",
                style="bars",
                stacked=True,
                least=0,
                decimals=0,
            ),
            curve(
                "From a failure to the next update",
                "Mean of the recoveries of the last hour, by cause; empty without any.",
                [
                    (
                        q.mean("recovery_seconds", by="run, cause", window="1h"),
                        "{{run}} {{cause}}",
                    )
                ],
                "s",
                style="points",
                least=0,
            ),
            curve(
                "Workers",
                "Workers that train, and worker processes that live.",
                [
                    (q.newest("world_size"), "{{run}} train"),
                    (f"sum by (run) ({q.babelray('live_ranks')})", "{{run}} live"),
                ],
                "short",
                least=0,
                decimals=0,
            ),
            states(
                "Alerts",
                "Which alerts were pending or firing when.",
                [(" or ".join([*alerts, quiet]), "{{alertname}} {{run}}")],
                ((0, "quiet", "green"), (1, "pending", "orange"), (2, "firing", "red")),
            ),
        ],
    )


def _checkpoints() -> Row:
    return Row(
        "Checkpoints",
        [
            curve(
                "Steps since the last checkpoint",
                "A saw tooth as high as the interval is healthy.",
                [
                    (q.STEPS_AT_RISK, "{{run}}"),
                    (q.newest("checkpoint_interval_steps"), "{{run}} interval"),
                ],
                "locale",
                least=0,
                decimals=0,
            ),
            curve(
                "Time since the last checkpoint",
                "Since the command began where there is none yet.",
                [(q.SINCE_CHECKPOINT, "{{run}}")],
                "s",
                least=0,
            ),
            curve(
                "Time to write one",
                "Mean of the last hour, from the copy to the commit; training goes on meanwhile.",
                [(q.mean("checkpoint_seconds", window="1h"), "{{run}}")],
                "s",
                least=0,
            ),
            curve(
                "Training stands still for checkpoints",
                "Part of the time: the copy into host memory, and waiting for one that is still "
                "being written.",
                [(q.rate("checkpoint_stall_seconds_total"), "{{run}}")],
                "percentunit",
                least=0,
            ),
            curve(
                "Failed checkpoints",
                "In five minutes; each is tried again.",
                [(q.increase("checkpoint_failures_total", window="5m"), "{{run}}")],
                "short",
                style="bars",
                least=0,
                decimals=0,
            ),
            curve(
                "Time of a validation",
                "Mean of the last hour.",
                [(q.mean("validation_seconds", window="1h"), "{{run}}")],
                "s",
                least=0,
            ),
        ],
    )


def _numbers() -> Row:
    return Row(
        "Numbers",
        [
            curve(
                "Steps not trained on, by reason",
                "In five minutes; fp16 overflows are how the loss scale finds its height.",
                [
                    (
                        q.increase("skipped_steps_total", by="run, reason", window="5m"),
                        "{{run}} {{reason}}",
                    )
                ],
                "short",
                style="bars",
                stacked=True,
                least=0,
                decimals=0,
            ),
            curve(
                "Returns to earlier weights",
                "Rewinds in an hour, after many skipped steps in a row.",
                [(q.increase("rewinds_total", window="1h"), "{{run}}")],
                "short",
                style="bars",
                least=0,
                decimals=0,
            ),
            curve(
                "Loss scale",
                "Of fp16; 1 in other precisions. A fall towards 1 means gradients that overflow.",
                [(q.newest("loss_scale"), "{{run}}")],
                "short",
                log=True,
            ),
            curve(
                "Gradient norm",
                "Before clipping.",
                [(q.newest("grad_norm"), "{{run}}")],
                "short",
                log=True,
            ),
        ],
    )

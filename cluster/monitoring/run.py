"""Run: is it healthy, how fast is it, where does the time go, and what has it learnt."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as dm

from cluster.monitoring import promql as q
from cluster.monitoring.panels import (
    RAY_NODES_ID,
    RAY_UTILIZATION_ID,
    Row,
    assemble,
    curve,
    listing,
    number,
)

PHASE_COLORS = {
    "data_wait": "red",
    "forward": "blue",
    "backward": "purple",
    "communication": "orange",
    "optimizer": "green",
    "checkpoint": "yellow",
    "validation": "semi-dark-green",
    "other": "text",
}
AGE = ((None, "green"), (120, "orange"), (600, "red"))
EVENTS = ((None, "green"), (1, "orange"))


def draw() -> dm.Dashboard:
    """The dashboard to open first."""
    rows = [_glance(), _curves(), _time(), _machines(), _what(), _scores()]
    return assemble("run", "A training run at a glance, its curves, and where its time goes.", rows)


def _glance() -> Row:
    tokens = q.newest("tokens_per_second")
    return Row(
        "At a glance",
        [
            number(
                "Health",
                "The worst of: gone without having ended (told by another run on its machine), no "
                "step for ten minutes and no validation, a loss that is not a number, no "
                "checkpoint in two intervals and 15 minutes.",
                q.HEALTH,
                "short",
                states=q.HEALTH_STATES,
            ),
            number(
                "Step",
                "Steps of the data that the run is through, over all attempts.",
                q.newest("position_steps"),
                "locale",
                decimals=0,
            ),
            number(
                "Loss",
                "Training loss a target token, label-smoothed, since the last logged step.",
                q.newest("loss_nats"),
                "suffix: nats",
                decimals=3,
                sparkline=True,
            ),
            number(
                "Tokens a second",
                "Source and target tokens a second, padding not counted.",
                tokens,
                "si:tok/s",
                sparkline=True,
            ),
            number(
                "MFU",
                "Model FLOPs utilisation: the model's operations over what the devices could do.",
                q.newest("mfu_ratio"),
                "percentunit",
                decimals=1,
                sparkline=True,
            ),
            number(
                "Since last step",
                "Time since the last step; ten minutes wake somebody, while validating an hour.",
                q.SINCE_STEP,
                "s",
                steps=AGE,
            ),
            number(
                "Since last checkpoint",
                "What a failure now would cost, less what is being written.",
                q.SINCE_CHECKPOINT,
                "s",
            ),
            number("Workers", "Workers that train together.", q.newest("world_size"), "short"),
            number(
                "Epoch",
                "Passes over the corpus, with the part of the one under way.",
                f"{q.newest('position_steps')} / {q.newest('steps_per_epoch')}",
                "short",
                decimals=2,
            ),
            number(
                "Validation loss",
                "Negative log-likelihood a target token on the validation set, newest.",
                f"{q.newest('valid_nll_nats')} > 0",
                "suffix: nats",
                decimals=3,
            ),
            number(
                "Best validation loss",
                "The lowest so far.",
                f"{q.newest('best_valid_nll_nats')} > 0",
                "suffix: nats",
                decimals=3,
            ),
            number(
                "Validations since the best",
                "Five and a loss clearly above the best raise a ticket.",
                q.newest("stale_validations"),
                "short",
                steps=((None, "green"), (3, "orange")),
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
            number(
                "Restarts in 24 h",
                "Starts of the workers anew; resizes are not counted.",
                q.increase("restarts_total", 'cause!="resized"', window="24h"),
                "short",
                decimals=0,
                steps=EVENTS,
            ),
            number(
                "Skipped steps in 24 h",
                "Steps not trained on, because their numbers went wrong.",
                q.increase("skipped_steps_total", window="24h"),
                "short",
                decimals=0,
                steps=EVENTS,
            ),
            number(
                "Running for",
                "Time since the command began or resumed the run.",
                f"time() - {q.newest('run_started_timestamp_seconds')}",
                "s",
            ),
        ],
    )


def _curves() -> Row:
    return Row(
        "Curves",
        [
            curve(
                "Loss",
                "Training loss with and without label smoothing, and the validation loss.",
                [
                    (q.newest("loss_nats"), "{{run}} training, smoothed"),
                    (q.newest("nll_nats"), "{{run}} training"),
                    (f"{q.newest('valid_nll_nats')} > 0", "{{run}} validation"),
                    (f"{q.newest('best_valid_nll_nats')} > 0", "{{run}} validation, best"),
                ],
                "suffix: nats",
                decimals=3,
            ),
            curve(
                "Gradient norm",
                "Before clipping; leaps announce a loss that leaps.",
                [(q.newest("grad_norm"), "{{run}}")],
                "short",
                log=True,
            ),
            curve(
                "Learning rate",
                "Of the last logged update.",
                [(q.newest("learning_rate"), "{{run}}")],
                "sci",
                least=0,
            ),
            curve(
                "Step",
                "Slope is speed: a flat piece is a standstill, a step down a return to a "
                "checkpoint.",
                [(q.newest("position_steps"), "{{run}}")],
                "locale",
            ),
        ],
    )


def _time() -> Row:
    of_phase, of_all = "step_phase_seconds_sum", q.babelray("step_phase_seconds_sum")
    share = f"{q.rate(of_phase, by='phase')} / on () group_left () sum (rate({of_all}[{q.WINDOW}]))"
    return Row(
        "Where the time goes",
        [
            curve(
                "Share of a step",
                "The ranks' time by phase; communication includes waiting for slower ranks.",
                [(share, "{{phase}}")],
                "percentunit",
                stacked=True,
                least=0,
                most=1,
                colors=PHASE_COLORS,
            ),
            curve(
                "Time of a step",
                "Wall time of a step on the first rank.",
                [
                    (q.mean("step_seconds"), "{{run}} mean"),
                    (q.quantile(0.5, "step_seconds"), "{{run}} median"),
                    (q.quantile(0.99, "step_seconds"), "{{run}} 99 of 100 are faster"),
                ],
                "s",
                least=0,
            ),
            curve(
                "Tokens a second",
                "Source and target tokens, padding not counted; the last logged step's, and the "
                "mean with every standstill in it.",
                [
                    (q.newest("tokens_per_second"), "{{run}} while stepping"),
                    (
                        f"{q.rate('target_tokens_total')} + {q.rate('source_tokens_total')}",
                        "{{run}} mean",
                    ),
                ],
                "si:tok/s",
                least=0,
            ),
            curve(
                "MFU",
                "The model's operations a second over what all devices could do.",
                [(q.newest("mfu_ratio"), "{{run}}")],
                "percentunit",
                least=0,
            ),
            curve(
                "Operations a second",
                "Floating-point operations of the model, padding not counted, and the devices' "
                "peak.",
                [
                    (q.rate("flops_total"), "{{run}} made"),
                    (q.newest("peak_flops"), "{{run}} peak"),
                ],
                "flops",
                log=True,
            ),
            curve(
                "Skew of the ranks",
                "Own time a token of the slowest rank over the median rank's: 1 is even, 1.3 for "
                "long is a straggler; which rank it is, on Cluster.",
                [(f"{q.newest('rank_skew_ratio')} or {q.newest('world_size')} * 0 + 1", "{{run}}")],
                "short",
                steps=((None, "green"), (1.3, "orange")),
                decimals=2,
            ),
        ],
    )


def _machines() -> Row:
    nodes = curve(
        "Machines",
        "Machines that serve metrics of the run, and of the Ray cluster.",
        [
            (f"count by (run) ({q.babelray('live_ranks')})", "{{run}}"),
            ("count(ray_node_cpu_count)", "Ray cluster"),
        ],
        "short",
        least=0,
        decimals=0,
    ).id(RAY_NODES_ID)
    busy = curve(
        "How busy the machines are",
        "Of all machines of the Ray cluster together; by machine on Cluster.",
        [
            ("avg(ray_node_cpu_utilization) / 100", "CPU"),
            ("sum(ray_node_mem_used) / sum(ray_node_mem_total)", "memory"),
            ("max(ray_node_disk_utilization_percentage) / 100", "fullest disk"),
        ],
        "percentunit",
        least=0,
        most=1,
    ).id(RAY_UTILIZATION_ID)
    return Row("Machines", [nodes, busy])


def _what() -> Row:
    return Row(
        "What runs",
        [
            listing(
                "Run",
                "What is trained.",
                q.babelray("run_info"),
                hidden=(),
            ),
            listing(
                "Versions",
                "What it is trained with.",
                q.babelray("build_info"),
                hidden=(),
            ),
        ],
    )


def _scores() -> Row:
    return Row(
        "Scores (where BLEU is computed)",
        [
            curve(
                "BLEU on the validation set",
                "Of checkpoints scored beside the training, with trainer.bleu_every.",
                [(q.newest("valid_bleu"), "{{run}}")],
                "short",
                decimals=2,
            ),
            curve(
                "BLEU of babelray evaluate",
                "Pushed with --push-gateway, or collected from evaluation/metrics.prom.",
                [
                    (
                        f"max by (run, test_set, checkpoint) ({q.babelray('evaluation_bleu')})",
                        "{{run}} {{test_set}} {{checkpoint}}",
                    )
                ],
                "short",
                style="points",
                decimals=2,
            ),
        ],
        collapsed=True,
    )

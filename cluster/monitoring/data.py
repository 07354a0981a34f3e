"""Data: what the run has read, how fast it comes, and whether the ranks wait for it."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as dm

from cluster.monitoring import promql as q
from cluster.monitoring.panels import Row, assemble, curve, listing, number

STARVING = ((None, "green"), (0.1, "orange"), (0.2, "red"))


def draw() -> dm.Dashboard:
    """The dashboard to look whether the stream keeps up."""
    rows = [_glance(), _speed(), _waiting(), _shape(), _proof()]
    return assemble("data", "The stream of samples: position, speed, waiting, padding.", rows)


def _glance() -> Row:
    position, per_epoch = q.newest("position_steps"), q.newest("steps_per_epoch")
    rate = q.rate("steps_total", window="5m")
    return Row(
        "At a glance",
        [
            number(
                "Epochs finished",
                "Passes over the corpus.",
                q.newest("epoch"),
                "short",
                decimals=0,
            ),
            number(
                "This epoch",
                "Part of the epoch under way that is consumed.",
                f"{position} % {per_epoch} / {per_epoch}",
                "percentunit",
                decimals=1,
            ),
            number(
                "Left of this epoch",
                "At the speed of the last five minutes.",
                f"({per_epoch} - {position} % {per_epoch}) / ({rate} > 0)",
                "s",
            ),
            number(
                "Sentence pairs a second",
                "Trained on, over the last minutes.",
                q.rate("samples_total"),
                "si:pairs/s",
                sparkline=True,
            ),
            number(
                "Source tokens a second",
                "End signs included, padding not.",
                q.rate("source_tokens_total"),
                "si:tok/s",
                sparkline=True,
            ),
            number(
                "Target tokens a second",
                "End signs included, padding not.",
                q.rate("target_tokens_total"),
                "si:tok/s",
                sparkline=True,
            ),
            number(
                "Waiting for data",
                "Part of the ranks' time; a fifth for ten minutes raises a ticket.",
                q.share_of_step("data_wait"),
                "percentunit",
                decimals=1,
                steps=STARVING,
            ),
            number(
                "Real tokens",
                "Part of what is computed on that is not padding.",
                q.newest("padding_efficiency_ratio"),
                "percentunit",
                decimals=1,
            ),
        ],
    )


def _speed() -> Row:
    return Row(
        "Speed",
        [
            curve(
                "Tokens a second",
                "Padding not counted, standstills counted.",
                [
                    (q.rate("source_tokens_total"), "{{run}} source"),
                    (q.rate("target_tokens_total"), "{{run}} target"),
                ],
                "si:tok/s",
                stacked=True,
                least=0,
            ),
            curve(
                "Sentence pairs a second",
                "Trained on.",
                [(q.rate("samples_total"), "{{run}}")],
                "si:pairs/s",
                least=0,
            ),
        ],
    )


def _waiting() -> Row:
    return Row(
        "Waiting",
        [
            curve(
                "Part of the time that ranks wait for data, by machine",
                "One machine above the others has a slow disk or network; all of them, storage "
                "that is too slow.",
                [(q.share_of_step("data_wait", by="run, instance"), "{{run}} {{instance}}")],
                "percentunit",
                least=0,
                steps=STARVING,
            ),
            curve(
                "Wait of a step",
                "On all ranks: the median, and what 99 of 100 stay under.",
                [
                    (
                        q.quantile(share, "step_phase_seconds", 'phase="data_wait"'),
                        f"{{{{run}}}} {text}",
                    )
                    for share, text in ((0.5, "median"), (0.99, "99 of 100"))
                ],
                "s",
                least=0,
            ),
            curve(
                "Received from the network",
                "By all machines of the Ray cluster: shards, and what the ranks exchange.",
                [("sum(ray_node_network_receive_speed)", "received")],
                "Bps",
                least=0,
            ),
            curve(
                "Read from disks",
                "By all machines of the Ray cluster.",
                [("sum(ray_node_disk_io_read_speed)", "read")],
                "Bps",
                least=0,
            ),
        ],
    )


def _shape() -> Row:
    samples = q.rate("samples_total")
    return Row(
        "Shape of the batches",
        [
            curve(
                "Real tokens",
                "Part of what is computed on that is not padding.",
                [(q.newest("padding_efficiency_ratio"), "{{run}}")],
                "percentunit",
                most=1,
            ),
            curve(
                "Length of a sentence",
                "Mean tokens of a sentence pair's two sides.",
                [
                    (f"{q.rate('source_tokens_total')} / {samples}", "{{run}} source"),
                    (f"{q.rate('target_tokens_total')} / {samples}", "{{run}} target"),
                ],
                "suffix: tokens",
                least=0,
                decimals=1,
            ),
            curve(
                "Target tokens of a step",
                "Mean; the global batch does not depend on the number of workers.",
                [
                    (
                        f"{q.rate('target_tokens_total')} / {q.rate('steps_total')}",
                        "{{run}}",
                    )
                ],
                "locale",
                least=0,
                decimals=0,
            ),
            curve(
                "Steps not trained on",
                "By reason, an hour; their pairs count as consumed.",
                [
                    (
                        q.increase("skipped_steps_total", by="run, reason", window="1h"),
                        "{{run}} {{reason}}",
                    )
                ],
                "short",
                style="bars",
                stacked=True,
                least=0,
                decimals=0,
            ),
        ],
    )


def _proof() -> Row:
    return Row(
        "Proof",
        [
            number(
                "Hash of the consumed pairs",
                "Lower 48 bits of data_hash in events.jsonl: equal at equal steps means the same "
                "pairs in the same order.",
                q.newest("data_hash"),
                "none",
                decimals=0,
                width=6,
            ),
            listing(
                "Corpus",
                "The manifest that the plan is made from.",
                q.babelray("data_info"),
                hidden=(),
                width=18,
            ),
        ],
    )

"""A plan as lines to read and as plain values."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from trainer.formats import format_bytes, format_duration, format_number, format_power
from trainer.paper.memory import Memory
from trainer.paper.plan import Dry

_WIDTH, _INDENT = 100, 13


def numbers(dry: Dry) -> dict[str, Any]:
    """All that a script would want; bytes, seconds, operations."""
    return {
        "hardware": {
            "device": dry.hardware.device.name,
            "devices": dry.hardware.num_devices,
            "memory_gb": dry.hardware.device.memory_gb,
            "flops": dry.rate.flops,
            "precision": dry.rate.precision,
            "source": dry.rate.source,
            "utilisation": dry.utilisation,
        },
        "corpus": {
            "name": dry.config.data.corpus,
            "is_prepared": dry.corpus.is_prepared,
            "source": dry.corpus.source,
            "num_pairs": dry.corpus.num_pairs,
            "vocab_size": dry.corpus.vocab_size,
            "download_bytes": dry.download_bytes,
            "prepared_bytes": dry.prepared_bytes,
        },
        "num_parameters": dry.num_parameters,
        "batches": asdict(dry.batches),
        "flops_per_step": dry.flops_per_step,
        "flops": dry.flops,
        "times": asdict(dry.times) | {"currency": dry.currency},
        "memory": [asdict(row) | {"total": row.total} for row in dry.memory],
        "checkpoint_bytes": dry.checkpoint_bytes,
        "checkpoints_bytes": dry.checkpoints_bytes,
        "notes": list(dry.notes),
    }


def lines(dry: Dry) -> list[str]:
    """The plan, a topic a block, in lines of 100 characters at most."""
    return [part for row in _all_lines(dry) for part in (_wrapped(row) or [""])]


def _wrapped(row: str) -> list[str]:
    return textwrap.wrap(row, _WIDTH, subsequent_indent=" " * _INDENT, break_on_hyphens=False)


def _all_lines(dry: Dry) -> list[str]:
    return [
        *_corpus(dry),
        "",
        *_batches(dry),
        "",
        *_model(dry),
        "",
        *_memory(dry),
        "",
        *_times(dry),
        "",
        *_disk(dry),
        *(f"note: {note}" for note in dry.notes),
    ]


def _row(name: str, text: str) -> str:
    return f"{name:<{_INDENT}}{text}"


def _corpus(dry: Dry) -> list[str]:
    data, mean = dry.config.data, dry.corpus.mean_work()
    return [
        _row(
            "corpus",
            f"{data.corpus} {data.source}-{data.target}: {dry.corpus.num_pairs:,} pairs of "
            f"{mean.source:.1f} source and {mean.target:.1f} target pieces, end signs included",
        ),
        _row("", f"vocabulary of {dry.corpus.vocab_size:,} pieces; {dry.corpus.source}"),
    ]


def _batches(dry: Dry) -> list[str]:
    data, b = dry.config.data, dry.batches
    epochs = "–" if b.epochs is None else f"{b.epochs:.1f}"
    return [
        _row(
            "a step",
            f"{data.lanes} lanes of at most {b.tokens_per_lane:,} tokens a side, padding included: "
            f"{b.pairs_per_step:,.0f} pairs",
        ),
        _row(
            "",
            f"{b.source_tokens:,.0f} source and {b.target_tokens:,.0f} target tokens without "
            f"padding ({100 * b.not_padding:.0f} % of what is computed on)",
        ),
        _row(
            "the run",
            f"{dry.times.num_steps:,.0f} steps of {b.steps_per_epoch:,.0f} an epoch: {epochs} "
            "epochs",
        ),
    ]


def _model(dry: Dry) -> list[str]:
    model = dry.config.model
    name = f"{model.kind} {model.preset}" if model.preset else model.kind
    return [
        _row("model", f"{name}: {dry.num_parameters:,} parameters"),
        _row(
            "operations",
            f"{format_power(dry.flops_per_step)} a step, {format_power(dry.flops)} in all (matrix "
            "products, forward and backward, without padding)",
        ),
    ]


def _memory(dry: Dry) -> list[str]:
    stage = dry.config.trainer.zero_stage
    head = ("weights", "gradients", "optimizer", "activations", "buffers", "all")
    rows = [
        _row(
            "memory",
            f"of one {dry.hardware.device.name} with {dry.hardware.device.memory_gb:g} GB, in "
            f"{dry.config.trainer.precision}",
        ),
        _row("  ZeRO", "".join(f"{name:>13}" for name in head)),
    ]
    for row in dry.memory:
        mark = " *" if row.stage == stage else ""
        rows.append(_row(f"  {row.stage}{mark}", "".join(f"{t:>13}" for t in _cells(row))))
    chosen = dry.memory[stage]
    if chosen.total is not None:
        room = dry.hardware.device.memory_gb * 1e9
        verdict = "fits" if chosen.total <= 0.9 * room else "does not fit: raise data.lanes"
        rows.append(_row("", f"* trainer.zero_stage={stage}: {verdict}"))
    return rows


def _cells(row: Memory) -> list[str]:
    values = (
        row.weights, row.gradients, row.optimizer, row.activations, row.buffers, row.total,
    )  # fmt: skip
    return ["–" if value is None else format_bytes(value) for value in values]


def _times(dry: Dry) -> list[str]:
    t = dry.times
    parts = [f"compute {_ms(t.compute)}", f"CPU at least {_ms(t.launch)}"]
    parts.append(f"optimizer {_ms(t.optimizer)}")
    if t.reduction is not None:
        parts.append(f"reductions {_ms(t.reduction)}")
    used = (
        f"{format_power(dry.rate.flops)} a second each, {dry.rate.source}"
        if dry.rate.source.startswith("given")
        else f"{100 * dry.utilisation:g} % of {format_power(dry.rate.flops)} a second each "
        f"({dry.rate.precision}; {dry.rate.source})"
    )
    cost = ""
    if t.price is not None:
        cost = f", {t.price:,.2f} {dry.currency}"
    return [
        _row("hardware", f"{dry.hardware}: {used}"),
        _row("a step", f"{_ms(t.step)}: {', '.join(parts)}"),
        _row(
            "the run",
            f"{format_duration(t.hours * 3600)} of training, {format_number(t.device_hours)} "
            f"device-hours{cost}",
        ),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _disk(dry: Dry) -> list[str]:
    trainer = dry.config.trainer
    minutes = trainer.checkpoint_every * dry.times.step / 60
    rows = [
        _row(
            "checkpoints",
            f"{format_bytes(dry.checkpoint_bytes)} each, every {trainer.checkpoint_every:,} steps "
            f"({minutes:.1f} minutes here); {trainer.keep_checkpoints} kept and the best: "
            f"{format_bytes(dry.checkpoints_bytes)} of disk at most",
        )
    ]
    download = "" if not dry.download_bytes else f"{format_bytes(dry.download_bytes)} to fetch, "
    return [
        *rows,
        _row("corpus", f"{download}{format_bytes(dry.prepared_bytes)} prepared"),
    ]

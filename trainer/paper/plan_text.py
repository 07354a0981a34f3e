"""A plan as lines to read and as plain values."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from trainer.formats import format_bytes, format_duration, format_number, format_power
from trainer.paper.memory import Memory
from trainer.paper.plan import Dry

_WIDTH, _INDENT = 100, 13
# Of a device's memory; CUDA, its libraries and the allocator's gaps take the rest.
_USABLE = 0.9


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
    data, mean = dry.config.data, dry.corpus.mean_work
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
            f"{dry.times.num_steps:,.0f} steps of {b.steps_per_epoch:,.0f} an epoch: "
            f"{b.epochs:.1f} epochs",
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
            f"{dry.rate.precision}",
        ),
        _row("  ZeRO", "".join(f"{name:>13}" for name in head)),
    ]
    for row in dry.memory:
        mark = " *" if row.stage == stage else ""
        rows.append(_row(f"  {row.stage}{mark}", "".join(f"{t:>13}" for t in _cells(row))))
    verdict = _verdict(dry)
    if verdict is not None:
        rows.append(_row("", f"* trainer.zero_stage={stage}: {verdict}"))
    return rows


def _verdict(dry: Dry) -> str | None:
    """Whether the run fits, and what to do where it does not; None: not known."""
    room = _USABLE * dry.hardware.device.memory_gb * 1e9
    fitting, roomy = [], []
    for row in dry.memory:
        if row.total is None or row.activations is None:
            return None
        if row.total <= room:
            fitting.append(row.stage)
        # More lanes make activations smaller, and nothing else.
        if row.total - row.activations < room:
            roomy.append(row.stage)
    chosen = dry.config.trainer.zero_stage
    if chosen in fitting:
        return "fits"
    if fitting:
        return f"does not fit; trainer.zero_stage={fitting[0]} does"
    if not roomy:
        return "does not fit, nor does any stage: take more devices, or such with more memory"
    stage = "" if chosen in roomy else f"set trainer.zero_stage={roomy[0]} and "
    return f"does not fit, nor does any stage for its activations: {stage}raise data.lanes"


def _cells(row: Memory) -> list[str]:
    values = (
        row.weights, row.gradients, row.optimizer, row.activations, row.buffers, row.total,
    )  # fmt: skip
    return ["–" if value is None else format_bytes(value) for value in values]


def _times(dry: Dry) -> list[str]:
    t = dry.times
    parts = [
        f"{name} {_ms(seconds)}"
        for name, seconds in (
            ("compute", t.compute),
            ("CPU at least", t.launch),
            ("optimizer", t.optimizer),
            ("reductions", t.reduction),
        )
        if seconds is not None
    ]
    whole = "not known" if t.step is None else _ms(t.step)
    rows = [
        _row("hardware", f"{dry.hardware}: {_rate(dry)}"),
        _row("a step", f"{whole}: {', '.join(parts)}"),
    ]
    if t.hours is not None:
        cost = "" if t.price is None else f", {t.price:,.2f} {dry.currency}"
        rows.append(
            _row(
                "the run",
                f"{format_duration(t.hours * 3600)} of training, "
                f"{format_number(t.device_hours)} device-hours{cost}",
            )
        )
    return rows


def _rate(dry: Dry) -> str:
    flops = f"{format_power(dry.rate.flops)} a second each"
    if dry.rate.source.startswith("given"):
        return f"{flops}, {dry.rate.source}"
    share = "a share of" if dry.utilisation is None else f"{100 * dry.utilisation:g} % of"
    return f"{share} {flops} ({dry.rate.precision}; {dry.rate.source})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _disk(dry: Dry) -> list[str]:
    trainer = dry.config.trainer
    step = dry.times.step
    often = "" if step is None else f" ({trainer.checkpoint_every * step / 60:.1f} minutes here)"
    rows = [
        _row(
            "checkpoints",
            f"{format_bytes(dry.checkpoint_bytes)} each, every {trainer.checkpoint_every:,} "
            f"steps{often}; {trainer.keep_checkpoints} kept and the best: "
            f"{format_bytes(dry.checkpoints_bytes)} of disk at most",
        )
    ]
    download = "" if not dry.download_bytes else f"{format_bytes(dry.download_bytes)} to fetch, "
    return [
        *rows,
        _row("corpus", f"{download}{format_bytes(dry.prepared_bytes)} prepared"),
    ]

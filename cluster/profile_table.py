"""A profile as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.tables import right_aligned

NUM_OPERATORS = 10
_COMMUNICATION = "communication"
# In the order in which a step goes through them; others follow.
_ORDER = ("data_wait", "forward", "backward", _COMMUNICATION, "optimizer", "checkpoint")


def profile_text(profile: dict[str, Any]) -> str:
    """All ranks' tables, the work done, and how to open the traces."""
    parts = [rank_text(rank) for rank in profile["ranks"]]
    if profile["work"] is not None:
        parts.append(work_text(profile["work"]))
    traces = [rank["trace"] for rank in profile["ranks"]]
    parts.append(
        "\n".join(
            [
                *(f"trace: {trace}" for trace in traces),
                "open it at https://ui.perfetto.dev (nothing is uploaded: the page reads the file "
                "in your browser) or in chrome://tracing",
            ]
        )
    )
    return "\n\n".join(parts)


def rank_text(rank: dict[str, Any]) -> str:
    """One rank: phases, what is beside them, and the operators that take most."""
    title = f"rank {rank['rank']} of {rank['world_size']} on {rank['device']}"
    if "error" in rank:
        return f"{title}: {rank['error']}"
    steps, step_ms = rank["steps"], rank["total_ms"] / len(rank["steps"])
    numbers = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    unprofiled = rank.get("unprofiled_step_ms")
    compared = (
        ""
        if unprofiled is None
        else f"; {unprofiled:,.1f} ms before, unprofiled (the median of the steps then)"
    )
    lines = [f"{title}, {numbers}: {step_ms:,.1f} ms a step{compared}", *_phases(rank)]
    lines += ["", *_beside(rank), "", *_operators(rank)]
    return "\n".join(lines)


def _phases(rank: dict[str, Any]) -> list[str]:
    num, total_ms = len(rank["steps"]), rank["total_ms"]
    phases = rank["phases"]
    names = [name for name in _ORDER if name in phases]
    names += [name for name in phases if name not in (*_ORDER, "other")] + ["other"]
    on_device = rank["idle_of"] == "device"
    rows = [("phase", "ms a step", "share", *(("on the device",) if on_device else ()))]
    for name in names:
        phase = phases[name]
        row = (name.replace("_", " "), *_ms_and_share(phase["host_ms"], num, total_ms))
        rows.append((*row, f"{phase['device_ms'] / num:,.2f}") if on_device else row)
    return _columns(rows)


def _beside(rank: dict[str, Any]) -> list[str]:
    num, total_ms = len(rank["steps"]), rank["total_ms"]
    idle_ms, idle_share = _ms_and_share(rank["idle_ms"], num, total_ms)
    what = (
        "no kernel on the device"
        if rank["idle_of"] == "device"
        else "in no operator (Python, waiting)"
    )
    lines = [f"idle: {idle_ms} ms a step ({idle_share}) {what}"]
    lines += [
        f"{found['name']}: {found['calls'] / num:,.1f} calls, {found['ms'] / num:,.2f} ms a step"
        for found in rank["collectives"]
    ]
    for kind, memory in (rank.get("memory") or {}).items():
        lines.append(
            f"memory ({kind}): {memory['peak_bytes'] / 1e6:,.1f} MB at most, "
            f"{memory['allocations'] / num:,.0f} allocations of "
            f"{memory['allocated_bytes'] / num / 1e6:,.1f} MB a step"
        )
    return lines


def _operators(rank: dict[str, Any]) -> list[str]:
    num = len(rank["steps"])
    on_device = rank["idle_of"] == "device"
    rows = [("operator", "calls a step", "own ms a step", "share")]
    for row in rank["operators"][:NUM_OPERATORS]:
        cost_ms = row["device_ms"] if on_device else row["self_ms"]
        rows.append(
            (
                row["name"],
                f"{row['calls'] / num:,.1f}",
                f"{cost_ms / num:,.2f}",
                f"{row['share']:.1%}",
            )
        )
    return _columns(rows)


def work_text(work: dict[str, Any]) -> str:
    """Speed, and the operations of a step by three counters."""
    counts = work["counts"]
    peak = work["peak_flops"]
    mfu = (
        "MFU unknown: the run did not tell its peak"
        if work["mfu"] is None
        else f"MFU {work['mfu']:.1%} of {_si(peak)}FLOP/s ({work['peak_source']})"
    )
    rows = [
        (f"operations of step {counts['step']}", "GFLOP", "ratio", ""),
        ("model/cost.py", _giga(counts["cost"]), "1.000", "real tokens, forward and backward"),
        (
            "PyTorch's counter",
            _giga(counts["torch"]),
            f"{counts['torch'] / counts['cost']:.3f}",
            f"padding included ({counts['padding']:.1%} of the tokens are real)",
        ),
        (
            "DeepSpeed's profiler",
            "",
            f"{counts['deepspeed_ratio']:.3f}",
            f"on {counts['deepspeed_pairs']} pairs without padding, forward",
        ),
    ]
    return "\n".join(
        [
            f"{work['tokens_per_second']:,.0f} tokens/s (source and target) while profiled, "
            f"{_si(work['flops'] / work['seconds'])}FLOP/s, {mfu}",
            *_columns(rows, last_is_text=True),
        ]
    )


def _ms_and_share(milliseconds: float, num_steps: int, total_ms: float) -> tuple[str, str]:
    return f"{milliseconds / num_steps:,.2f}", f"{milliseconds / total_ms:.1%}"


def _columns(rows: Sequence[Sequence[str]], *, last_is_text: bool = False) -> list[str]:
    """The first column (and the last, if it is text) to the left, the others to the right."""
    width = max(len(row[0]) for row in rows)
    numbers = [row[1 : len(row) - last_is_text] for row in rows]
    return [
        f"{row[0]:<{width}}  {line}  {row[-1] if last_is_text else ''}".rstrip()
        for row, line in zip(rows, right_aligned(numbers), strict=True)
    ]


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f}"


def _si(number: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= size:
            return f"{number / size:,.2f} {letter}"
    return f"{number / 1e6:,.2f} M"

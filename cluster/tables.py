"""Results as tables for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.audit import Audit, EpochAudit, Skipped


def audit_table(audit: Audit) -> str:
    """One line an epoch, then what was not trained on, then the verdict."""
    head = ("epoch", "steps", "pairs", "untrained", "at step", "expected", "found")
    cells = [
        (
            str(row.epoch),
            f"{row.steps:,} of {row.steps_per_epoch:,}",
            f"{row.pairs:,}",
            f"{row.pairs_untrained:,}",
            "-" if row.at_step is None else f"{row.at_step:,}",
            row.expected or "-",
            row.found or "-",
        )
        for row in audit.epochs
    ]
    verdicts = ["", *map(_verdict, audit.epochs)]
    lines = [
        f"{line}  {verdict}".rstrip()
        for line, verdict in zip(right_aligned([head, *cells]), verdicts, strict=True)
    ]
    for reason in sorted({skip.reason for skip in audit.skipped}):
        skips = [skip for skip in audit.skipped if skip.reason == reason]
        lines.append(f"skipped, {reason}: {_skips(skips)}")
    lines += [
        f"rewound after step {rewind.step:,} to the weights of step {rewind.to_step:,}: "
        f"{rewind.pairs:,} pairs between them are not trained on"
        for rewind in audit.rewound
    ]
    untrained = f"{audit.pairs_untrained:,} of them not trained on: "
    return "\n".join(
        [
            *lines,
            f"{audit.steps:,} steps, {audit.pairs:,} pairs consumed, "
            + untrained * bool(audit.pairs_untrained)
            + ("every pair exactly once an epoch" if audit.exact else "not as planned"),
        ]
    )


def _verdict(row: EpochAudit) -> str:
    if row.first_difference is not None:
        first, last = row.first_difference
        return f"differs in steps {first}-{last}"
    return "exact" if row.steps == row.steps_per_epoch else "exact so far"


def right_aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as a line, in columns that end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _skips(skips: list[Skipped]) -> str:
    pairs = sum(skip.pairs for skip in skips)
    return f"{len(skips):,} steps ({_ranges(skip.step for skip in skips)}), {pairs:,} pairs"


def _ranges(steps: Iterable[int]) -> str:
    """Ascending steps, neighbours together: ``3-5, 9``."""
    ranges: list[tuple[int, int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

"""The results as Markdown."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cluster.session import num_cores
from tests.chaos.measure import Row
from tests.chaos.workspace import CHECKPOINT_EVERY, NUM_STEPS, PACE_S

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"

_HEAD = (
    "fault", "seconds to the next optimizer step", "steps redone", "pairs lost", "pairs repeated",
    "final loss", "difference to the undisturbed run",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Of all faults together."""

    seed: int
    seconds: float
    load: float  # of the machine when it began: seconds are comparable only where it is alike


def markdown(rows: list[Row], summary: Summary) -> str:
    """The table, and how it came about."""
    lines = [
        f"`make chaos SEED={summary.seed}`: {NUM_STEPS} steps each, a checkpoint every "
        f"{CHECKPOINT_EVERY}, at least {PACE_S * 1000:.0f} ms a step; {num_cores()} cores, "
        f"Python {platform.python_version()}, torch {version('torch')}, ray {version('ray')}, "
        f"deepspeed {version('deepspeed')}; {summary.seconds / 60:.0f} minutes in all, "
        f"load {summary.load:.1f} when it began.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|---" + "|---:" * (len(_HEAD) - 1) + "|",
        *(_line(row) for row in rows),
    ]
    notes = [
        f"{row.fault}: {row.left_out} pairs were left out by the run itself, which named them in "
        "`events.jsonl`; they do not count as lost."
        for row in rows
        if row.left_out
    ]
    for row in rows:
        notes += [f"{row.fault}: **not as it should be**: {problem}." for problem in row.problems]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _line(row: Row) -> str:
    if row.skipped:
        return f"| {row.fault} | not played: {row.skipped} |" + " |" * (len(_HEAD) - 2)
    cells = [
        row.fault,
        "–" if row.seconds is None else f"{row.seconds:.1f}",
        *("–" if n is None else str(n) for n in (row.redone, row.lost, row.repeated)),
        "–" if row.final_loss is None else f"{row.final_loss:.6f}",
        "–" if row.difference is None else _difference(row.difference),
    ]
    return "| " + " | ".join(cells) + " |"


def _difference(difference: float) -> str:
    return f"{difference:+.1e}" if difference else "0"


def insert(document: Path, text: str) -> None:
    """Put the text between the markers of a document.

    Raises:
        ValueError: it does not have them.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no {BEGIN} ... {END}")
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")

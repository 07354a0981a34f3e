"""The table of ``bench.py`` and its comparison with an earlier one; pure functions of rows.

A row is what ``common.row`` makes, with the name of its ``benchmark``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

# A row whose benchmark gives no spread is taken to vary by this part of itself; differences of
# medians below the second are not told from chance, however narrow the spreads.
ASSUMED_SPREAD = 0.15
LEAST_DIFFERENCE = 0.05


@dataclass(frozen=True)
class Change:
    """A row that came out otherwise than in the baseline, beyond the spread of both."""

    benchmark: str
    what: str
    before: float
    now: float
    unit: str
    worse: bool

    def __str__(self) -> str:
        """For people, with the row's name."""
        verb = "WORSE" if self.worse else "better"
        return (
            f"{verb}: {self.benchmark}: {self.what}: "
            f"{number(self.now)}{self.unit}, was {number(self.before)}{self.unit}"
        )


@dataclass(frozen=True)
class Comparison:
    """What changed, and what could not be compared, of all rows of both."""

    changes: tuple[Change, ...]
    compared: int
    values_left_out: int
    new: tuple[str, ...]
    gone: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What got worse."""
        return tuple(change for change in self.changes if change.worse)


def key(row: Row) -> tuple[str, str, str]:
    """What a row is known by in every run."""
    return row["benchmark"], row["what"], row.get("against") or ""


def compared_number(row: Row) -> tuple[float, float, float]:
    """The ratio if there is one, else the value: median, lowest, highest."""
    kind = "value" if row["ratio"] is None else "ratio"
    middle = float(row[kind])
    spread = row["ratio_spread" if kind == "ratio" else "spread"]
    if spread is None:
        margin = abs(middle) * ASSUMED_SPREAD
        return middle, middle - margin, middle + margin
    return middle, float(spread[0]), float(spread[1])


def change(now: Row, before: Row) -> Change | None:
    """A change, if all turns of one lie beyond all turns of the other and it is not a trifle."""
    middle, lowest, highest = compared_number(now)
    old_middle, old_lowest, old_highest = compared_number(before)
    if lowest <= old_highest and old_lowest <= highest:
        return None
    if abs(middle - old_middle) < LEAST_DIFFERENCE * abs(old_middle):
        return None
    worse = (middle < old_middle) == now["higher_is_better"]
    unit = f" {now['unit']}" if now["ratio"] is None else f" x {now['against']}"
    return Change(now["benchmark"], now["what"], old_middle, middle, unit, worse)


def compare(rows: Sequence[Row], baseline: Sequence[Row], *, same_machine: bool) -> Comparison:
    """Rows against a baseline's, by name; of another machine only ratios say anything."""
    old = {key(row): row for row in baseline}
    ran = {row["benchmark"] for row in rows}
    new = tuple(f"{row['benchmark']}: {row['what']}" for row in rows if key(row) not in old)
    now = {key(row) for row in rows}
    gone = tuple(
        f"{row['benchmark']}: {row['what']}"
        for row in baseline
        if row["benchmark"] in ran and key(row) not in now
    )
    changes, compared, left_out = [], 0, 0
    for row in rows:
        before = old.get(key(row))
        if before is None or (row["ratio"] is None) != (before["ratio"] is None):
            continue
        if row["ratio"] is None and not same_machine:
            left_out += 1
            continue
        compared += 1
        found = change(row, before)
        if found:
            changes.append(found)
    return Comparison(tuple(changes), compared, left_out, new, gone)


def met(row: Row) -> bool | None:
    """Whether the goal is met; None if there is none."""
    if row["goal"] is None:
        return None
    middle = compared_number(row)[0]
    return bool(middle >= row["goal"] if row["higher_is_better"] else middle <= row["goal"])


def number(value: float) -> str:
    """Four digits, or all of a larger whole number."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = f"{value:.4g}"
    return f"{value:.6f}".rstrip("0") if "e" in digits else digits


def lines(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """The table as text, a line each, with the baseline's ratio (or value) where it has one."""
    old = {key(row): row for row in baseline}
    head = ("", "", "measured", "ratio", "to", "goal", "", "before")
    cells = [head, *(_cells(row, old.get(key(row))) for row in rows)]
    names = [head[0], *(row["benchmark"] for row in rows)]
    cells = [
        (name if index == 0 or names[index - 1] != name else "", *cell[1:])
        for index, (name, cell) in enumerate(zip(names, cells, strict=True))
    ]
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(head))]
    right = {2, 3, 5, 7}
    return [
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(cell, widths, strict=True))
        ).rstrip()
        for cell in cells
    ]


def _cells(row: Row, before: Row | None) -> tuple[str, ...]:
    ratio, goal = row["ratio"], row["goal"]
    sign = ("≥ " if row["higher_is_better"] else "≤ ") if goal is not None else ""
    verdict = {None: "", True: "met", False: "NOT met"}[met(row)]
    old = ""
    if before is not None and (before["ratio"] is None) == (ratio is None):
        old = number(before["value"] if ratio is None else before["ratio"])
    return (
        row["benchmark"],
        row["what"],
        f"{number(row['value'])} {row['unit']}",
        "" if ratio is None else f"{ratio:.2f}",
        row.get("against") or "",
        "" if goal is None else sign + number(goal),
        verdict,
        old,
    )


def machine_slug(cpu: str, cores: int) -> str:
    """A machine's name in a file's: "Intel(R) Xeon(R) Gold 6248 CPU @ 2.5GHz" with 2 cores."""
    words = re.sub(r"\((?:R|TM)\)|\b(?:CPU|Processor)\b|@.*", " ", cpu, flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "cpu"
    return f"{name}-{cores}-cores"

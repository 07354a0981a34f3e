"""What ``babelray doctor`` and the check before a launch find: one ``Check`` each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what, in two or three words, such as "shared memory".
        outcome: "failure" where a run would not work, "warning" where it would work worse, or where
            it could not be found out.
        found: what was seen, with units.
        mend: what to do about it; None where all is well.
    """

    name: str
    outcome: Outcome
    found: str
    mend: str | None = None


def failures(checks: Iterable[Check]) -> list[Check]:
    """Those that stand in a run's way."""
    return [check for check in checks if check.outcome == "failure"]


def line(check: Check) -> str:
    """One check for a person: what was found, and the mend."""
    mend = f"\n           {check.mend}" if check.mend else ""
    return f"{check.outcome:<8} {check.name}: {check.found}{mend}"

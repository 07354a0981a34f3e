"""Where the seconds between the command and the first step go; kept by each process that trains.

``cluster`` tells when the command began and when Ray was there, the trainer marks what it has done
since. The first rank's marks are in the event that its training begins with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

# What each mark ends, for a person.
LABELS = {
    "command": "command and configuration",
    "ray": "Ray",
    "workers": "workers",
    "group": "process group",
    "data": "data and plan",
    "engine": "model and DeepSpeed",
    "checkpoint": "checkpoint",
}

_marks: dict[str, float] = {}


def begin(marks: Mapping[str, float]) -> None:
    """Start anew with what is known: Unix times, the first of them that of the command."""
    _marks.clear()
    _marks.update(marks)


def mark(name: str) -> None:
    """Something is done; nothing is kept where nobody has said when all began."""
    if _marks:
        _marks[name] = time.time()


def seconds() -> dict[str, float]:
    """How long each part took, in the order of the marks; empty if nothing was kept."""
    return {
        name: round(end - start, 3) for (_, start), (name, end) in pairwise(list(_marks.items()))
    }


def described(parts: Mapping[str, float]) -> str:
    """The parts for a person, those of at least a tenth of a second: ``Ray 4.1, workers 2.2 s``."""
    shown = [f"{LABELS.get(name, name)} {s:.1f}" for name, s in parts.items() if s >= 0.05]
    return ", ".join(shown) + " s"

"""What every peer's script shares: the job it is given. Needs nothing but Python.

A job is a folder with ``job.json``; the corpus' pieces are its numbers, as words (``w17``), one
sentence a line, so that every peer sees the same pieces and none splits them further.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

# Last, so that no module of a peer is shadowed.
sys.path.append(str(Path(__file__).parents[1]))

from meter import Meter

__all__ = ["Job", "Meter"]

# One more than the longest sentence of the prepared corpus can have, with both signs.
MAX_LENGTH = 130


@dataclass(frozen=True)
class Job:
    """What to train; ``tokens`` is the budget of one batch of ``batches`` a step, a side."""

    source: str
    target: str
    words: str
    num_words: int
    precision: str
    layers: int
    d_model: int
    d_ff: int
    num_heads: int
    dropout: float
    label_smoothing: float
    tokens: int
    batches: int
    norm: str
    folder: Path

    @classmethod
    def given(cls) -> Job:
        """The job in the folder that the command line names."""
        folder = Path(sys.argv[-1]).absolute()
        del sys.argv[1:]
        return cls(**json.loads((folder / "job.json").read_text()), folder=folder)

    def sentences(self, file: str) -> list[list[str]]:
        """The words of every line of ``source`` or ``target``."""
        with Path(file).open() as lines:
            return [line.split() for line in lines]

"""An evaluation's sentences side by side: source, hypothesis, reference."""

from __future__ import annotations

from typing import NamedTuple

from trainer.evaluate import Evaluated


class Sample(NamedTuple):
    """One sentence of a test set."""

    source: str
    hypothesis: str
    reference: str


def pick(evaluated: Evaluated, num_samples: int) -> list[Sample]:
    """``num_samples`` of an evaluation's sentences, evenly spread over the test set."""
    tested = evaluated.test_set
    num_samples = min(num_samples, len(tested.sources))
    chosen = [index * len(tested.sources) // num_samples for index in range(num_samples)]
    return [
        Sample(tested.sources[index], evaluated.hypotheses[index], tested.references[index])
        for index in chosen
    ]

"""What a report shows of a run's evaluations: all scores, where the main one is weak, comparisons.

Each function returns plain values for the template, or nothing where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.breakdown import range_text
from trainer.compare import METRIC_NAMES
from trainer.evaluate import Result


def results(evaluations: Sequence[Result]) -> list[dict[str, Any]]:
    """A row an evaluation, oldest first; a score that an older version did not compute is None."""
    return [
        {
            "test_set": result.test_set,
            "checkpoint": result.checkpoint,
            "step": result.step,
            "num_averaged": len(result.averaged_steps),
            "sentences": result.num_sentences,
            "bleu": result.bleu,
            "chrf": result.chrf,
            "ter": result.ter,
            "paper_bleu": result.paper_bleu,
            "beam": result.beam,
            "length_penalty": result.length_penalty,
            "sentences_per_second": result.sentences_per_second,
            "time": result.time,
        }
        for result in evaluations
    ]


def signatures(evaluations: Sequence[Result]) -> list[tuple[str, str]]:
    """Each metric's signatures, each once: what the numbers may be compared with."""
    named = [
        (name, signature)
        for result in evaluations
        for name, signature in (
            ("BLEU", result.signature),
            ("chrF", result.chrf_signature),
            ("TER", result.ter_signature),
            ("paper BLEU", result.paper_signature),
        )
        if signature
    ]
    return sorted(dict.fromkeys(named))


def by_length(main: Result | None) -> list[dict[str, Any]]:
    """A row a bucket: ``words`` of the source as text, ``sentences``, ``bleu``, ``chrf``."""
    return [
        {
            "words": range_text(row["least"], row["most"]),
            "sentences": row["num_sentences"],
            "bleu": row["bleu"],
            "chrf": row["chrf"],
        }
        for row in (main.by_length if main else [])
    ]


def by_frequency(main: Result | None) -> dict[str, Any] | None:
    """``rows`` (``times`` seen in training as text, words of references, of hypotheses and of both,
    precision, recall, F1; None where there is nothing to divide by) and ``note``, what was counted.
    """
    if main is None or not main.by_frequency:
        return None
    rows = [
        {
            "times": range_text(row["least"], row["most"]),
            "reference": row["num_reference"],
            "hypothesis": row["num_hypothesis"],
            "matched": row["num_matched"],
            "precision": _share(row["num_matched"], row["num_hypothesis"]),
            "recall": _share(row["num_matched"], row["num_reference"]),
            "f1": row["f1"],
        }
        for row in main.by_frequency
    ]
    return {"rows": rows, "note": main.frequency_note}


def worst(main: Result | None) -> list[dict[str, Any]]:
    """Each with ``line``, ``chrf``, ``bleu``, ``source``, ``hypothesis`` and ``reference``."""
    return list(main.worst) if main else []


def comparisons(evaluations: Sequence[Result]) -> list[dict[str, Any]]:
    """Each paired comparison: ``test_set``, ``baseline``, ``rows`` with readable metrics, how it
    was tested, and ``signatures`` as pairs.
    """
    return [
        {
            **result.comparison,
            "test_set": result.test_set,
            "checkpoint": result.checkpoint,
            "rows": [
                {**row, "metric": METRIC_NAMES[row["metric"]]} for row in result.comparison["rows"]
            ],
            "signatures": [
                (METRIC_NAMES[name], text) for name, text in result.comparison["signatures"].items()
            ],
        }
        for result in evaluations
        if result.comparison is not None
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None

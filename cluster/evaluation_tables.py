"""Evaluations as tables for a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.tables import right_aligned
from trainer.breakdown import range_text
from trainer.compare import METRIC_NAMES
from trainer.evaluate import Result


def scores_of_one(result: Result) -> str:
    """Each score on a line, with its signature."""
    return "\n".join(f"{name:<10} {value:6.2f}  {sign}" for name, value, sign in _scores(result))


def scores_of_many(results: Sequence[Result]) -> str:
    """One line an evaluation, then the signatures that they share."""
    head = ("test set", "checkpoint", "step", *(name for name, _, _ in _scores(results[0])))
    rows = [
        (
            result.test_set,
            result.checkpoint,
            f"{result.step:,}",
            *(f"{value:.2f}" for _, value, _ in _scores(result)),
        )
        for result in results
    ]
    signatures = dict.fromkeys(
        (name, sign) for result in results for name, _, sign in _scores(result)
    )
    signed = sorted(signatures, key=lambda entry: head.index(entry[0]))
    return "\n".join([*right_aligned([head, *rows]), *(f"{name}: {sign}" for name, sign in signed)])


def _scores(result: Result) -> list[tuple[str, float, str]]:
    scores = [
        ("BLEU", result.bleu, result.signature),
        ("chrF", result.chrf, result.chrf_signature),
        ("TER", result.ter, result.ter_signature),
        ("paper BLEU", result.paper_bleu, result.paper_signature),
    ]
    return [(name, value, sign or "") for name, value, sign in scores if value is not None]


def comparison_table(comparison: dict[str, Any]) -> str:
    """One line a system and metric, then how it was tested."""
    head = ("system", "metric", "score", "95 % interval", "difference", "p (bootstrap)", "p (AR)")
    rows = [
        (
            row["system"],
            METRIC_NAMES[row["metric"]],
            f"{row['score']:.2f}",
            f"{row['mean']:.2f} ± {row['interval']:.2f}",
            *_beside_baseline(row),
        )
        for row in comparison["rows"]
    ]
    return "\n".join(
        [
            *right_aligned([head, *rows]),
            *_different_searches(comparison.get("systems", [])),
            f"differences are to {comparison['baseline']}; paired bootstrap with "
            f"{comparison['bootstrap_samples']:,} samples, approximate randomisation (AR) with "
            f"{comparison['randomisation_trials']:,} trials; a p below 0.05 is the usual threshold",
        ]
    )


def _different_searches(systems: Sequence[dict[str, Any]]) -> list[str]:
    """A line where not all were searched alike; results of earlier versions do not say."""
    settings = [system["settings"] for system in systems]
    names = [
        name
        for name in (settings[0] if settings else {})
        if name != "batch_tokens" and any(own.get(name) != settings[0][name] for own in settings)
    ]
    if not names:
        return []
    shown = (
        f"{system['system']} {', '.join(f'{name}={own.get(name)}' for name in names)}"
        for system, own in zip(systems, settings, strict=True)
    )
    return [f"searched with different settings: {'; '.join(shown)}"]


def comparison_signatures(comparisons: Iterable[dict[str, Any]]) -> str:
    """Each signature once, with seed, samples and trials."""
    signed = dict.fromkeys(
        f"{METRIC_NAMES[name]}: {sign}"
        for comparison in comparisons
        for name, sign in comparison["signatures"].items()
    )
    return "\n".join(signed)


def _beside_baseline(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["difference"] is None:
        return "baseline", "", ""
    return f"{row['difference']:+.2f}", f"{row['p_bootstrap']:.4f}", f"{row['p_randomisation']:.4f}"


def breakdown_tables(result: Result) -> str:
    """By source length, by training frequency of the target words, and the worst sentences."""
    by_length = [
        (
            range_text(row["least"], row["most"]),
            f"{row['num_sentences']:,}",
            f"{row['bleu']:.2f}",
            f"{row['chrf']:.2f}",
        )
        for row in result.by_length
    ]
    by_frequency = [
        (
            range_text(row["least"], row["most"]),
            f"{row['num_reference']:,}",
            f"{row['num_hypothesis']:,}",
            f"{row['num_matched']:,}",
            "-" if row["f1"] is None else f"{row['f1']:.3f}",
        )
        for row in result.by_frequency
    ]
    lines = [
        f"{result.test_set}, checkpoint {result.checkpoint}, by words of the source sentence",
        *right_aligned([("words", "sentences", "BLEU", "chrF"), *by_length]),
        "",
        f"target words by their frequency in training ({result.frequency_note})",
        *right_aligned([("times", "reference", "hypothesis", "both", "F1"), *by_frequency]),
        "",
        "the worst sentences by chrF",
    ]
    for row in result.worst:
        lines += [
            f"line {row['line']}: chrF {row['chrf']:.1f}, BLEU {row['bleu']:.1f}",
            *(f"{kind:>12}  {row[kind]}" for kind in ("source", "hypothesis", "reference")),
        ]
    return "\n".join(lines)

"""Whether one system is better than another, or the test set merely likes it.

Paired tests of sacreBLEU: the bootstrap (Koehn 2004) asks how the scores would vary over other
test sets drawn from the same text; approximate randomisation (Riezler and Maxwell 2005) asks how
often two systems that are alike would differ as much. Both on the very same sentences, with a fixed
seed (sacreBLEU's: 12345, or ``$SACREBLEU_SEED``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import CHRF, TER
from sacrebleu.significance import PairedTest

from trainer.scores import bleu_metric

BOOTSTRAP_SAMPLES = 1000
RANDOMISATION_TRIALS = 10_000
CONFIDENCE = 0.95

METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER"}


@dataclass(frozen=True)
class Compared:
    """One system by one metric, beside the baseline.

    Attributes:
        system: its name.
        metric: ``bleu``, ``chrf`` or ``ter``.
        score: of the whole test set.
        mean, interval: of the bootstrap's samples, and half the width of their confidence interval.
        difference: score minus the baseline's; None for the baseline itself, as are the next two.
        p_bootstrap, p_randomisation: how likely a difference as large is to be chance; 1 for the
            very same output.
    """

    system: str
    metric: str
    score: float
    mean: float
    interval: float
    difference: float | None
    p_bootstrap: float | None
    p_randomisation: float | None


@dataclass(frozen=True)
class Comparison:
    """A baseline and the systems compared with it; the baseline comes first in ``rows``."""

    baseline: str
    rows: tuple[Compared, ...]
    signatures: dict[str, str]
    bootstrap_samples: int = BOOTSTRAP_SAMPLES
    randomisation_trials: int = RANDOMISATION_TRIALS
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        """As a result's JSON holds it."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def compare(
    systems: Sequence[tuple[str, Sequence[str]]],
    references: Sequence[Sequence[str]],
    *,
    target_language: str,
    bootstrap_samples: int = BOOTSTRAP_SAMPLES,
    randomisation_trials: int = RANDOMISATION_TRIALS,
) -> Comparison:
    """Compare systems with the first of them.

    Args:
        systems: names and hypotheses, two at least; names differ.
        references: one list a translator, parallel to all hypotheses.
        target_language: code, for BLEU's tokeniser.
        bootstrap_samples, randomisation_trials: more make p-values finer.

    Raises:
        UserError: as ``trainer.scores.bleu_metric``.
    """
    assert len({name for name, _ in systems}) == len(systems) >= 2
    rows, signatures = [], {}
    scorers = {"bleu": bleu_metric(target_language), "chrf": CHRF(), "ter": TER()}
    for metric, scorer in scorers.items():
        tested = {
            kind: PairedTest(
                [(name, list(lines)) for name, lines in systems],
                {metric: scorer},
                [list(stream) for stream in references],
                test_type=kind,
                n_samples=samples,
            )()
            for kind, samples in (("bs", bootstrap_samples), ("ar", randomisation_trials))
        }
        # sacreBLEU calls its results by the metric's own name, chrF2 for one.
        (key, signature), *_ = tested["bs"][0].items()
        signatures[metric] = f"{signature}|ar:{randomisation_trials}"
        bootstrap, randomisation = tested["bs"][1][key], tested["ar"][1][key]
        for number, (name, lines) in enumerate(systems):
            own = bootstrap[number]
            least = _least_p(lines, systems[0][1])
            rows.append(
                Compared(
                    system=name,
                    metric=metric,
                    score=float(own.score),
                    mean=float(own.mean),
                    interval=float(own.ci),
                    difference=float(own.score - bootstrap[0].score) if number else None,
                    # sacreBLEU calls the very same output significant (p = 1 / (samples + 1)).
                    p_bootstrap=1.0 if number and least == 1.0 else own.p_value,
                    p_randomisation=max(least, randomisation[number].p_value) if number else None,
                )
            )
    return Comparison(
        baseline=systems[0][0],
        rows=tuple(rows),
        signatures=signatures,
        bootstrap_samples=bootstrap_samples,
        randomisation_trials=randomisation_trials,
    )


def _least_p(lines: Sequence[str], baseline: Sequence[str]) -> float:
    """The least p that approximate randomisation can have.

    Where k sentences differ there are 2^k ways to exchange them, all alike likely, and two of them
    (none, and all) differ as much as the systems do. sacreBLEU counts only those that differ by
    more: it would find two systems that differ in a single sentence as different as can be.
    """
    num_different = sum(own != other for own, other in zip(lines, baseline, strict=True))
    return min(1.0, 2.0 ** (1 - num_different))

"""How sure the numbers of a table of trained rows are: over sentences, and over seeds.

Two things make a score vary: which sentences it is taken on (here the bootstrap of Koehn 2004, the
same resamples for every system, so that differences are paired), and the seed of the training (here
Student's t, with the variance pooled over all rows that were trained with several seeds).

Shapes: S sentences, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics import BLEU

from trainer.scores import bleu_metric

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
_SEED = 12345  # sacreBLEU's

_ORDER = 4

# Two-sided 95 % of Student's t by degrees of freedom (the usual tables); beyond, the normal's.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_Z95 = 1.960


def bleu_counts(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, target_language: str
) -> tuple[npt.NDArray[np.int64], str]:
    """What corpus BLEU sums over sentences, and its signature.

    Args:
        hypotheses: one a sentence.
        references: one list a translator.
        target_language: code, for the tokeniser.

    Returns:
        [S, 10]: matching n-grams (1 to 4), n-grams (1 to 4), length of the hypothesis and of the
        reference; and sacreBLEU's signature of the corpus score.

    Raises:
        UserError: as ``trainer.scores.bleu_metric``.
    """
    # The effective order only concerns the score of a sentence, which is not used.
    metric = bleu_metric(target_language, effective_order=True)
    rows = []
    for number, line in enumerate(hypotheses):
        one = metric.sentence_score(line, [stream[number] for stream in references])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    corpus = bleu_metric(target_language)
    corpus.corpus_score(list(hypotheses[:1]), [list(stream[:1]) for stream in references])
    return np.array(rows, dtype=np.int64).reshape(len(rows), 2 * _ORDER + 2), str(
        corpus.get_signature()
    )


def bleu_of(summed: npt.ArrayLike) -> float:
    """Corpus BLEU (0 to 100) of summed ``bleu_counts``."""
    numbers = [int(value) for value in np.asarray(summed)]
    return float(
        BLEU.compute_bleu(
            correct=numbers[:_ORDER],
            total=numbers[_ORDER : 2 * _ORDER],
            sys_len=numbers[-2],
            ref_len=numbers[-1],
            smooth_method="exp",
        ).score
    )


def resamples(num_sentences: int, num_resamples: int = RESAMPLES) -> Floats:
    """How often each sentence was drawn, [R, S]; the same for the same number of sentences."""
    generator = np.random.default_rng(_SEED)
    drawn = generator.integers(num_sentences, size=(num_resamples, num_sentences))
    return np.stack([np.bincount(row, minlength=num_sentences) for row in drawn]).astype(np.float64)


def bleu_samples(counts: npt.ArrayLike, drawn: Floats) -> Floats:
    """BLEU of each resample, [R]."""
    summed = drawn @ np.asarray(counts, dtype=np.float64)
    return np.array([bleu_of(row) for row in summed])


def perplexity(nll: npt.ArrayLike, pieces: npt.ArrayLike) -> float:
    """Per piece, of sentences' nats and pieces."""
    return float(np.exp(np.sum(nll) / np.sum(pieces)))


def perplexity_samples(nll: npt.ArrayLike, pieces: npt.ArrayLike, drawn: Floats) -> Floats:
    """Perplexity of each resample, [R]."""
    nats, number = np.asarray(nll, np.float64), np.asarray(pieces, np.float64)
    return np.asarray(np.exp((drawn @ nats) / (drawn @ number)))


def interval(samples: Floats) -> tuple[float, float]:
    """The middle 95 % of a bootstrap's samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class SeedNoise:
    """What the seed alone does to a score: standard deviation of one training, pooled over rows.

    ``freedom`` is its degrees of freedom; 0 if no row had two seeds, and ``deviation`` is NaN then.
    """

    deviation: float
    freedom: int

    @classmethod
    def of(cls, scores: Mapping[str, Sequence[float]]) -> SeedNoise:
        """Of each row's scores, one a seed."""
        groups = [np.asarray(values, np.float64) for values in scores.values() if len(values) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        return cls(math.sqrt(squares / freedom) if freedom else math.nan, freedom)

    def half_width(self, *num_seeds: int) -> float:
        """Half of the 95 % interval of a mean over so many seeds, or of a difference of two."""
        if not self.freedom:
            return math.nan
        return (
            t95(self.freedom) * self.deviation * math.sqrt(sum(1 / number for number in num_seeds))
        )


def t95(freedom: int) -> float:
    """Student's t that 95 % lie within, two-sided."""
    return _T95[freedom - 1] if freedom <= len(_T95) else _Z95

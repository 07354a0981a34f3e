"""Where a system is good and where it is not: by sentence length, by word frequency, worst first.

Source: the buckets are those of compare-mt (Neubig et al. 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from trainer.scores import bleu_metric

# The least length (source words) and the least frequency (times in the training text) of each
# bucket; a bucket ends where the next begins.
LENGTHS = (0, 10, 20, 30, 40, 50, 60)
FREQUENCIES = (0, 1, 2, 3, 4, 5, 10, 100, 1000, 10_000)
NUM_WORST = 10

_tokenize: Callable[[str], str] = Tokenizer13a()


@dataclass(frozen=True)
class LengthBucket:
    """Sentences whose source has ``least`` to ``most`` words (None: or more)."""

    least: int
    most: int | None
    num_sentences: int
    bleu: float
    chrf: float


@dataclass(frozen=True)
class FrequencyBucket:
    """Target words that were seen ``least`` to ``most`` times (None: or more) in training.

    ``num_matched`` counts a word of a sentence as often as hypothesis and reference both have it.
    ``f1`` is the harmonic mean of precision (matched of the hypotheses' words) and recall (matched
    of the references' words), 0 to 1; None where neither has such a word.
    """

    least: int
    most: int | None
    num_reference: int
    num_hypothesis: int
    num_matched: int
    f1: float | None


@dataclass(frozen=True)
class WorstSentence:
    """A sentence by its number (from 1), with sentence chrF and BLEU (effective order)."""

    line: int
    chrf: float
    bleu: float
    source: str
    hypothesis: str
    reference: str


def words(line: str) -> list[str]:
    """The words of a sentence as mteval-v13a cuts them; case is kept."""
    return _tokenize(line).split()


def by_length(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    target_language: str,
) -> list[LengthBucket]:
    """BLEU and chrF of the sentences of like length; empty buckets are left out."""
    bleu, chrf = bleu_metric(target_language), CHRF()
    members: dict[int, list[int]] = {}
    for index, source in enumerate(sources):
        members.setdefault(_bucket(len(words(source)), LENGTHS), []).append(index)
    buckets = []
    for number, indices in sorted(members.items()):
        found = [hypotheses[index] for index in indices]
        expected = [[stream[index] for index in indices] for stream in references]
        least, most = _bounds(number, LENGTHS)
        buckets.append(
            LengthBucket(
                least=least,
                most=most,
                num_sentences=len(indices),
                bleu=float(bleu.corpus_score(found, expected).score),
                chrf=float(chrf.corpus_score(found, expected).score),
            )
        )
    return buckets


def by_frequency(
    hypotheses: Sequence[str], references: Sequence[str], counts: Mapping[str, int]
) -> list[FrequencyBucket]:
    """How well words are translated that training has seen rarely or often.

    Args:
        hypotheses: one a sentence.
        references: the first reference of each.
        counts: how often training has seen a target word; one that is missing was never seen.
    """
    totals = [[0, 0, 0] for _ in FREQUENCIES]  # reference, hypothesis, matched
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found, expected = Counter(words(hypothesis)), Counter(words(reference))
        for column, words_of in enumerate((expected, found, expected & found)):
            for word, count in words_of.items():
                totals[_bucket(counts.get(word, 0), FREQUENCIES)][column] += count
    return [
        FrequencyBucket(
            *_bounds(number, FREQUENCIES),
            num_reference=reference,
            num_hypothesis=hypothesis,
            num_matched=matched,
            # 2 P R / (P + R), with the counts put in.
            f1=2 * matched / (reference + hypothesis) if reference + hypothesis else None,
        )
        for number, (reference, hypothesis, matched) in enumerate(totals)
        if reference or hypothesis
    ]


def worst(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    target_language: str,
    num: int = NUM_WORST,
) -> list[WorstSentence]:
    """The sentences of the lowest chrF, the worst first."""
    chrf, bleu = CHRF(), bleu_metric(target_language, effective_order=True)
    expected = [list(lines) for lines in zip(*references, strict=True)]
    values = [
        float(chrf.sentence_score(hypothesis, lines).score)
        for hypothesis, lines in zip(hypotheses, expected, strict=True)
    ]
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    return [
        WorstSentence(
            line=index + 1,
            chrf=values[index],
            bleu=float(bleu.sentence_score(hypotheses[index], expected[index]).score),
            source=sources[index],
            hypothesis=hypotheses[index],
            reference=expected[index][0],
        )
        for index in order[:num]
    ]


def as_rows(
    items: Sequence[LengthBucket | FrequencyBucket | WorstSentence],
) -> list[dict[str, Any]]:
    """As a result's JSON holds them."""
    return [asdict(item) for item in items]


def range_text(least: int, most: int | None) -> str:
    """``5-9``, ``60+``, ``3``: a bucket's bounds as a table shows them."""
    if most is None:
        return f"{least:,}+"
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def _bucket(value: int, starts: tuple[int, ...]) -> int:
    return sum(value >= start for start in starts) - 1


def _bounds(number: int, starts: tuple[int, ...]) -> tuple[int, int | None]:
    return starts[number], starts[number + 1] - 1 if number + 1 < len(starts) else None

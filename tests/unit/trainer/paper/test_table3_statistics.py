from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.paper.table3_statistics import (
    SeedNoise,
    bleu_counts,
    bleu_of,
    bleu_samples,
    interval,
    perplexity,
    perplexity_samples,
    resamples,
    t95,
)
from trainer.scores import bleu_metric

REFERENCES = [
    "Der alte Mann schläft auf einer Bank im Park .",
    "Zwei Hunde laufen über die Wiese .",
    "Ein Kind spielt mit einem roten Ball am Strand .",
    "Die Frau liest ein Buch .",
]
HYPOTHESES = [
    "Der alte Mann schläft auf der Bank im Park .",
    "Zwei Hunde rennen über eine Wiese .",
    "Ein Kind spielt mit einem roten Ball .",
    "",
]


def test_bleu_of_the_sums_is_the_corpus_bleu_and_so_is_its_signature() -> None:
    counts, signature = bleu_counts(HYPOTHESES, [REFERENCES], target_language="de")
    metric = bleu_metric("de")
    expected = metric.corpus_score(HYPOTHESES, [REFERENCES])
    assert bleu_of(counts.sum(0)) == pytest.approx(expected.score, abs=1e-9)
    assert signature == str(metric.get_signature())


def test_bleu_takes_several_references() -> None:
    other = ["Ein alter Mann schläft auf der Bank im Park .", *REFERENCES[1:]]
    counts, signature = bleu_counts(HYPOTHESES, [REFERENCES, other], target_language="de")
    expected = bleu_metric("de").corpus_score(HYPOTHESES, [REFERENCES, other])
    assert bleu_of(counts.sum(0)) == pytest.approx(expected.score, abs=1e-9)
    assert signature.startswith("nrefs:2")


def test_a_resample_is_the_bleu_of_the_sentences_drawn() -> None:
    counts, _ = bleu_counts(HYPOTHESES, [REFERENCES], target_language="de")
    drawn = np.array([[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    chosen = [0, 0, 1, 2]
    expected = bleu_metric("de").corpus_score(
        [HYPOTHESES[i] for i in chosen], [[REFERENCES[i] for i in chosen]]
    )
    found = bleu_samples(counts, drawn)
    assert found[0] == pytest.approx(expected.score, abs=1e-9)
    assert found[1] == pytest.approx(bleu_of(counts.sum(0)), abs=1e-9)


def test_resamples_draw_as_many_sentences_and_are_the_same_for_all_systems() -> None:
    drawn = resamples(50, 20)
    assert drawn.shape == (20, 50)
    assert (drawn.sum(1) == 50).all()
    assert (drawn == resamples(50, 20)).all()
    assert not (drawn[0] == drawn[1]).all()


def test_perplexity_is_per_piece_and_its_interval_covers_it() -> None:
    generator = np.random.default_rng(1)
    pieces = generator.integers(5, 20, 400)
    nll = pieces * 2.0 + generator.normal(0, 3, 400)
    value = perplexity(nll, pieces)
    assert value == pytest.approx(math.exp(nll.sum() / pieces.sum()))
    low, high = interval(perplexity_samples(nll, pieces, resamples(400)))
    assert low < value < high
    # The delta method: the standard error of the mean log-probability per piece.
    error = np.std(nll - pieces * nll.sum() / pieces.sum()) / math.sqrt(400) / pieces.mean()
    assert (high - low) / 2 == pytest.approx(value * 1.96 * error, rel=0.1)


def test_the_noise_of_seeds_is_pooled_over_rows_with_several() -> None:
    noise = SeedNoise.of({"a": [1.0, 2.0, 3.0], "b": [10.0, 14.0], "c": [7.0]})
    # Squares about the means: 2 of a, 8 of b; degrees of freedom 2 and 1.
    assert noise.freedom == 3
    assert noise.deviation == pytest.approx(math.sqrt(10 / 3))
    assert noise.half_width(3) == pytest.approx(3.182 * noise.deviation / math.sqrt(3))
    assert noise.half_width(1, 3) == pytest.approx(3.182 * noise.deviation * math.sqrt(4 / 3))


def test_one_seed_a_row_tells_nothing_of_their_noise() -> None:
    noise = SeedNoise.of({"a": [1.0], "b": [2.0]})
    assert noise.freedom == 0
    assert math.isnan(noise.deviation)
    assert math.isnan(noise.half_width(1))


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (8, 2.306), (30, 2.042), (500, 1.960)])
def test_students_t(freedom: int, t: float) -> None:
    assert t95(freedom) == t


def test_an_interval_of_a_known_noise_covers_the_truth_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(2000):
        scores = {name: list(generator.normal(5, 2, 3)) for name in "abcd"}
        width = SeedNoise.of(scores).half_width(3)
        covered += abs(np.mean(scores["a"]) - 5) < width
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)

"""Paired tests: what they find where there is a difference, and where there is none."""

from __future__ import annotations

import random

import pytest
from sacrebleu.metrics import BLEU

from trainer.compare import compare

WORDS = [
    "der",
    "Hund",
    "die",
    "Katze",
    "Haus",
    "Baum",
    "alt",
    "neu",
    "sieht",
    "isst",
    "rot",
    "blau",
]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    rng = random.Random(1)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(6, 14))) for _ in range(120)]

    def damaged(share: float) -> list[str]:
        return [
            " ".join(rng.choice(WORDS) if rng.random() < share else w for w in line.split())
            for line in references
        ]

    return {
        "reference": references,
        "good": damaged(0.1),
        "as good": damaged(0.1),
        "bad": damaged(0.5),
    }


def run(texts: dict[str, list[str]], *names: str):
    return compare(
        [(name, texts[name]) for name in names],
        [texts["reference"]],
        target_language="de",
        bootstrap_samples=300,
        randomisation_trials=500,
    )


def test_a_real_difference_is_found_and_its_direction_kept(texts) -> None:
    found = run(texts, "good", "bad", "as good")
    assert found.baseline == "good"
    rows = {(row.system, row.metric): row for row in found.rows}
    assert len(rows) == 9
    for metric, sign in (("bleu", -1), ("chrf", -1), ("ter", 1)):
        bad = rows["bad", metric]
        assert bad.difference * sign > 0
        assert bad.p_bootstrap < 0.05
        assert bad.p_randomisation < 0.05
        assert rows["as good", metric].p_randomisation > 0.05
        base = rows["good", metric]
        assert (base.difference, base.p_bootstrap, base.p_randomisation) == (None, None, None)
    bleu = BLEU().corpus_score(texts["bad"], [texts["reference"]]).score
    assert rows["bad", "bleu"].score == pytest.approx(bleu)
    assert abs(rows["bad", "bleu"].mean - bleu) < rows["bad", "bleu"].interval


def test_a_system_is_no_better_than_itself(texts) -> None:
    found = compare(
        [("one", texts["good"]), ("other", texts["good"])],
        [texts["reference"]],
        target_language="de",
        bootstrap_samples=100,
        randomisation_trials=100,
    )
    others = [row for row in found.rows if row.system == "other"]
    # sacreBLEU itself would say p = 0.0099, as if that were significant.
    assert [(row.difference, row.p_bootstrap, row.p_randomisation) for row in others] == [
        (0, 1.0, 1.0)
    ] * 3


def test_the_same_again_and_what_was_done_is_said(texts) -> None:
    first, second = run(texts, "good", "bad"), run(texts, "good", "bad")
    assert first == second
    assert "bs:300" in first.signatures["bleu"]
    assert "ar:500" in first.signatures["bleu"]
    assert "seed:12345" in first.signatures["bleu"]
    assert (first.bootstrap_samples, first.randomisation_trials) == (300, 500)


@pytest.mark.parametrize(("num_different", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625)])
def test_a_few_sentences_that_differ_are_not_significant(texts, num_different, least) -> None:
    # The true p of the randomisation test: of 2^k exchanges two differ as much, or more do.
    better = [*texts["reference"][:num_different], *texts["bad"][num_different:]]
    found = compare(
        [("bad", texts["bad"]), ("better", better)],
        [texts["reference"]],
        target_language="de",
        bootstrap_samples=100,
        randomisation_trials=1000,
    )
    for row in found.rows:
        if row.system == "better":
            assert row.p_randomisation == pytest.approx(least, abs=0.05)
            assert row.p_randomisation >= least


def test_bleu_of_chinese_is_of_characters() -> None:
    references = ["我们今天看到一只红色的狗。", "他明天会来这里吗?"]
    found = compare(
        [("one", references), ("other", ["我们今天看到一只白色的狗。", "他明天会去那里吗?"])],
        [references],
        target_language="zh",
        bootstrap_samples=10,
        randomisation_trials=10,
    )
    assert "tok:zh" in found.signatures["bleu"]
    assert 0 < next(row.score for row in found.rows if row.system == "other") < 100

"""Buckets against counts done by hand."""

from __future__ import annotations

import pytest
import sacrebleu

from trainer import breakdown


def test_words_are_those_of_the_13a_tokeniser() -> None:
    assert breakdown.words("Ein Hund, der bellt.") == ["Ein", "Hund", ",", "der", "bellt", "."]


def test_sentences_by_the_length_of_their_source() -> None:
    sources = ["a " * 9, "a " * 10, "a " * 19, "a " * 60, "a " * 200]
    hypotheses = ["b c d e f", "b c d e x", "b c d e f", "b c d e f", "x"]
    references = ["b c d e f"] * 5
    found = breakdown.by_length(sources, hypotheses, [references], target_language="de")
    assert [(b.least, b.most, b.num_sentences) for b in found] == [
        (0, 9, 1),
        (10, 19, 2),
        (60, None, 2),
    ]
    assert found[0].bleu == pytest.approx(100.0)
    assert found[1].bleu == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses[1:3], [references[1:3]]).score
    )


def test_words_by_their_frequency() -> None:
    counts = {"der": 500, "Hund": 7, "bellt": 1}
    # "neu" and "alt" were never seen; "der" is once too many in the hypothesis.
    hypotheses = ["der der Hund bellt", "alt"]
    references = ["der Hund bellt bellt", "neu"]
    found = {b.least: b for b in breakdown.by_frequency(hypotheses, references, counts)}
    assert sorted(found) == [0, 1, 5, 100]

    def totals(least: int) -> tuple[int, int, int, float | None]:
        b = found[least]
        return b.num_reference, b.num_hypothesis, b.num_matched, b.f1

    assert totals(0) == (1, 1, 0, 0.0)
    # Reference "bellt bellt", hypothesis "bellt": precision 1, recall 1/2.
    assert totals(1) == (2, 1, 1, pytest.approx(2 / 3))
    assert totals(5) == (1, 1, 1, 1.0)
    assert totals(100) == (1, 2, 1, pytest.approx(2 / 3))
    assert (found[5].most, found[100].most) == (9, 999)


def test_a_word_is_not_matched_across_sentences() -> None:
    (bucket,) = breakdown.by_frequency(["a", "b"], ["b", "a"], {})
    assert bucket.num_matched == 0


def test_the_worst_sentences() -> None:
    references = ["eins zwei drei vier", "Hund", "Katze Haus Baum"]
    hypotheses = ["eins zwei drei vier", "xyz", "Katze Haus"]
    found = breakdown.worst(
        ["s1", "s2", "s3"], hypotheses, [references], target_language="de", num=2
    )
    assert [(item.line, item.source) for item in found] == [(2, "s2"), (3, "s3")]
    assert found[0].chrf == 0.0
    assert found[1].chrf == pytest.approx(
        sacrebleu.sentence_chrf("Katze Haus", ["Katze Haus Baum"]).score
    )


@pytest.mark.parametrize(
    ("bounds", "text"), [((0, 9), "0-9"), ((3, 3), "3"), ((10_000, None), "10,000+")]
)
def test_bounds_as_text(bounds: tuple[int, int | None], text: str) -> None:
    assert breakdown.range_text(*bounds) == text


def test_bleu_of_chinese_buckets_and_sentences_is_of_characters() -> None:
    hypotheses, references = ["我们看到白色的狗。"], ["我们看到红色的狗。"]
    expected = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh").score
    (bucket,) = breakdown.by_length(["a"], hypotheses, [references], target_language="zh")
    (sentence,) = breakdown.worst(["a"], hypotheses, [references], target_language="zh")
    assert bucket.bleu == pytest.approx(expected)
    assert sentence.bleu == pytest.approx(expected)
    assert expected > 30

"""Scores against sums done by hand."""

from __future__ import annotations

import math

import pytest
import sacrebleu

from data_shards.errors import UserError
from trainer.scores import bleu_metric, paper_bleu, paper_tokens, score


def test_compounds_are_split_at_hyphens_between_letters_only() -> None:
    # A space on either side of the hyphen, or a dash of its own, is no compound.
    assert paper_tokens("Ein rich-text Format - alt.", "de") == (
        "Ein rich ##AT##-##AT## text Format - alt ."
    )


def test_overlapping_hyphens_are_split_as_the_script_splits_them() -> None:
    # s{(\S)-(\S)}{...}g goes on behind the letter that it has taken: the b of a-b-c is spent.
    assert paper_tokens("a-b-c", "de") == "a ##AT##-##AT## b-c"
    assert paper_tokens("ab-cd-ef", "de") == "ab ##AT##-##AT## cd ##AT##-##AT## ef"


def test_paper_bleu_by_hand() -> None:
    # Tokens: hypothesis "the cat sat on the mat .", reference "the cat sat on a mat ."
    # n-grams matched: 6 of 7, 4 of 6, 2 of 5 (the cat sat; cat sat on), 1 of 4; equal lengths.
    expected = 100 * math.exp(sum(map(math.log, (6 / 7, 4 / 6, 2 / 5, 1 / 4))) / 4)
    found = paper_bleu(
        ["the cat sat on the mat."], [["the cat sat on a mat."]], target_language="en"
    )
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_paper_bleu_is_unsmoothed_and_cased() -> None:
    # No 4-gram matches: nought, where a smoothed BLEU is above it.
    lines, references = ["a b c d e f"], [["a b c x d e f"]]
    assert paper_bleu(lines, references, target_language="en").value == 0.0
    assert sacrebleu.corpus_bleu(lines, references).score > 0
    assert paper_bleu(["A b c d"], [["a b c d"]], target_language="en").value == 0.0


def test_brevity_penalty_of_paper_bleu_by_hand() -> None:
    found = paper_bleu(["a b c d"], [["a b c d e"]], target_language="en")
    assert found.value == pytest.approx(100 * math.exp(1 - 5 / 4), abs=1e-9)


def test_splitting_compounds_makes_more_matches() -> None:
    # One token of sacreBLEU's, three of the paper's; of which two are right.
    hypotheses, references = (
        ["wir sehen das Test-Bild heute hier"],
        [["wir sehen das Test-Foto heute hier"]],
    )
    ours = score(hypotheses, references, target_language="de")
    tokens = paper_tokens(hypotheses[0], "de").split()
    assert tokens == ["wir", "sehen", "das", "Test", "##AT##-##AT##", "Bild", "heute", "hier"]
    assert ours.paper_bleu.value > ours.bleu.value
    assert "split:hyphens" in ours.paper_bleu.signature
    assert "tok:13a" in ours.bleu.signature


def test_typographic_quotes_of_a_hypothesis_become_plain() -> None:
    # The reference was always plain in the papers' files.
    found = paper_bleu(["er sagt “ja” zu ihr"], [['er sagt "ja" zu ihr']], target_language="de")
    assert found.value == pytest.approx(100.0)


def test_ter_by_hand() -> None:
    # One word of four replaced; a block moved counts as one edit.
    ours = score(["a b x d"], [["a b c d"]], target_language="en")
    assert ours.ter.value == pytest.approx(25.0)
    moved = score(["c d a b"], [["a b c d"]], target_language="en")
    assert moved.ter.value == pytest.approx(25.0)


def test_several_references() -> None:
    ours = score(["a b c d e"], [["x y z v w"], ["a b c d e"]], target_language="en")
    assert ours.bleu.value == pytest.approx(100.0)
    assert ours.paper_bleu.value == pytest.approx(100.0)
    assert "nrefs:2" in ours.bleu.signature
    assert "nrefs:2" in ours.paper_bleu.signature


def test_a_language_without_rules_of_its_own() -> None:
    assert paper_tokens("eins, zwei.", "target") == "eins , zwei ."


def test_a_reference_as_published_is_its_own_best_translation() -> None:
    lines = ["„Ja“, sagt er – und geht … „nein“ sagt “sie” zu ihm."]
    ours = score(lines, [lines], target_language="de")
    assert (ours.bleu.value, ours.paper_bleu.value) == pytest.approx((100.0, 100.0))
    assert "punct:plain" in ours.paper_bleu.signature


def test_chinese_is_cut_into_characters() -> None:
    ours = score(["我们看到白色的狗。"], [["我们看到红色的狗。"]], target_language="zh")
    assert "tok:zh" in ours.bleu.signature
    assert ours.bleu.value > 30
    german = score(["ein Hund"], [["ein Hund"]], target_language="de").bleu.signature
    assert german.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


@pytest.mark.parametrize("language", ["ja", "ko"])
def test_a_missing_tokeniser_is_named(monkeypatch, language) -> None:
    # As where the package is missing, wherever the tests run.
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{language}_mecab.MeCab", None)
    with pytest.raises(UserError, match=rf"pip install 'sacrebleu\[{language}\]'"):
        bleu_metric(language)

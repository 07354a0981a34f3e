from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import sentencepiece

from data_shards import vocabulary
from data_shards.config import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from data_shards.errors import DataError
from data_shards.vocabulary import Vocabulary


def sentences(count: int = 400) -> list[str]:
    generator = random.Random(3)
    words = [
        "the",
        "dog",
        "cat",
        "house",
        "läuft",
        "schläft",
        "Straße",
        "und",
        "in",
        "zu",
        "blue",
        "grün",
        "17",
        "…",
        "Über",
    ]
    return [" ".join(generator.choices(words, k=generator.randint(2, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    return vocabulary.train(sentences(), path, size=60, kind="bpe")


def test_special_pieces_have_their_ids(learnt: Vocabulary) -> None:
    pieces = learnt.pieces([PAD_ID, BOS_ID, EOS_ID, UNK_ID])
    assert pieces == ["<pad>", "<s>", "</s>", "<unk>"]
    assert learnt.size == 60


def test_text_comes_back_as_it_was(learnt: Vocabulary) -> None:
    lines = sentences(600)
    ids = learnt.encode(lines)
    assert learnt.decode(ids) == lines
    assert not {PAD_ID, BOS_ID, EOS_ID, UNK_ID} & {piece for line in ids for piece in line}


def test_many_lines_encode_like_each_alone(learnt: Vocabulary) -> None:
    lines = sentences(700)
    assert learnt.encode(lines) == [learnt.encode([line])[0] for line in lines]


def test_text_to_translate_is_normalised_like_training_text(learnt: Vocabulary) -> None:
    composed, loose = "die Straße läuft", "  die\u00a0 Straße \t la\u0308uft"
    assert learnt.encode([loose]) == learnt.encode([composed])


def test_special_ids_are_dropped_and_empty_input_is_fine(learnt: Vocabulary) -> None:
    [ids] = learnt.encode(["the dog"])
    assert learnt.decode([[BOS_ID, *ids, EOS_ID, PAD_ID, PAD_ID], []]) == ["the dog", ""]
    assert learnt.encode([]) == []
    assert learnt.encode(["", "   "]) == [[], []]
    assert learnt.decode([]) == []


def test_signs_of_special_pieces_in_text_stay_text(learnt: Vocabulary) -> None:
    [ids] = learnt.encode(["</s> the <pad>"])
    assert PAD_ID not in ids
    assert EOS_ID not in ids


def test_an_unseen_character_is_unknown(learnt: Vocabulary) -> None:
    [ids] = learnt.encode(["the 漢"])
    assert ids[-1] == UNK_ID


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        vocabulary.train(sentences(), tmp_path / name, size=45, kind=kind)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert capfd.readouterr() == ("", "")  # SentencePiece is silent


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_a_vocabulary_names_the_largest_that_works(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        vocabulary.train(sentences(), tmp_path / "v", size=30_000, kind=kind)
    assert caught.value.exit_status == 2
    found = re.search(r"set data\.vocabulary_size=(\d+)", str(caught.value))
    assert found is not None
    largest = int(found.group(1))
    assert vocabulary.train(sentences(), tmp_path / "v", size=largest, kind=kind).size == largest


def test_too_small_a_vocabulary_names_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary_size 20 is too small .* need (\d+) pieces"):
        vocabulary.train(sentences(), tmp_path / "v", size=20, kind="bpe")


def test_no_text_gives_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sentence"):
        vocabulary.train([], tmp_path / "v", size=40, kind="bpe")


def test_a_damaged_or_missing_model_is_named(learnt: Vocabulary, tmp_path: Path) -> None:
    path = tmp_path / "v.model"
    with pytest.raises(DataError, match=r"v\.model cannot be read"):
        Vocabulary.load(path)
    for content in (b"", b"not a model", learnt.path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"v\.model is not a SentencePiece model"):
            Vocabulary.load(path)


def test_a_model_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=str(prefix), vocab_size=40, minloglevel=2
    )
    with pytest.raises(DataError, match=r"numbers pad, bos, eos and unk \(-1, 1, 2, 0\)"):
        Vocabulary.load(f"{prefix}.model")

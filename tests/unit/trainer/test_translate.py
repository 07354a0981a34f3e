from __future__ import annotations

import logging

import pytest

from data_shards.config import EOS_ID
from data_shards.errors import UserError
from tests.runs import pairs
from trainer.config import EvaluationConfig
from trainer.run import load_model
from trainer.translate import decode, length_batches, read_lines, translate


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_model(trained_run, "last")


@pytest.fixture(scope="module")
def sentences():
    return [source for source, _ in pairs(16, seed=9)]


def _settings(**values):
    return EvaluationConfig.model_validate({"max_extra_length": 10, **values})


def test_the_model_of_these_tests_translates(loaded):
    # What follows would be weak with a model whose every output is alike.
    chosen = pairs(40, seed=9)
    found = list(translate(loaded, [source for source, _ in chosen], _settings()))
    assert len(set(found)) > 30
    first_words = [text.split()[:1] for text in found]
    right = [target.split()[:1] for _, target in chosen]
    assert sum(a == b for a, b in zip(first_words, right, strict=True)) > 12


def test_batch_and_chunk_sizes_do_not_change_a_translation(loaded, sentences):
    alone = [next(translate(loaded, [line], _settings())) for line in sentences]
    for batch_tokens, chunk_lines in ((40, 7), (4096, 1000)):
        settings = _settings(batch_tokens=batch_tokens)
        assert list(translate(loaded, sentences, settings, chunk_lines=chunk_lines)) == alone


def test_lines_stream_in_chunks(loaded, sentences):
    taken = []

    def lines():
        for line in sentences:
            taken.append(line)
            yield line

    stream = translate(loaded, lines(), _settings(beam=1), chunk_lines=4)
    next(stream)
    assert len(taken) == 4


def test_empty_lines_stay_empty_and_in_place(loaded):
    lines = ["", "red dog", "   ", "\t", "old tree", ""]
    found = list(translate(loaded, lines, _settings()))
    assert [bool(text) for text in found] == [False, True, False, False, True, False]
    assert list(translate(loaded, [], _settings())) == []
    assert list(translate(loaded, ["", ""], _settings())) == ["", ""]


def test_a_lines_end_is_not_part_of_it(loaded):
    found = list(translate(loaded, ["red dog", "red dog\n", "red dog\r\n"], _settings()))
    assert found[0] == found[1] == found[2]


def test_too_long_a_line_is_cut_and_told_by_its_number(loaded, caplog):
    long = " ".join(["red"] * 200)
    with caplog.at_level(logging.WARNING):
        found = list(translate(loaded, ["old tree", long], _settings(beam=1), chunk_lines=1))
    assert found[1]
    assert "line 2 has" in caplog.text
    assert "longest sentence is 23" in caplog.text
    kept = loaded.vocabulary.encode([long])[0][: loaded.config.model.max_positions - 1]
    hypothesis = decode(loaded, [[*kept, EOS_ID]], _settings(beam=1))[0]
    assert found[1] == loaded.vocabulary.decode([hypothesis.ids])[0]


def test_a_translation_holds_no_line_break(loaded, monkeypatch):
    monkeypatch.setattr(
        type(loaded.vocabulary), "decode", lambda self, ids: ["one\u2028two\nthree"] * len(ids)
    )
    assert list(translate(loaded, ["red dog"], _settings(beam=1))) == ["one two three"]


def test_length_batches_hold_the_budget_and_each_index_once():
    lengths = [3, 9, 1, 4, 30, 4, 2, 8]
    batches = list(length_batches(lengths, 16))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches[0] == [4]  # longer than the budget: alone
    for batch in batches[1:]:
        assert len(batch) * max(lengths[index] for index in batch) <= 16
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(lengths, reverse=True)
    assert list(length_batches([], 16)) == []


def test_lines_are_read_as_utf8_with_any_end_and_without_a_bom():
    raw = [b"\xef\xbb\xbfgr\xc3\xbcn\r\n", b"\xe2\x80\xa8a\n", b"\n", b"last"]
    assert list(read_lines(raw, name="x")) == ["grün", "\u2028a", "", "last"]


def test_other_encodings_are_told_by_line_and_with_a_mend():
    with pytest.raises(UserError, match=r"in\.txt, line 2: not UTF-8 .*byte 2\): .*iconv"):
        list(read_lines([b"fine\n", "grün\n".encode("latin1")], name="in.txt"))

"""Lines in, translations out: order, batches, cuts, n-best, prefixes, unknown pieces, precision."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.clean import normalise
from data_shards.config import EOS_ID, UNK_ID
from data_shards.errors import UserError
from model.search import Hypothesis, SearchOptions, search
from tests.runs import pairs
from trainer.config import EvaluationConfig
from trainer.run import load_model
from trainer.translate import Translation, Translator, length_batches, read_lines
from trainer.unknown import copied_words, fill_in

EMPTY = Translation("", 0.0, 0.0, [])


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_model(trained_run, "last")


@pytest.fixture(scope="module")
def sentences():
    return [source for source, _ in pairs(16, seed=9)]


def _translator(loaded, num_best=1, **values):
    evaluation = EvaluationConfig.model_validate({"max_extra_length": 10, **values})
    return Translator([loaded], evaluation, num_best=num_best)


def _best(loaded, lines, **values):
    return [found[0].text for found in _translator(loaded, **values).translate(lines)]


def test_the_model_of_these_tests_translates(loaded):
    # What follows would be weak with a model whose every output is alike.
    chosen = pairs(40, seed=9)
    found = _best(loaded, [source for source, _ in chosen])
    assert len(set(found)) > 30
    first_words = [text.split()[:1] for text in found]
    right = [target.split()[:1] for _, target in chosen]
    assert sum(a == b for a, b in zip(first_words, right, strict=True)) > 12


def test_batch_and_chunk_sizes_do_not_change_a_translation(loaded, sentences):
    alone = [_best(loaded, [line])[0] for line in sentences]
    for batch_tokens, chunk_lines in ((40, 7), (4096, 1000)):
        translator = _translator(loaded, batch_tokens=batch_tokens)
        streamed = translator.stream(sentences, chunk_lines=chunk_lines)
        assert [found[0].text for found in streamed] == alone


def test_samples_do_not_depend_on_batches_and_chunks(loaded, sentences):
    whole = _translator(loaded, 3, search="sample").translate(sentences)
    assert all(len(found) == 3 for found in whole)
    small = _translator(loaded, 3, search="sample", batch_tokens=40)
    ids = [[one.ids for one in found] for found in whole]
    assert [[one.ids for one in found] for found in small.stream(sentences, chunk_lines=5)] == ids
    (third,) = small.translate(sentences[2:3], keys=[2])
    assert [one.ids for one in third] == ids[2]
    assert len({tuple(one.ids) for found in whole for one in found}) > 20


def test_lines_stream_in_chunks(loaded, sentences):
    taken = []

    def lines():
        for line in sentences:
            taken.append(line)
            yield line

    next(_translator(loaded, beam=1).stream(lines(), chunk_lines=4))
    assert len(taken) == 4


def test_empty_lines_stay_empty_and_in_place(loaded):
    translator = _translator(loaded)
    lines = ["", "red dog", "   ", "\t", "old tree", "\u3000\u2003"]
    found = translator.translate(lines, prefixes=["alt"] * 6)
    assert [one == [EMPTY] for one in found] == [True, False, True, True, False, True]
    assert translator.translate([]) == []
    assert translator.translate(["", ""]) == [[EMPTY], [EMPTY]]
    assert translator.encode(" ") == []
    assert translator.encode("red dog")[-1] == EOS_ID


def test_a_lines_end_is_not_part_of_it(loaded):
    found = _best(loaded, ["red dog", "red dog\n", "red dog\r\n"])
    assert found[0] == found[1] == found[2]


def test_too_long_a_line_is_cut_and_told_by_its_number(loaded, caplog):
    long = " ".join(["red"] * 20_000)
    translator = _translator(loaded, beam=1)
    with caplog.at_level(logging.WARNING):
        found = list(translator.stream(["old tree", long], chunk_lines=1))
    assert caplog.text.count("line 2 has") == 1
    assert "longest sentence is 23" in caplog.text
    kept = translator.encode(long)
    assert kept == [*loaded.vocabulary.encode([long])[0][:23], EOS_ID]
    options = SearchOptions(beam=1, max_extra_length=10)
    (expected,) = search([loaded.model], torch.tensor([kept]), options)
    assert found[1][0].ids == expected[0].ids


def test_a_translation_holds_no_line_break(loaded, monkeypatch):
    monkeypatch.setattr(
        type(loaded.vocabulary), "decode", lambda self, ids: ["one\u2028two\nthree"] * len(ids)
    )
    assert _best(loaded, ["red dog"], beam=1) == ["one two three"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text(max_size=30), max_size=5))
def test_any_text_gives_one_line_for_each(loaded, lines):
    for line, found in zip(lines, _translator(loaded, beam=2).translate(lines), strict=True):
        (best,) = found
        assert best.text.splitlines() in ([], [best.text])
        assert math.isfinite(best.score)
        assert bool(best.ids) or best.text == "" or not normalise(line)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.sampled_from(["", "red", "two old cats", "the dog sees a tree " * 3])),
    batch_tokens=st.integers(1, 60),
)
def test_batches_hold_each_line_once_and_are_themselves_one_batch(loaded, lines, batch_tokens):
    translator = _translator(loaded, batch_tokens=batch_tokens)
    batches = translator.batches(lines)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lines)))
    for batch in batches:
        chosen = [lines[index] for index in batch]
        assert translator.batches(chosen) == [list(range(len(batch)))]
        # Whatever else the translator is for: batches depend on lines and budget.
        other = _translator(loaded, 2, search="sample", batch_tokens=batch_tokens)
        assert other.batches(lines) == batches


def test_n_best_come_best_first_and_begin_with_the_best(loaded, sentences):
    several = _translator(loaded, 4).translate(sentences)
    single = _translator(loaded).translate(sentences)
    for found, (best,) in zip(several, single, strict=True):
        assert len(found) == 4
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        assert len({tuple(one.ids) for one in found}) == 4
        assert found[0].ids == best.ids


@pytest.mark.parametrize(
    ("num_best", "values"), [(5, {"beam": 4}), (2, {"search": "greedy"}), (0, {})]
)
def test_more_translations_than_the_search_gives_are_refused(loaded, num_best, values):
    with pytest.raises(UserError, match=r"translations a line were asked for.*evaluation\.beam"):
        _translator(loaded, num_best, **values)


def test_a_prefix_begins_the_translation(loaded, sentences):
    prefixes = ["alt", "", "Hund sieht", "Hu"] * 4
    translator = _translator(loaded, 2)
    found = translator.translate(sentences, prefixes=prefixes)
    free = translator.translate(sentences)
    for prefix, given_, without in zip(prefixes, found, free, strict=True):
        for one in given_:
            assert one.text.startswith(prefix)
            forced = loaded.vocabulary.encode([prefix])[0]
            assert one.ids[: len(forced)] == forced
        if not prefix:
            assert [one.ids for one in given_] == [one.ids for one in without]


def test_a_word_begun_by_a_prefix_is_gone_on_with(loaded, sentences):
    translator = _translator(loaded)
    ended = 0
    for line, (best,) in zip(sentences, translator.translate(sentences), strict=True):
        for end in range(1, len(best.ids)):
            prefix = loaded.vocabulary.decode([best.ids[:end]])[0]
            within = not loaded.vocabulary.pieces(best.ids[end : end + 1])[0].startswith("\u2581")
            if prefix and within and loaded.vocabulary.encode([prefix])[0] == best.ids[:end]:
                ((again,),) = translator.translate([line], prefixes=[prefix])
                ended += again.text == best.text
                break
    assert ended > 4


def test_a_prefix_with_unknown_characters_stays_as_given(loaded):
    for unknown in ("forbid", "copy", "keep"):
        ((one,),) = _translator(loaded, unknown=unknown).translate(
            ["red dog"], prefixes=[" \u6f22\u5b57  alt\u6f22 "]
        )
        assert UNK_ID in one.ids
        assert one.text.startswith("\u6f22\u5b57 alt\u6f22")


def test_too_long_a_prefix_is_refused(loaded):
    with pytest.raises(UserError, match=r"prefix of line 2 has .* longest sentence is 23"):
        _translator(loaded).translate(["red", "red"], prefixes=["alt", "alt " * 30])


def test_unknown_pieces_are_forbidden_kept_or_copied(loaded, monkeypatch):
    line = "red \u6f22\u5b57 dog"
    # "rot", the unknown piece, and right behind it the last piece of "rot" again.
    pieces = loaded.vocabulary.encode(["rot \u6f22", "rot"])
    written = [*pieces[0], pieces[1][-1]]
    glued = loaded.vocabulary.pieces(written)[-1]
    assert written.count(UNK_ID) == 1
    assert not glued.startswith("\u2581")
    word = _unknown_word(written, loaded)

    found = [[Hypothesis(written, -1.0, -1.0)]]
    monkeypatch.setattr("trainer.translate.search", lambda *_, **__: found)
    for attended, copied in ((0, "red"), (1, "\u6f22\u5b57"), (2, "dog")):
        links = [(attended, word)]
        monkeypatch.setattr("trainer.unknown.word_alignment", lambda *_, links=links: [links])
        assert _best(loaded, [line], unknown="copy") == [f"rot {copied}{glued}"]
    assert "\u2047" in _best(loaded, [line], unknown="keep")[0]
    monkeypatch.undo()
    (several,) = _translator(loaded, 4).translate([line])
    assert all(UNK_ID not in one.ids for one in several)


def _unknown_word(ids, loaded):
    return loaded.vocabulary.decode([ids])[0].split().index("\u2047")


def test_what_is_copied_is_a_word_of_the_source(loaded):
    ids = loaded.vocabulary.encode(["rot \u6f22 Hund \u6f22"])[0]
    line = "old  \u6f22 cat"
    source = [*loaded.vocabulary.encode([line])[0], EOS_ID]
    words = copied_words(loaded, line, source, ids)
    assert len(words) == 2
    assert set(words) <= {"old", "\u6f22", "cat"}
    text = fill_in(loaded.vocabulary.decode([ids])[0], words)
    assert text == f"rot {words[0]} Hund {words[1]}"


def test_half_precision_leaves_the_given_model_alone(loaded, sentences):
    full = _best(loaded, sentences)
    half = _best(loaded, sentences, precision="bf16")
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert sum(a == b for a, b in zip(full, half, strict=True)) >= 12


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

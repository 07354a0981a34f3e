from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.config import EOS_ID, UNK_ID
from tests.cross_only import cross_only
from tests.runs import pairs
from trainer import attention
from trainer.attention import attention_maps, word_alignment
from trainer.run import load_model


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_model(trained_run, "last")


@pytest.fixture(scope="module")
def sentence(loaded):
    source, target = loaded.vocabulary.encode(["one red dog sees", "sieht Hund rot eins"])
    return [*source, EOS_ID], target


class _MadeUp:
    """A model whose cross attention is given: the weights of each layer and head."""

    def __init__(self, cross_LHTS):
        self.cross_LHTS = torch.tensor(cross_LHTS)

    def parameters(self):
        yield torch.zeros(1)

    def attention_maps(self, source_BS, target_in_BT):
        rows, columns = target_in_BT.size(1), source_BS.size(1)
        assert (rows, columns) == tuple(self.cross_LHTS.shape[-2:])
        return {"cross": self.cross_LHTS[:, None]}


class _Pieces:
    """A vocabulary of which only the written form of pieces is asked."""

    def __init__(self, *pieces):
        self.written = ["<pad>", "<s>", "</s>", "<unk>", *pieces]

    def pieces(self, ids):
        return [self.written[number] for number in ids]


def test_shapes_and_labels(loaded, sentence):
    source, target = sentence
    maps = attention_maps(loaded, source, target)
    num_source, num_target = len(source), len(target) + 1
    assert {kind: tuple(weights.shape) for kind, weights in maps.weights.items()} == {
        "cross": (2, 4, num_target, num_source),
        "encoder": (1, 4, num_source, num_source),
        "decoder": (2, 4, num_target, num_target),
    }
    assert maps.kinds == ["cross", "encoder", "decoder"]
    assert maps.source[-1] == "</s>"
    assert maps.inputs == ["<s>", *loaded.vocabulary.pieces(target)]
    assert maps.outputs == [*loaded.vocabulary.pieces(target), "</s>"]
    assert "".join(maps.source[:-1]).replace("\u2581", " ").strip() == "one red dog sees"


def test_every_row_is_a_distribution_and_the_decoder_looks_back_only(loaded, sentence):
    maps = attention_maps(loaded, *sentence)
    for weights in maps.weights.values():
        assert weights.dtype == torch.float32
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert maps.weights["decoder"].triu(1).count_nonzero() == 0
    assert bool((maps.weights["decoder"][:, :, 0, 0] == 1).all())


def test_a_row_depends_on_nothing_that_is_written_later(loaded, sentence):
    source, target = sentence
    whole, part = (attention_maps(loaded, source, ids) for ids in (target, target[:2]))
    assert part.outputs[:2] == whole.outputs[:2]
    # Row t predicts outputs[t] and has read inputs[: t + 1].
    changed = attention_maps(loaded, source, [*target[:2], target[0], *target[3:]])
    of_part, of_whole, of_changed = (maps.weights["cross"] for maps in (part, whole, changed))
    torch.testing.assert_close(of_part, of_whole[:, :, :3])
    torch.testing.assert_close(of_changed[:, :, :3], of_whole[:, :, :3])
    assert not torch.allclose(of_changed[:, :, 3], of_whole[:, :, 3], atol=1e-4)


def test_an_empty_translation_has_one_row(loaded, sentence):
    maps = attention_maps(loaded, sentence[0], [])
    assert (maps.inputs, maps.outputs) == (["<s>"], ["</s>"])
    assert maps.weights["cross"].shape[2] == 1


def test_alignment_by_hand(loaded):
    # Source "Haus baum</s>" of 4 pieces, translation "ab <unk> c": words 0, 1, 2.
    vocabulary = _Pieces("▁Ha", "us", "▁", "baum", "▁a", "b", "▁c")
    source, target = [4, 5, 6, 7, EOS_ID], [8, 9, UNK_ID, 10]
    first = [
        # ▁Ha   us    ▁   baum  </s>
        [0.3, 0.3, 0.0, 0.4, 0.0],  # ▁a: most to one piece, but more to "Haus" in sum
        [0.2, 0.2, 0.3, 0.2, 0.1],  # b
        [0.0, 0.0, 0.3, 0.3, 0.4],  # <unk>: the end is no word
        [0.1, 0.4, 0.0, 0.0, 0.5],  # ▁c
        [0.0, 0.0, 0.0, 0.0, 1.0],  # </s>
    ]
    other = [[0.0, 0.0, 0.0, 1.0, 0.0]] * 5
    # The last but one of three layers counts; a single layer is taken as it is.
    for layers in ([[other], [first], [other]], [[first]]):
        made = replace(loaded, model=_MadeUp(layers), vocabulary=vocabulary)
        assert word_alignment(made, [(source, target)]) == [[(0, 0), (0, 2), (1, 1)]]
    # Heads are averaged: the second outweighs the first.
    made = replace(loaded, model=_MadeUp([[first, other]]), vocabulary=vocabulary)
    assert word_alignment(made, [(source, target)]) == [[(1, 0), (1, 1), (1, 2)]]


def test_words_of_pieces(loaded):
    vocabulary = _Pieces("▁", "▁a", "b", "▁c")
    made = replace(loaded, vocabulary=vocabulary)

    def words(ids, *, apart):
        return attention._words(made, ids, unknown_apart=apart)

    space, a, b, c = 4, 5, 6, 7
    assert words([a, b, c, EOS_ID], apart=False) == [0, 0, 1, -1]
    assert words([b, b, c], apart=False) == [0, 0, 1]  # no mark at the beginning
    assert words([a, space, b, space], apart=False) == [0, 1, 1, -1]
    assert words([a, UNK_ID, b], apart=False) == [0, 0, 0]
    assert words([a, UNK_ID, b], apart=True) == [0, 1, 2]
    assert words([UNK_ID, UNK_ID, c], apart=True) == [0, 1, 2]
    assert words([space], apart=True) == [-1]
    assert words([], apart=True) == []


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_words_are_those_of_the_text(loaded, data):
    piece = st.integers(UNK_ID, loaded.vocabulary.size - 1)
    ids = data.draw(st.lists(piece, max_size=12))
    words = attention._words(loaded, ids, unknown_apart=True)
    [text] = loaded.vocabulary.decode([ids])
    assert max(words, default=-1) + 1 == len(text.split())


def test_batches_do_not_change_an_alignment(loaded, monkeypatch):
    text = pairs(12, seed=5)
    sources = [[*ids, EOS_ID] for ids in loaded.vocabulary.encode([s for s, _ in text])]
    targets = loaded.vocabulary.encode([t for _, t in text])
    chosen = list(zip(sources, targets, strict=True))
    together = word_alignment(loaded, chosen)
    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 1)
    assert word_alignment(loaded, chosen) == together
    for links, (_, target) in zip(together, text, strict=True):
        assert sorted(number for _, number in links) == list(range(len(target.split())))


def test_what_has_no_word_has_no_link(loaded):
    [ids] = loaded.vocabulary.encode(["red dog"])
    assert word_alignment(loaded, [([], ids), ([*ids, EOS_ID], []), ([EOS_ID], ids)]) == [
        [],
        [],
        [],
    ]
    assert word_alignment(loaded, []) == []


def test_a_model_with_cross_attention_only(loaded, sentence, monkeypatch):
    alone = cross_only(loaded)
    maps, whole = (attention_maps(model, *sentence) for model in (alone, loaded))
    assert maps.kinds == ["cross"]
    torch.testing.assert_close(maps.weights["cross"], whole.weights["cross"][-1:, :1])
    # A batch is bounded by the maps that there are: 12 of the Transformer's, 1 here.
    sizes = []
    of_batch = attention._maps
    monkeypatch.setattr(
        attention, "_maps", lambda *args: sizes.append(len(args[1])) or of_batch(*args)
    )
    longest = max(len(sentence[0]), len(sentence[1]) + 1)
    monkeypatch.setattr(attention, "_WEIGHTS_AT_ONCE", 4 * longest**2)
    assert len(word_alignment(alone, [sentence] * 4)) == 4
    assert sizes == [1, 4]  # one to ask how many maps there are
    sizes.clear()
    word_alignment(loaded, [sentence] * 4)
    assert sizes == [1, 1, 1, 1, 1]


def test_a_batch_is_bounded_by_its_pieces_too(loaded, monkeypatch):
    monkeypatch.setattr(attention, "_PIECES_AT_ONCE", 10)
    pairs = [([5] * 4 + [EOS_ID], [6] * 2)] * 5
    assert list(attention._batches(cross_only(loaded), pairs)) == [[0, 1], [2, 3], [4]]

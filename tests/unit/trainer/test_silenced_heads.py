"""A head that is silenced adds nothing, and comes back."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from data_shards.config import BOS_ID, EOS_ID
from data_shards.embedded import sentences
from tests.runs import pairs
from trainer import silenced_heads
from trainer.run import load_model
from trainer.silenced_heads import (
    EVERY_WORD,
    NUMBER,
    OTHER,
    HeadName,
    Words,
    has_test_set,
    heads_of,
    needed_for,
    silenced,
    words_to_write,
)


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_model(trained_run, "last")


@pytest.fixture(scope="module")
def encoded(loaded):
    text = pairs(20, seed=9)
    sources, targets = (loaded.vocabulary.encode([pair[side] for pair in text]) for side in (0, 1))
    return [([*source, EOS_ID], target) for source, target in zip(sources, targets, strict=True)]


def test_every_head_of_the_transformer_has_a_name(loaded):
    names = list(map(str, heads_of(loaded.model)))
    assert len(names) == 4 * (1 + 2 + 2)
    assert names[:5] == ["cross 1.1", "cross 1.2", "cross 1.3", "cross 1.4", "cross 2.1"]
    assert names[-1] == "decoder 2.4"
    headless = torch.nn.Module()
    headless.config = loaded.config.model
    assert heads_of(headless) == {}


@pytest.mark.parametrize("name", [HeadName("cross", 1, 2), HeadName("encoder", 0, 3)])
def test_nothing_is_read_of_a_silenced_head(loaded, encoded, name):
    source, target = (torch.tensor([ids]) for ids in encoded[0])
    target_in = torch.cat([torch.tensor([[BOS_ID]]), target], 1)
    model = loaded.model
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def hide(_, inputs):
        width = inputs[0].size(-1) // 4
        inputs[0][..., name.head * width : (name.head + 1) * width] = 0
        return inputs

    with torch.no_grad():
        whole = model.states(source, target_in)
        with silenced(model, name):
            found = model.states(source, target_in)
        handle = heads_of(model)[name].register_forward_pre_hook(hide)
        expected = model.states(source, target_in)
        handle.remove()
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, whole, atol=1e-3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_silenced_head_comes_back_after_an_error(loaded):
    name = HeadName("decoder", 0, 0)
    before = heads_of(loaded.model)[name].weight.clone()
    with pytest.raises(RuntimeError), silenced(loaded.model, name):
        raise RuntimeError
    assert torch.equal(heads_of(loaded.model)[name].weight, before)


def test_what_is_lost(loaded, encoded, monkeypatch):
    # The translation of the first pair against that of the second, under the first's source.
    changed = [(encoded[0][0], encoded[1][1])]
    contrast = ((0, [0, 1]), (0, [0, 1]))
    groups = {"first": [(n, [0, 1]) for n in range(len(encoded))]}
    needed = needed_for(loaded, Words(encoded, groups, changed, [contrast, contrast]))
    assert needed.whole[NUMBER].cases == 2
    assert needed.whole[NUMBER].right == 1
    assert (needed.whole[NUMBER].each, needed.sentences[NUMBER]) == ((True, True), [0, 0])
    assert needed.sentences["first"] == list(range(20))
    swapped = Words([*changed], {}, [encoded[0]], [contrast])
    assert needed_for(loaded, swapped).whole[NUMBER].right == 0
    whole = needed.whole[EVERY_WORD]
    # The same by the loss that the model is trained with, a pair at a time.
    nll = 0.0
    for source, target in encoded:
        tensors = ([source], [[BOS_ID, *target]], [[*target, EOS_ID]])
        with torch.no_grad():
            nll += float(loaded.model.training_loss(*map(torch.tensor, tensors), 0.0)[1])
    assert whole.cases == sum(len(target) + 1 for _, target in encoded)
    assert whole.nats == pytest.approx(nll / whole.cases, rel=1e-4)
    first = needed.whole["first"]
    assert (first.cases, 0 <= first.right <= 1) == (20, True)
    assert sum(first.each) == pytest.approx(20 * first.right)
    assert set(needed.silenced) == set(heads_of(loaded.model))
    worst = max(groups[EVERY_WORD].nats for groups in needed.silenced.values())
    assert worst > whole.nats + 0.1
    monkeypatch.setattr(silenced_heads, "_PIECES_AT_ONCE", 1)
    alone = needed_for(loaded, Words(encoded, {}, [], [])).whole[EVERY_WORD]
    assert (alone.right, alone.nats) == (whole.right, pytest.approx(whole.nats, rel=1e-5))


_ARTICLES = (
    *("d", "ein", "kein", "mein", "sein", "ihr", "unser", "jed", "welch"),
    *("i", "am", "z", "vom", "beim"),
)


class _WholeWords:
    """A vocabulary of whole words."""

    written: ClassVar[list[str]] = ["<pad>", "<s>", "</s>", "<unk>"]

    def encode(self, lines):
        return [[self._number(word) for word in self._split(line)] for line in lines]

    def pieces(self, ids):
        return [self.written[number] for number in ids]

    def _split(self, line):
        return re.findall("▁?[\\w-]+|[^\\w▁]", "▁" + line.replace(" ", "▁"))

    def _number(self, word):
        if word not in self.written:
            self.written.append(word)
        return self.written.index(word)


def test_the_words_of_a_test_set(loaded, monkeypatch):
    words = words_to_write(loaded, 7)
    assert (len(words.pairs), words.groups, words.contrasts) == (7, {}, [])
    assert all(source[-1] == EOS_ID for source, _ in words.pairs)
    with_others = words_to_write(loaded, 7, "valid").pairs
    assert not [pair for pair in with_others if pair in words.pairs]
    # Where the grammar is known, each word is named for what it is.
    monkeypatch.setattr(silenced_heads, "has_grammar", lambda _: True)
    monkeypatch.setattr(
        silenced_heads, "sentences", lambda _, number: list(sentences("train", number))
    )
    words = words_to_write(replace(loaded, vocabulary=_WholeWords()), 60)
    assert {"article", "adjective", "finite verb", "verb at the end"} <= set(words.groups)
    for index, pieces in words.groups["article"]:
        [at] = pieces
        word = _WholeWords().pieces([words.pairs[index][1][at]])[0]
        assert word.lower()[1:].startswith(_ARTICLES), word
    # Every piece that is not such a word's, the end among them, is one of the others.
    named = {
        (index, at)
        for group, found in words.groups.items()
        if group != OTHER
        for index, pieces in found
        for at in pieces
    }
    others = {(index, at) for index, [at] in words.groups[OTHER]}
    assert not named & others
    assert len(named | others) == sum(len(target) + 1 for _, target in words.pairs)
    # The verb's other form stands in its place, and nothing else is changed.
    assert len(words.contrasts) > 10
    for (index, pieces), (number, others) in words.contrasts:
        (source, target), (same, changed) = words.pairs[index], words.changed[number]
        assert source == same
        assert target[: pieces[0]] == changed[: others[0]]
        assert target[pieces[-1] + 1 :] == changed[others[-1] + 1 :]
        assert [target[at] for at in pieces] != [changed[at] for at in others]


def test_without_a_test_set_the_validation_set_is_shared(loaded):
    data = loaded.manifest.data
    data = data.model_copy(update={"splits": {"valid": data.splits["valid"]}})
    alone = replace(loaded, manifest=replace(loaded.manifest, data=data))
    assert not has_test_set(alone)
    assert has_test_set(loaded)
    chosen, measured = (words_to_write(alone, 1000, split).pairs for split in ("valid", "test"))
    both = [pair for two in zip(chosen, measured, strict=False) for pair in two]
    source, target = loaded.manifest.split_text("valid")
    assert len(chosen) + len(measured) == len(source)
    assert both[:4] == [
        ([*ids, EOS_ID], other)
        for ids, other in zip(
            *(loaded.vocabulary.encode(lines[:4]) for lines in (source, target)), strict=True
        )
    ]

"""A head that is silenced adds nothing, and comes back."""

from __future__ import annotations

import pytest
import torch

from data_shards.config import BOS_ID, EOS_ID
from data_shards.embedded import sentences
from tests.runs import pairs
from trainer import silenced_heads
from trainer.run import load_model
from trainer.silenced_heads import (
    EVERY_WORD,
    HeadName,
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
    needed = needed_for(loaded, encoded, {"first": [(n, [0, 1]) for n in range(len(encoded))]})
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
    assert set(needed.silenced) == set(heads_of(loaded.model))
    worst = max(groups[EVERY_WORD].nats for groups in needed.silenced.values())
    assert worst > whole.nats + 0.1
    monkeypatch.setattr(silenced_heads, "_PIECES_AT_ONCE", 1)
    alone = needed_for(loaded, encoded).whole[EVERY_WORD]
    assert (alone.right, alone.nats) == (whole.right, pytest.approx(whole.nats, rel=1e-5))


def test_the_words_of_a_test_set(loaded, monkeypatch):
    chosen, groups = words_to_write(loaded, 7)
    assert (len(chosen), groups) == (7, {})
    assert all(source[-1] == EOS_ID for source, _ in chosen)
    # Where the grammar is known, each word is named for what it is.
    monkeypatch.setattr(silenced_heads, "has_grammar", lambda _: True)
    monkeypatch.setattr(
        silenced_heads, "sentences", lambda _, number: list(sentences("train", number))
    )
    chosen, groups = words_to_write(loaded, 60)
    assert {"article", "adjective", "finite verb", "verb at the end"} <= set(groups)
    for index, pieces in groups["article"]:
        text = "".join(loaded.vocabulary.pieces([chosen[index][1][at] for at in pieces]))
        assert 2 <= len(text.replace("▁", "")) <= 7

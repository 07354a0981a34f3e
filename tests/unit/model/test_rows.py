"""Tokens as rows, some of which are nobody's, against the padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import multi_head, transformer
from model.config import ModelConfig
from model.rows import Rows, rows_of
from model.transformer import Transformer


def test_rows_are_rounded_up_and_come_back() -> None:
    rows = Rows(3, 25)
    states = torch.randn(3, 25, 4)
    joined = rows.join(states)
    assert joined.shape == (128, 4)
    assert torch.equal(rows.split(joined), states)
    assert not joined[75:].any()
    whole, place = rows.room(states, 4)
    place.copy_(states)
    assert torch.equal(whole, joined)
    assert Rows(64, 2).num_rows == 128


def test_rows_are_for_the_products_that_are_compiled_for_their_shape() -> None:
    ids = torch.ones(3, 5, dtype=torch.int64)
    assert rows_of(ids, torch.bfloat16) == Rows(3, 5)
    assert rows_of(ids, torch.float32) is None
    assert rows_of(ids[:0], torch.bfloat16) is None
    assert rows_of(ids.to("meta"), torch.bfloat16) is None


def _results(model: Transformer, source: Tensor, target: Tensor) -> list[Tensor]:
    loss, nll = model.training_loss(source, target, target, 0.1)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [loss, nll, model.states(source, target), *grads]


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    "settings", [{"norm": "pre"}, {"norm": "post"}, {"d_k": 3}, {"attention": "additive"}], ids=str
)
def test_a_model_over_rows_is_the_padded_one(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], explicit: bool
) -> None:
    torch.manual_seed(5)
    shape = {"d_model": 16, "d_ff": 24, "num_heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    model = Transformer(ModelConfig.model_validate({**shape, **settings, "dropout": 0.0}), 30)
    source, target = torch.randint(4, 30, (3, 9)), torch.randint(4, 30, (3, 7))
    source[1, 5:], target[0, 4:] = 0, 0
    monkeypatch.setattr(multi_head, "use_explicit", lambda *_, **__: explicit)
    padded = _results(model, source, target)
    monkeypatch.setattr(transformer, "rows_of", lambda ids, _: Rows(*ids.shape))
    # What nobody's rows hold must reach nothing, and what they are left with must be finite.
    for found, expected in zip(_results(model, source, target), padded, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

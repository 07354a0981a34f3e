"""Modules are called in one order whatever the batch: ZeRO 3 gathers in it, on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.build import build
from model.config import ModelConfig

# Below and above every length from which attention is computed otherwise.
_LENGTHS = (3, 40, 400)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 2, "d_ff": 16},
        {"num_heads": 2, "d_ff": 16, "attention": "additive", "local_radius": 2},
        {"num_heads": 2, "d_ff": 16, "attention": "general"},
        {"num_heads": 2, "d_ff": 16, "local_radius": 2, "positions": "learned"},
        {"kind": "lstm", "attention": "additive"},
        {"kind": "gru", "attention": "scaled_dot"},
        {"kind": "convolutional"},
    ],
    ids=str,
)
def test_the_order_of_calls_does_not_depend_on_lengths(settings: dict[str, Any]) -> None:
    shape = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, **settings}
    model = build(ModelConfig.model_validate(shape), 20).train()
    names = {module: name for name, module in model.named_modules()}
    called: list[str] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: called.append(names[module]))
    orders = []
    for length in _LENGTHS:
        ids = torch.randint(4, 20, (2, length))
        model.training_loss(ids, ids, ids, 0.1)[0].backward()
        orders.append(called.copy())
        called.clear()
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) > 5

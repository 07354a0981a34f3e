"""Every kind of model trains and decodes in bfloat16: on a CPU and, where there is one, a GPU."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from model.build import build
from model.config import ModelConfig
from model.presets import Kind
from model.search import SearchOptions, search

VOCAB = 40
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Source, decoder input and references: 3 pairs, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(4, VOCAB, (3, 9), generator=generator)
    target = torch.randint(4, VOCAB, (3, 7), generator=generator)
    source[1, 4:], target[1, 5:], target[2, 2:] = 0, 0, 0
    target_in = torch.cat([torch.full((3, 1), 1), target[:, :-1]], 1)
    return source, target_in.masked_fill(target == 0, 0), target


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_kind_trains_and_decodes_in_bf16(kind: Kind, device: str) -> None:
    torch.manual_seed(3)
    settings: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    if kind == "transformer":
        settings |= {"d_ff": 64, "num_heads": 4}
    config = ModelConfig.model_validate({"kind": kind, "preset": "tiny", "dropout": 0, **settings})
    exact = build(config, VOCAB)
    batch = _batch()
    expected = exact.training_loss(*batch, 0.1)[0].item()

    model = build(config, VOCAB)
    model.load_state_dict(exact.state_dict())
    model.to(device, torch.bfloat16).train()
    source, target_in, target = (ids.to(device) for ids in batch)
    losses = []
    for _ in range(3):
        model.zero_grad()
        loss, _ = model.training_loss(source, target_in, target, 0.1)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=0.02)
    assert losses[2] < losses[0]

    model.eval()
    with torch.no_grad():
        # One step of the decoder after another is what it makes of all positions at once.
        together = model.states(source, target_in)[0].float()
        state = model.start(source, 1)
        for position in range(3):
            alone = model.step(target_in[:, position], state)[0].float()
            assert torch.allclose(alone, together[position], atol=0.1), position
    found = search([model], source, SearchOptions(beam=2))
    assert len(found) == 3

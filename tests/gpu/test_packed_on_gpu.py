"""Packed sequences on a real device: the kernel, the model, dropout, no waiting host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.build import build
from model.config import ModelConfig
from model.packed import Packing, with_dropout
from model.packed_check import why_not
from model.packing import Packed, pack, unpack
from model.transformer import Transformer
from tests.unit.model.test_packed import batch

pytestmark = pytest.mark.gpu

_SHAPE = {"d_model": 256, "d_ff": 512, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
_LENGTHS = [(31, 40), (5, 2), (70, 66), (1, 3), (64, 128), (17, 17)]


def on(device: torch.device, buffer_and_layout: Any) -> Packed:
    buffer, layout = buffer_and_layout
    return unpack(buffer.to(device), layout)


def model_of(device: torch.device, **settings: Any) -> Transformer:
    torch.manual_seed(3)
    model = build(ModelConfig.model_validate({**_SHAPE, "dropout": 0.0, **settings}), 200)
    assert isinstance(model, Transformer)
    return model.to(device).train()


def results(model: Transformer, *arguments: Any) -> list[Tensor]:
    model.zero_grad()
    loss, nll = model(*arguments)
    loss.backward()
    found = [loss.detach(), nll, *(parameter.grad for parameter in model.parameters())]
    return [part.float().cpu() for part in found]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", ["tiny", "base", "big"])
def test_the_kernel_is_taken_for_the_presets(
    device: torch.device, preset: str, precision: str
) -> None:
    assert why_not(ModelConfig(preset=preset), precision, device) is None


@pytest.mark.parametrize("settings", [{}, {"norm": "pre", "local_radius": 5}], ids=str)
@pytest.mark.parametrize("bucketed", [False, True])
def test_values_and_gradients_are_near_those_in_float32(
    device: torch.device, settings: dict[str, Any], bucketed: bool
) -> None:
    padded = batch(_LENGTHS)
    exact = results(model_of(torch.device("cpu"), **settings), *padded, 0.1)
    model = model_of(device, **settings).bfloat16()
    *ids, packing = on(device, pack([padded], bucketed=bucketed))
    found = results(model, *ids, 0.1, packing)
    assert found[0] == pytest.approx(exact[0], rel=0.01)
    assert found[1] == pytest.approx(exact[1], rel=0.01)
    beside = results(model, *(part.to(device) for part in padded), 0.1)
    for one, two, other in zip(found[2:], beside[2:], exact[2:], strict=True):
        # No further from the exact gradient than padded batches in the same type, or hardly.
        scale = other.norm()
        assert (one - other).norm() < 1.5 * (two - other).norm() + 0.01 * scale


def test_fillers_spoil_nothing(device: torch.device) -> None:
    model = model_of(device).bfloat16()
    *ids, packing = on(device, pack([batch(_LENGTHS)], bucketed=True))
    assert (ids[0] == 0).any()
    found = results(model, *ids, 0.1, packing)
    assert all(bool(part.isfinite().all()) for part in found)


def test_lanes_together_drop_what_they_drop_alone(device: torch.device) -> None:
    model = model_of(device, dropout=0.3, norm="pre")
    lanes = [batch(_LENGTHS, 1), batch(_LENGTHS[:3], 2)]
    drawn = []
    for which in ([0, 1], [0], [1]):
        buffer, layout = pack([lanes[index] for index in which], bucketed=False)
        packed = unpack(buffer.to(device), layout)
        seeds = [7 + index for index in which]
        drawn.append(with_dropout(packed.packing, model.config, layout.lanes, seeds))
    together, one, other = drawn
    for side in ("source", "target"):
        masks = [getattr(packing, side).masks_CND for packing in (together, one, other)]
        torch.testing.assert_close(masks[0], torch.cat(masks[1:], 1))
        assert abs(masks[0].float().mean().item() - 0.7) < 0.01


@pytest.mark.parametrize("settings", [{}, {"norm": "pre", "dropout": 0.1}], ids=str)
def test_a_pass_gives_bitwise_the_same_again(
    device: torch.device, settings: dict[str, Any]
) -> None:
    """What bitwise resume on a GPU rests on; lengths of several of the kernel's blocks."""
    model = model_of(device, **settings).bfloat16()
    lengths = [(200, 190), (193, 257), (131, 64), (220, 201), (64, 128), (255, 199)]
    buffer, layout = pack([batch(lengths * 4)], bucketed=False)
    packed = unpack(buffer.to(device), layout)
    packing = with_dropout(packed.packing, model.config, layout.lanes, [5])
    first, *others = (results(model, *packed[:3], 0.1, packing) for _ in range(4))
    for other in others:
        for name, one, two in zip(
            ["loss", "nll", *dict(model.named_parameters())], first, other, strict=True
        ):
            assert torch.equal(one, two), name


def test_a_pass_does_not_wait_for_the_device(device: torch.device) -> None:
    model = model_of(device, dropout=0.1).bfloat16()
    # (So many that the embedding's backward takes its way for large batches.)
    buffer, layout = pack([batch(_LENGTHS * 20)], bucketed=True)

    def one() -> None:
        packed = unpack(held, layout)
        packing: Packing = with_dropout(packed.packing, model.config, layout.lanes, [1])
        model(*packed[:3], 0.1, packing)[0].backward()

    held = buffer.to(device)
    one()  # tables and handles are made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packed_passes_need_no_more_memory_than_is_reckoned(device: torch.device) -> None:
    """Of base at 8,000 tokens a side, what autograd keeps; within a quarter."""
    from trainer.paper.memory import activation_bytes

    config = ModelConfig(preset="base")
    torch.manual_seed(1)
    model = build(config, 8000).to(device).bfloat16().train()
    padded = batch([(40, 40)] * 200)
    buffer, layout = pack([padded], bucketed=False)
    packed = unpack(buffer.to(device), layout)
    packing = with_dropout(packed.packing, config, layout.lanes, [1])
    states = model(packed.source_M, packed.target_in_N, packing=packing)
    del states
    before = torch.cuda.memory_allocated(device)
    states = model(packed.source_M, packed.target_in_N, packing=packing)
    kept = torch.cuda.memory_allocated(device) - before
    masks = sum(side.masks_CND.numel() for side in packing if side.masks_CND is not None)
    reckoned = activation_bytes(config, "bf16", 8000)
    assert reckoned is not None
    assert kept + masks == pytest.approx(reckoned, rel=0.25)
    assert states.isfinite().all()

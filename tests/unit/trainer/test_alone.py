"""The update of one rank alone against PyTorch's clipping and Adam."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from trainer.alone import FlatGroup, UpdateAlone, exact_norm

_SHAPES = ((5, 3), (4,), (2, 2))
_PADDING = 7


def _group(dtype: torch.dtype) -> FlatGroup:
    """Parameters whose memory lies in one row, with padding behind, as DeepSpeed lays it."""
    torch.manual_seed(3)
    sizes = [torch.Size(shape).numel() for shape in _SHAPES]
    weights = torch.randn(sum(sizes) + _PADDING).to(dtype)
    parts = torch.split(weights, [*sizes, _PADDING])
    parameters = [
        nn.Parameter(part.view(shape)) for part, shape in zip(parts, _SHAPES, strict=False)
    ]
    # (A copy in fp32, too: else the masters would be the weights themselves.)
    return FlatGroup(parameters, weights, nn.Parameter(weights.float().clone()))


def _give_gradients(parameters: Sequence[Tensor], turn: int) -> None:
    generator = torch.Generator().manual_seed(turn)
    for number, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator) * 3
        parameter.grad = None if number == turn else gradient.to(parameter.dtype)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_clipping_and_adam(dtype: torch.dtype, clip_norm: float) -> None:
    group = _group(dtype)
    expected = [nn.Parameter(parameter.detach().float().clone()) for parameter in group.parameters]
    given = list(group.parameters)
    adam = torch.optim.AdamW([group.master], lr=0.1, fused=True, weight_decay=0.0)
    oracle = torch.optim.AdamW(expected, lr=0.1, weight_decay=0.0)
    update = UpdateAlone([group], adam, clip_norm)
    for turn in (-1, 1):
        _give_gradients(given, turn)
        for parameter, other in zip(given, expected, strict=True):
            other.grad = (
                torch.zeros_like(other) if parameter.grad is None else parameter.grad.float()
            )
        update()
        norm = nn.utils.clip_grad_norm_(expected, clip_norm or float("inf"))
        oracle.step()
        assert update.norm == pytest.approx(float(norm), rel=1e-5)
    assert group.master.grad is None
    assert all(parameter.grad is None for parameter in given)
    sizes = [*(parameter.numel() for parameter in given), _PADDING]
    masters = torch.split(group.master.detach(), sizes)
    for parameter, other, master in zip(given, expected, masters, strict=False):
        torch.testing.assert_close(master.view_as(other), other.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter.detach(), master.view_as(other).to(dtype))


def test_the_norm_of_many_elements_is_exact() -> None:
    """Summed in one row in float32 it is 0.08 % too small."""
    gradient = torch.rand(21_000_000, generator=torch.Generator().manual_seed(1)).mul_(1e-2)
    expected = math.sqrt(sum(float(part.double().square_().sum()) for part in gradient.chunk(8)))
    cut = [gradient[:5], gradient[5:].view(-1, 5)]
    assert exact_norm(cut) == pytest.approx(expected, rel=1e-6)
    assert exact_norm([]) == 0
    gradient[-1] = math.nan
    assert not math.isfinite(exact_norm([gradient]))


def test_adams_hook_can_hold_the_update_back() -> None:
    group = _group(torch.bfloat16)
    before = group.master.detach().clone()
    adam = torch.optim.AdamW([group.master], lr=0.1, fused=True)
    norms = []

    def hold_back(*_: object) -> None:
        norms.append(update.norm)
        group.master.grad = None

    adam.register_step_pre_hook(hold_back)
    update = UpdateAlone([group], adam, 1.0)
    _give_gradients(list(group.parameters), -1)
    first = group.parameters[0].grad
    assert first is not None
    first[0, 0] = float("inf")
    update()
    assert norms == [float("inf")]
    assert torch.equal(group.master.detach(), before)

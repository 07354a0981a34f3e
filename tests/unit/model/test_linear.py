"""The linear layer that joins bias and rectifier to the product, against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import linear
from model.linear import Linear


def _gradients(layer: Linear, inputs: Tensor, *, relu: bool) -> list[Tensor]:
    inputs = inputs.detach().to(layer.weight.dtype).requires_grad_()
    outputs = layer(inputs, relu=relu)
    generator = torch.Generator().manual_seed(3)
    wanted = torch.randn(outputs.shape, generator=generator).bfloat16().to(outputs.dtype)
    return [outputs, *torch.autograd.grad(outputs, (inputs, *layer.parameters()), wanted)]


needs_bf16 = pytest.mark.skipif(
    linear._POINTWISE is None, reason="oneDNN has no bfloat16 on this processor"
)


@needs_bf16
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(40, 12), (3, 5, 12)])
def test_bias_and_rectifier_joined_are_those_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], relu: bool
) -> None:
    torch.manual_seed(1)
    layer, inputs = Linear(12, 7).bfloat16(), torch.randn(*shape).bfloat16()
    assert "_Joined" in str(layer(inputs, relu=relu).grad_fn)
    joined = _gradients(layer, inputs, relu=relu)
    exact = _gradients(copy.deepcopy(layer).double(), inputs, relu=relu)
    monkeypatch.setattr(linear, "_POINTWISE", None)
    separate = _gradients(layer, inputs, relu=relu)
    for found, plain, expected in zip(joined, separate, exact, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, plain, rtol=0.01, atol=0.02)
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.02)


def test_without_bfloat16_in_the_processor_pytorch_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert linear._pointwise() is None


def test_the_gradient_of_a_joined_layer_has_one_of_its_own() -> None:
    layer, inputs = Linear(6, 4).bfloat16(), torch.randn(3, 6).bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(inputs, relu=True).sum(), inputs, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), layer.weight)
    reached = functional.linear(inputs, layer.weight, layer.bias) > 0
    torch.testing.assert_close(second, reached.sum(0)[:, None].expand(4, 6).bfloat16())


def test_autocast_chooses_the_type_as_for_pytorchs_layer() -> None:
    layer = Linear(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 6), relu=True).dtype == torch.bfloat16

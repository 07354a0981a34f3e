"""The fused vocabulary loss against PyTorch's cross-entropy of the full logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model import loss
from model.loss import PAD_ID, fused_projection_loss


def _case(dtype: torch.dtype, *, scale: float = 1.0, padded: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(83, 24, generator=generator) * scale
    weight = torch.randn(61, 24, generator=generator)
    targets = torch.randint(0 if padded else 1, 61, (83,), generator=generator)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
    )


def _oracle(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return functional.cross_entropy(
        hidden @ weight.T,
        targets,
        ignore_index=PAD_ID,
        label_smoothing=smoothing,
        reduction="sum",
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_equals_cross_entropy_with_gradients(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, padded: bool, rows: int
) -> None:
    monkeypatch.setattr(loss, "_CPU_CHUNK_ELEMENTS", rows * 61)
    hidden, weight, targets = _case(torch.float32, padded=padded)
    assert bool((targets == PAD_ID).any()) == padded

    loss_sum, nll_sum = fused_projection_loss(hidden, weight, targets, smoothing)
    gradients = torch.autograd.grad(loss_sum / 7, (hidden, weight))
    expected = _oracle(hidden, weight, targets, smoothing)
    expected_gradients = torch.autograd.grad(expected / 7, (hidden, weight))

    assert loss_sum.dtype == nll_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(nll_sum, _oracle(hidden, weight, targets, 0.0), rtol=1e-5, atol=0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_only_the_loss_has_gradients() -> None:
    loss_sum, nll_sum = fused_projection_loss(*_case(torch.float32), 0.1)
    assert loss_sum.requires_grad
    assert not nll_sum.requires_grad


def test_improbable_references_keep_their_exact_loss() -> None:
    # The reference's probability is below the smallest float32.
    hidden, weight, targets = _case(torch.float32, scale=60.0)
    loss_sum, nll_sum = fused_projection_loss(hidden, weight, targets, 0.1)
    assert math.isfinite(float(loss_sum.detach()))
    expected = _oracle(hidden.double(), weight.double(), targets, 0.0)
    assert float((expected / 83).detach()) > 500
    torch.testing.assert_close(nll_sum.double(), expected.detach(), rtol=1e-5, atol=0)


def test_bfloat16_is_close_to_float64() -> None:
    hidden, weight, targets = _case(torch.bfloat16)
    loss_sum, _ = fused_projection_loss(hidden, weight, targets, 0.1)
    gradients = torch.autograd.grad(loss_sum, (hidden, weight))
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = _oracle(*exact, targets, 0.1)
    torch.testing.assert_close(loss_sum.double(), expected, rtol=3e-3, atol=0)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        error = (gradient.double() - other).norm() / other.norm()
        assert float(error) < 0.02


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients() -> None:
    hidden, weight, targets = _case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = fused_projection_loss(hidden, weight, targets, 0.1)
    gradients = torch.autograd.grad(loss_sum, (hidden, weight))
    half = hidden.detach().bfloat16(), weight.detach().bfloat16()
    same, _ = fused_projection_loss(*half, targets, 0.1)
    assert torch.equal(loss_sum.detach(), same)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_gradients_are_made_only_where_asked() -> None:
    hidden, weight, targets = _case(torch.float32)
    with torch.no_grad():
        quiet, _ = fused_projection_loss(hidden, weight, targets, 0.1)
    loss_sum, _ = fused_projection_loss(hidden, weight.detach(), targets, 0.1)
    loss_sum.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert torch.equal(quiet, loss_sum.detach())


def test_no_targets_cost_nothing() -> None:
    hidden, weight, targets = _case(torch.float32)
    loss_sum, nll_sum = fused_projection_loss(hidden, weight, torch.zeros_like(targets), 0.1)
    loss_sum.backward()
    assert float(loss_sum.detach()) == float(nll_sum) == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    def count(name: str) -> None:
        product = getattr(torch, name)

        def counted(*arguments: Tensor, **named: Tensor) -> Tensor:
            products.append(arguments)
            return product(*arguments, **named)  # type: ignore[no-any-return]

        monkeypatch.setattr(torch, name, counted)

    count("mm")
    count("addmm")
    hidden, weight, targets = _case(torch.float32)
    with torch.no_grad():
        without, _ = fused_projection_loss(hidden, weight, targets, 0.1)
    assert len(products) == 1
    loss_sum, _ = fused_projection_loss(hidden, weight, targets, 0.1)
    assert len(products) == 1 + 3
    torch.testing.assert_close(without, loss_sum.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_chunks_give_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def results() -> tuple[Tensor, ...]:
        hidden, weight, targets = _case(dtype)
        loss_sum, nll_sum = fused_projection_loss(hidden, weight, targets, 0.1)
        return loss_sum, nll_sum, *torch.autograd.grad(loss_sum, (hidden, weight))

    at_once = results()
    monkeypatch.setattr(loss, "_CPU_ROWS", 8)
    monkeypatch.setattr(loss, "_CPU_CHUNK_ELEMENTS", 40 * 61)
    monkeypatch.setattr(loss, "_CPU_BLOCK_ELEMENTS", 17 * 61 // 24 + 1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(at_once, results(), strict=True):
        assert one.shape == other.shape
        assert float(((one - other).norm() / one.norm()).detach()) < tolerance

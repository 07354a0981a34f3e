"""Our dropout: its statistics, gradients, and that PyTorch's generator alone decides it."""

from __future__ import annotations

import pytest
import torch

from model.dropout import dropout, dropout_add, keep_mask


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_drops_the_asked_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(3)
    output = dropout(torch.ones(1000, 999), probability, training=True)
    dropped = float((output == 0).float().mean())
    # Six standard deviations of a million Bernoulli numbers.
    assert abs(dropped - probability) < 6 * (probability * (1 - probability) / 999_000) ** 0.5
    kept = output[output != 0]
    torch.testing.assert_close(
        kept, torch.full_like(kept, 1 / (1 - probability)), rtol=1e-4, atol=0
    )


def test_neighbours_are_independent() -> None:
    # Four elements share one 64-bit draw; none may follow from another.
    torch.manual_seed(4)
    mask, _ = keep_mask(torch.empty(1 << 18, 4), 0.5)
    centred = mask - 0.5
    covariance = centred.T @ centred / mask.size(0)
    torch.testing.assert_close(covariance, torch.eye(4) / 4, rtol=0, atol=3e-3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 127])
def test_any_size(size: int) -> None:
    mask, _ = keep_mask(torch.empty(size), 0.5)
    assert mask.shape == (size,)
    assert set(mask.tolist()) <= {0.0, 1.0}


def test_the_generator_state_repeats_the_mask() -> None:
    inputs = torch.randn(33, 7)
    torch.manual_seed(9)
    torch.rand(3)
    state = torch.get_rng_state()
    first = dropout(inputs, 0.4, training=True), dropout(inputs, 0.4, training=True)
    torch.set_rng_state(state)
    second = dropout(inputs, 0.4, training=True), dropout(inputs, 0.4, training=True)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])


def test_gradients_pass_where_the_output_did() -> None:
    torch.manual_seed(1)
    inputs = (torch.rand(50, 20) + 1).requires_grad_()
    output = dropout(inputs, 0.25, training=True)
    output.sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad * inputs.detach(), output.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_residual_it_is_the_same_sum(dtype: torch.dtype) -> None:
    inputs = torch.randn(40, 16, dtype=dtype, requires_grad=True)
    residual = torch.randn(40, 16, requires_grad=True)
    torch.manual_seed(2)
    joined = dropout_add(inputs, residual, 0.3, training=True)
    joined.sum().backward()
    torch.manual_seed(2)
    apart = residual + dropout(inputs.detach().float(), 0.3, training=True)
    torch.testing.assert_close(joined, apart)
    assert inputs.grad is not None
    assert residual.grad is not None
    assert inputs.grad.dtype == dtype
    assert torch.equal(residual.grad, torch.ones(40, 16))
    assert torch.equal(inputs.grad != 0, (joined - residual) != 0)


def test_nothing_is_dropped_or_drawn_outside_training() -> None:
    inputs, residual = torch.randn(5, 5), torch.randn(5, 5)
    state = torch.get_rng_state()
    assert dropout(inputs, 0.5, training=False) is inputs
    assert torch.equal(dropout_add(inputs, residual, 0.5, training=False), inputs + residual)
    assert dropout(inputs, 0.0, training=True) is inputs
    assert torch.equal(torch.get_rng_state(), state)

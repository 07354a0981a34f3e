"""Every implementation of attention against the formula, and against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import (
    MultiHeadAttention,
    attend,
    causal_mask,
    fused_attention,
    padding_mask,
    reference_attention,
)

SHAPES = [(3, 5, 5), (2, 1, 7), (2, 16, 16), (1, 33, 20)]


def _choose(monkeypatch: pytest.MonkeyPatch, explicit: bool) -> None:
    monkeypatch.setattr(attention, "use_explicit", lambda *_, **__: explicit)


def _heads(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    draw = lambda length: torch.randn(batch, 4, length, 8, generator=generator)  # noqa: E731
    return draw(queries), draw(keys), draw(keys)


def _padding(batch: int, keys: int) -> Tensor:
    lengths = torch.arange(batch) % keys + 1
    return padding_mask(torch.arange(keys)[None, :] < lengths[:, None])


def test_the_reference_equals_numbers_worked_by_hand() -> None:
    query = torch.tensor([[[[2.0, 0.0]]]])
    key = torch.tensor([[[[math.log(3) / math.sqrt(2), 5.0], [0.0, -5.0]]]])
    value = torch.tensor([[[[4.0, 0.0], [0.0, 8.0]]]])
    output, weights = reference_attention(query, key, value, None)
    # Scores log 3 and 0: weights 3/4 and 1/4.
    torch.testing.assert_close(weights, torch.tensor([[[[0.75, 0.25]]]]))
    torch.testing.assert_close(output, torch.tensor([[[[3.0, 2.0]]]]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_and_explicit_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], masked: bool
) -> None:
    heads = _heads(*shape)
    mask = _padding(shape[0], shape[2]) if masked else None
    expected, _ = reference_attention(*heads, mask)
    torch.testing.assert_close(fused_attention(*heads, mask), expected, rtol=1e-5, atol=1e-5)
    for explicit in (False, True):
        _choose(monkeypatch, explicit)
        torch.testing.assert_close(attend(*heads, mask), expected, rtol=1e-5, atol=1e-5)


def _module(*, over_memory: bool, dropout: float = 0.0) -> MultiHeadAttention:
    torch.manual_seed(1)
    return MultiHeadAttention(32, 4, dropout=dropout, over_memory=over_memory)


def _gradients(module: MultiHeadAttention, *arguments: Tensor | None, causal: bool = False):  # type: ignore[no-untyped-def]
    inputs, memory, mask = arguments
    leaves = [leaf for leaf in (inputs, memory) if leaf is not None]
    output = module(inputs, memory, mask, causal=causal)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), [*leaves, *module.parameters()])


@pytest.mark.parametrize("case", ["self", "causal", "memory"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_explicit_training_path_equals_the_fused_one(
    monkeypatch: pytest.MonkeyPatch, case: str, masked: bool
) -> None:
    module = _module(over_memory=case == "memory")
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 6, 32, generator=generator, requires_grad=True)
    memory = None
    if case == "memory":
        memory = torch.randn(3, 9, 32, generator=generator, requires_grad=True)
    mask = _padding(3, 9 if case == "memory" else 6) if masked and case != "causal" else None
    _choose(monkeypatch, True)
    explicit = _gradients(module, inputs, memory, mask, causal=case == "causal")
    _choose(monkeypatch, False)
    fused = _gradients(module, inputs, memory, mask, causal=case == "causal")
    for one, other in zip(explicit, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_attention_dropout_has_the_gradients_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the draws fixed the explicit path is a smooth function: check it by differences.
    module = _module(over_memory=False, dropout=0.4).double()
    inputs = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)

    def fixed(like: Tensor, probability: float) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(8)
        kept = torch.rand(like.shape, generator=generator) >= probability
        return kept.to(like.dtype), 1 / (1 - probability)

    _choose(monkeypatch, True)
    monkeypatch.setattr(attention, "keep_mask", fixed)
    torch.autograd.gradcheck(module, (inputs,))


def test_attention_dropout_only_in_training() -> None:
    module = _module(over_memory=False, dropout=0.5)
    inputs = torch.randn(2, 5, 32)
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_keys_is_finite(
    monkeypatch: pytest.MonkeyPatch, explicit: bool, dtype: torch.dtype
) -> None:
    _choose(monkeypatch, explicit)
    module = _module(over_memory=False).to(dtype)
    inputs = torch.randn(2, 4, 32, dtype=dtype, requires_grad=True)
    keep = torch.tensor([[True, True, False, False], [False, False, False, False]])
    output = module(inputs, None, padding_mask(keep))
    output.float().sum().backward()
    assert inputs.grad is not None
    assert bool(torch.isfinite(output).all())
    assert bool(torch.isfinite(inputs.grad).all())


def test_huge_scores_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    _choose(monkeypatch, True)
    heads = tuple(tensor * 1e4 for tensor in _heads(2, 5, 6))
    expected, _ = reference_attention(*heads, None)
    torch.testing.assert_close(attend(*heads, None), expected)
    assert bool(torch.isfinite(expected).all())


def test_only_short_attention_on_a_cpu_is_explicit() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for gradients in (False, True):
        assert attention.use_explicit(cpu, torch.bfloat16, 14, 14, gradients=gradients)
        assert not attention.use_explicit(cpu, torch.bfloat16, 999, 999, gradients=gradients)
        assert not attention.use_explicit(cuda, torch.bfloat16, 14, 14, gradients=gradients)


def test_causal_mask_is_lower_triangular_and_cached() -> None:
    mask = causal_mask(5, torch.device("cpu"))
    assert mask.shape == (1, 1, 5, 5)
    assert torch.equal(mask[0, 0] == 0, torch.ones(5, 5).tril().bool())
    assert causal_mask(9, torch.device("cpu")).data_ptr() == mask.data_ptr()
    assert causal_mask(100, torch.device("cpu")).shape == (1, 1, 100, 100)


def test_joined_projections_are_initialised_as_several_matrices() -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(128, 4, dropout=0.0, over_memory=False)
    bound = math.sqrt(6 / (128 + 128))
    weight = module.query_key_value.weight.detach()
    assert bound * 0.99 < float(weight.abs().max()) <= bound
    assert not module.query_key_value.bias.any()

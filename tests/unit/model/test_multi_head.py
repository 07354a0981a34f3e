"""Projections around attentions: the paths of training, of decoding, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model import attention, attention_kernels, multi_head
from model.attention import ScoreName, padding_mask
from model.multi_head import MultiHeadAttention

# Widths of keys and values, and the other things that a head may have.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"key_width": 3},
    {"value_width": 16},
    {"key_width": 5, "value_width": 2, "radius": 2},
    {"score": "dot"},
    {"score": "general", "key_width": 6},
    {"score": "additive", "value_width": 6},
    {"radius": 1},
]


def _choose(monkeypatch: pytest.MonkeyPatch, explicit: bool) -> None:
    for module in (attention, multi_head):
        monkeypatch.setattr(module, "use_explicit", lambda *_, **__: explicit)


def _padding(batch: int, keys: int) -> Tensor:
    lengths = torch.arange(batch) % keys + 1
    return padding_mask(torch.arange(keys)[None, :] < lengths[:, None])


def _module(*, over_memory: bool, dropout: float = 0.0, **variant: Any) -> MultiHeadAttention:
    torch.manual_seed(1)
    if over_memory:
        variant.pop("radius", None)
    return MultiHeadAttention(32, 4, dropout=dropout, over_memory=over_memory, **variant)


def _gradients(
    module: MultiHeadAttention, *arguments: Tensor | None, causal: bool = False
) -> list[Tensor]:
    inputs, memory, mask = arguments
    leaves = [leaf for leaf in (inputs, memory) if leaf is not None]
    output = module(inputs, memory, mask, causal=causal)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [
        output, *torch.autograd.grad((output * weights).sum(), [*leaves, *module.parameters()])
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["self", "causal", "memory"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_training_path_is_the_formula(
    monkeypatch: pytest.MonkeyPatch, case: str, masked: bool, variant: dict[str, Any]
) -> None:
    module = _module(over_memory=case == "memory", **variant)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 6, 32, generator=generator, requires_grad=True)
    memory = None
    if case == "memory":
        memory = torch.randn(3, 9, 32, generator=generator, requires_grad=True)
    mask = _padding(3, 9 if case == "memory" else 6) if masked and case != "causal" else None
    arguments = inputs, memory, mask
    found = []
    for explicit in (True, False):
        _choose(monkeypatch, explicit)
        found.append(_gradients(module, *arguments, causal=case == "causal"))
    # What is recorded goes through the reference.
    record: list[Tensor] = []
    expected = module(*arguments, causal=case == "causal", record=record)
    assert record[0].shape == (3, 4, 6, 9 if case == "memory" else 6)
    for gradients in found:
        torch.testing.assert_close(gradients[0], expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"key_width": 3}, {"score": "general"}], ids=str)
@pytest.mark.parametrize("over_memory", [False, True])
def test_attention_dropout_has_the_gradients_of_its_mask(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], over_memory: bool
) -> None:
    # With the draws fixed the explicit path is a smooth function: check it by differences.
    module = _module(over_memory=over_memory, dropout=0.4, **variant).double()
    inputs = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)

    def fixed(like: Tensor, probability: float) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(8)
        kept = torch.rand(like.shape, generator=generator) >= probability
        return kept.to(like.dtype), 1 / (1 - probability)

    _choose(monkeypatch, True)
    monkeypatch.setattr(attention_kernels, "keep_mask", fixed)
    torch.autograd.gradcheck(module, (inputs, memory) if over_memory else (inputs,))


def test_attention_dropout_only_in_training() -> None:
    module = _module(over_memory=False, dropout=0.5)
    inputs = torch.randn(2, 5, 32)
    assert not torch.equal(module(inputs), module(inputs))
    module.eval()
    assert torch.equal(module(inputs), module(inputs))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [None, 1])
@pytest.mark.parametrize("score", ["scaled_dot", "additive"])
def test_a_row_without_keys_is_finite(
    monkeypatch: pytest.MonkeyPatch,
    explicit: bool,
    dtype: torch.dtype,
    radius: int | None,
    score: ScoreName,
) -> None:
    _choose(monkeypatch, explicit)
    module = _module(over_memory=False, radius=radius, score=score).to(dtype)
    inputs = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    keep = torch.tensor([[True, True, False, False, False], [False] * 5])
    output = module(inputs, None, padding_mask(keep))
    output.float().sum().backward()
    assert inputs.grad is not None
    assert bool(torch.isfinite(output).all())
    assert bool(torch.isfinite(inputs.grad).all())


def test_joined_projections_are_initialised_as_several_matrices() -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(128, 4, dropout=0.0, over_memory=False)
    bound = math.sqrt(6 / (128 + 128))
    # As PyTorch's own layer: the three as one matrix of 384 rows.
    joined = math.sqrt(6 / (128 + 384))
    assert joined == pytest.approx(bound / math.sqrt(2))
    assert joined * 0.99 < float(module.query_key_value.weight.detach().abs().max()) <= joined
    assert bound * 0.99 < float(module.output.weight.detach().abs().max()) <= bound
    assert not module.query_key_value.bias.any()


def test_narrow_keys_are_initialised_by_their_own_size() -> None:
    torch.manual_seed(0)
    module = MultiHeadAttention(128, 4, dropout=0.0, over_memory=True, key_width=8, value_width=64)
    keys, values = module.key_value.weight.detach().split([32, 256])
    for part, rows in ((keys, 32), (values, 256), (module.query.weight.detach(), 32)):
        bound = math.sqrt(3 / (128 + rows))
        assert bound * 0.98 < float(part.abs().max()) <= bound
    assert module.output.weight.shape == (128, 256)

"""The formula of model.cost against two counters that know nothing of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.attention import use_explicit
from model.build import build
from model.config import ModelConfig
from model.cost import Work, batch_flops, training_flops
from trainer.flop_count import (
    counted_by_cost,
    counted_by_deepspeed,
    counted_by_torch,
    deepspeed_flops,
    logits,
    torch_flops,
)

VOCABULARY = 1000
CPU = torch.device("cpu")

# Pairs, source and target length; with gradients in fp32, attention up to 16 keys is computed step
# by step on a CPU, and beyond by the fused kernel.
SHORT, LONG = (3, 14, 11), (2, 30, 37)


def batch(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    pairs, source, target = shape
    source_BS = torch.randint(4, VOCABULARY, (pairs, source))
    return source_BS, torch.randint(4, VOCABULARY, (pairs, target))


@pytest.mark.parametrize("preset", ["tiny", "base"])
@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_the_formula_agrees_with_torchs_counter(preset: str, shape: tuple[int, int, int]) -> None:
    """Forward, and forward with backward through the real loss, on the CPU's real paths."""
    layers = {"encoder_layers": 2, "decoder_layers": 1}  # the base model's six take seconds
    config = ModelConfig.model_validate({"preset": preset, **layers})
    model = build(config, VOCABULARY)
    source_BS, target_BT = batch(shape)
    assert use_explicit(CPU, torch.float32, shape[2], shape[1], gradients=True) == (shape is SHORT)
    expected = counted_by_cost(config, VOCABULARY, [shape])
    assert torch_flops(lambda: logits(model, source_BS, target_BT)) == pytest.approx(
        expected, rel=0.01
    )

    def train() -> None:
        loss, _ = model.training_loss(source_BS, target_BT, target_BT, 0.1)
        loss.backward()

    work = Work.of([shape[1]] * shape[0], [shape[2]] * shape[0])
    expected = training_flops(config, work, vocab_size=VOCABULARY)
    assert torch_flops(train) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("preset", ["tiny", "base", "big"])
def test_counting_by_shapes_alone_agrees_too(preset: str) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    shapes = [(64, 30, 37), (7, 5, 90)]
    assert counted_by_torch(config, VOCABULARY, shapes) == pytest.approx(
        counted_by_cost(config, VOCABULARY, shapes), rel=1e-6
    )


def test_padding_is_counted_by_torch_and_not_by_the_formula() -> None:
    config = ModelConfig(preset="tiny")
    real = batch_flops(config, VOCABULARY, [10, 5], [10, 5])
    assert counted_by_torch(config, VOCABULARY, [(2, 10, 10)]) > 1.3 * real


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_deepspeed_counts_the_same_multiply_adds(shape: tuple[int, int, int]) -> None:
    config = ModelConfig(preset="tiny")
    expected = counted_by_cost(config, VOCABULARY, [shape])
    operations, multiply_adds = counted_by_deepspeed(config, VOCABULARY, shape)
    assert 2 * multiply_adds == pytest.approx(expected, rel=1e-6)
    # It adds norms and element-wise functions, where it knows them.
    assert expected < operations < 1.01 * expected


def test_deepspeed_leaves_torch_as_it_was() -> None:
    before = torch.mm, torch.Tensor.matmul, nn.functional.linear, set(vars(torch.Tensor))
    layer = nn.Linear(3, 5)

    def fail() -> None:
        layer(torch.ones(2, 3))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        deepspeed_flops(layer, fail)
    assert (torch.mm, torch.Tensor.matmul, nn.functional.linear) == before[:3]
    assert set(vars(torch.Tensor)) == before[3]
    assert deepspeed_flops(layer, lambda: layer(torch.ones(2, 3))) == (2 * 2 * 15, 2 * 15)

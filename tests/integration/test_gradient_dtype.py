"""Gradients rounded on their way between ranks, and sums that begin in the backward pass."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine_ranks import (
    EMA_DECAY,
    LEARNING_RATE,
    LENGTH,
    ROWS,
    VOCABULARY,
    Tiny,
    equal,
    restore,
    run_tasks,
    whole_state,
)
from trainer.config import TrainerConfig
from trainer.engine import Engine

STAGES = (0, 1, 2, 3)
STEPS = 4
Weights = dict[str, np.ndarray]


def make(world_size: int, stage: int, gradient_dtype: str | None) -> Engine:
    torch.manual_seed(1)
    config = TrainerConfig.model_validate(
        {
            "zero_stage": stage,
            "gradient_dtype": gradient_dtype,
            "adam_epsilon": 1e-3,
            "ema_decay": EMA_DECAY,
        }
    )
    return Engine(Tiny(), config, world_size=world_size, device=torch.device("cpu"))


def train(engine: Engine, steps: range, rank: int, world_size: int, *, early: bool) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCABULARY, (2 * ROWS, LENGTH), generator=generator)
        for number, micro_batch in enumerate(ids.chunk(2)):
            loss, _ = engine(micro_batch[rank::world_size], 1.0)
            last = early and number == 1
            engine.backward(loss, target_tokens=ids.numel(), last=last)
        assert engine.step(LEARNING_RATE).applied


def trained(
    rank: int, world_size: int, stage: int, gradient_dtype: str | None, early: bool
) -> Weights:
    """How far the weights moved to the end, which a resume half-way meets bitwise."""
    engine = make(world_size, stage, gradient_dtype)
    start = whole_state(engine, rank, world_size)["weight"]
    train(engine, range(STEPS // 2), rank, world_size, early=early)
    middle, scalars = whole_state(engine, rank, world_size), engine.scalars()
    train(engine, range(STEPS // 2, STEPS), rank, world_size, early=early)
    end = whole_state(engine, rank, world_size)
    resumed = make(world_size, stage, gradient_dtype)
    restore(resumed, middle, scalars)
    train(resumed, range(STEPS // 2, STEPS), rank, world_size, early=early)
    assert equal(whole_state(resumed, rank, world_size), end)
    return {name: (weight - start[name]).numpy() for name, weight in end["weight"].items()}


def distance(one: Weights, other: Weights) -> float:
    """Between two ends, as part of the way to them."""
    between = sum(float(np.square(one[name] - other[name]).sum()) for name in one)
    return math.sqrt(between / sum(float(np.square(weight).sum()) for weight in other.values()))


@pytest.mark.slow
def test_rounded_gradients_end_near_the_others_and_resume_bitwise(tmp_path: Path) -> None:
    cases = [(stage, dtype, stage == 0) for stage in STAGES for dtype in (None, "bf16")]
    cases.append((0, None, False))
    found = run_tasks(2, tmp_path, [(trained, case) for case in cases])
    states = {case: results[0] for case, results in zip(cases, found, strict=True)}
    for first, second in found:
        assert distance(first, second) == 0
    exact = states[1, None, False]
    for stage in STAGES:
        early = stage == 0
        assert distance(states[stage, None, early], exact) < 1e-4
        # bf16 keeps eight bits.
        assert 1e-3 < distance(states[stage, "bf16", early], exact) < 2e-2
    # When the sums begin changes nothing.
    assert distance(states[0, None, True], states[0, None, False]) == 0

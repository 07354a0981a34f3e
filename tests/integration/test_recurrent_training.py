"""Recurrent models in the real engine at every ZeRO stage, and from the command to the BLEU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.build import build
from model.config import ModelConfig
from tests.engine_ranks import run_tasks
from trainer.config import TrainerConfig
from trainer.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VOCABULARY, STEPS = 700, 4
# Wide enough that stage 3 shares the gates' matrices out (from 100,000 elements on).
WIDTH = 168


def _batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eight pairs to be copied, padded."""
    generator = torch.Generator().manual_seed(step)
    source = torch.randint(4, VOCABULARY, (8, 6), generator=generator)
    for row in range(8):
        source[row, 6 - row % 4 :] = 0
    target_in = torch.cat([torch.ones(8, 1, dtype=torch.int64), source[:, :-1]], 1)
    return source, target_in.masked_fill(source == 0, 0), source


def losses(rank: int, world_size: int, kind: str, stage: int, precision: str) -> list[float]:
    """The global loss of every step."""
    torch.manual_seed(1)
    values = {"kind": kind, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2,
              "attention": "additive", "dropout": 0.0}  # fmt: skip
    model = build(ModelConfig.model_validate(values), VOCABULARY)
    config = TrainerConfig.model_validate({"zero_stage": stage, "precision": precision})
    engine = Engine(model, config, world_size=world_size, device=torch.device("cpu"))
    engine.train()
    totals = []
    for step in range(STEPS):
        batch = _batch(step)
        num_targets = int((batch[2] != 0).sum())
        loss, _ = engine(*(part[rank::world_size] for part in batch), 0.1)
        engine.backward(loss, target_tokens=num_targets)
        assert engine.step(2e-3).applied
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        totals.append(float(total) / num_targets)
    return totals


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_every_stage_and_precision_gives_the_same_losses(tmp_path: Path, kind: str) -> None:
    settings = [(kind, stage, precision) for precision in ("fp32", "bf16") for stage in range(4)]
    together = run_tasks(2, tmp_path, [(losses, one) for one in settings])
    (alone,) = run_tasks(1, tmp_path, [(losses, (kind, 1, "fp32"))])
    expected = alone[0]
    assert all(math.isfinite(loss) for loss in expected)
    assert expected[-1] < expected[0]
    for (_, _, precision), by_rank in zip(settings, together, strict=True):
        assert by_rank[0] == by_rank[1]
        assert by_rank[0] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-2)

"""Models that are no Transformer: in the engine at every ZeRO stage, and from command to BLEU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from model.build import build
from model.config import ModelConfig
from tests.engine_ranks import run_tasks
from trainer.config import TrainerConfig
from trainer.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
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


def babelray(*arguments: str, cwd: Path, text: str = "") -> str:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=text,
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
        check=True,
    ).stdout


@pytest.mark.parametrize("kind", ["lstm", "convolutional"])
def test_it_learns_a_small_language(
    kind: str, prepared: tuple[DataConfig, Manifest], tmp_path: Path
) -> None:
    """Words in reverse order, each spelt backwards, by the commands that train a Transformer."""
    config = {
        "model": {
            "kind": kind,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "attention": "additive",
            "dropout": 0.05,
        },
        "data": prepared[0].model_dump(mode="json"),
        "trainer": {
            "max_steps": 300,
            "precision": "bf16",
            "peak_learning_rate": 0.01,
            "warmup_steps": 60,
            "decay_fraction": 0.4,
            "log_every": 25,
            "validate_every": 150,
            "metrics_port": 0,
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    settings = ["--config", "toy.yaml", "--name", "toy", "--workers", "2"]
    # In two parts, the second from the first's checkpoint.
    babelray("train", *settings, "--set", "trainer.max_steps=100", cwd=tmp_path)
    babelray("train", *settings, "--resume", cwd=tmp_path)
    run = tmp_path / "runs" / "toy"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "finished"] == [
        "max_steps"
    ] * 2
    assert json.loads(babelray("evaluate", "toy", "--json", cwd=tmp_path))["bleu"] > 80
    translated = babelray("translate", "toy", cwd=tmp_path, text="kaka lolo\n\nmimi ruka teka\n")
    assert len(translated.splitlines()) == 3
    page = tmp_path / babelray("report", "toy", cwd=tmp_path).strip()
    assert page.read_text().startswith("<!")

"""The whole path as a user walks it: text, shards, Ray, DeepSpeed, checkpoint, BLEU, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_shards.config import DataConfig
from data_shards.manifest import Manifest

pytestmark = pytest.mark.timeout(400)

REPOSITORY = Path(__file__).resolve().parents[2]


def babelray(*arguments: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


def test_a_small_language_is_learnt(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> None:
    """Words in reverse order, each spelt backwards: needs attention, and little else."""
    config = {
        "model": {
            "d_model": 64,
            "d_ff": 128,
            "num_heads": 4,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "norm": "pre",
            "dropout": 0.05,
        },
        "data": prepared[0].model_dump(mode="json"),
        "trainer": {
            "max_steps": 450,
            "precision": "bf16",
            "peak_learning_rate": 0.004,
            "warmup_steps": 60,
            "decay_fraction": 0.4,
            "log_every": 25,
            "validate_every": 150,
            "metrics_port": 0,
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    trained = babelray(
        "train", "--config", "toy.yaml", "--name", "toy", "--workers", "2", "--json", cwd=tmp_path
    )
    assert json.loads(trained.stdout)["reason"] == "max_steps"
    run = tmp_path / "runs" / "toy"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    validated = [event["valid_nll"] for event in events if event["event"] == "validated"]
    assert validated[-1] == min(validated) < 0.5

    result = json.loads(babelray("evaluate", "toy", "--json", cwd=tmp_path).stdout)
    assert result["bleu"] > 80
    assert "tok:13a" in result["signature"]
    assert (run / "evaluation" / "test-best.json").exists()

    lines = ["kaka lolo", "", "mimi ruka teka"]
    translated = babelray("translate", "toy", cwd=tmp_path, text="\n".join(lines) + "\n").stdout
    assert translated.splitlines()[1] == ""
    assert len(translated.splitlines()) == 3

    page = Path(babelray("report", "toy", cwd=tmp_path).stdout.strip())
    assert (tmp_path / page).read_text().startswith("<!")

"""What the integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from tests.workplace import Commands, Workplace


@pytest.fixture
def workplace(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Iterator[Workplace]:
    config = {
        "model": {
            "d_model": 32,
            "d_ff": 64,
            "num_heads": 4,
            "encoder_layers": 1,
            "decoder_layers": 1,
        },
        "data": prepared[0].model_dump(mode="json"),
        "trainer": {
            "max_steps": 100_000,
            "log_every": 1,
            "validate_every": 100_000,
            "checkpoint_every": 20,
            "metrics_port": 0,
            "threads": 1,
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    workplace = Workplace(tmp_path, Commands(tmp_path))
    yield workplace
    workplace.commands.kill_left()

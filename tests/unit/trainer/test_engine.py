"""What DeepSpeed is told; the engine itself is tested with real ranks in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_shards.errors import UserError
from trainer.config import TrainerConfig
from trainer.engine import Engine, deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulation_and_the_batch_are_the_callers(stage: int, precision: str) -> None:
    config = TrainerConfig.model_validate({"zero_stage": stage, "precision": precision})
    values = deepspeed_config(config, world_size=3, on_cpu=False)
    assert values["managed_gradient_accumulation"] is False
    assert values["train_batch_size"] == 3
    assert values["zero_optimization"]["stage"] == stage
    enabled = {name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled")}
    assert enabled == {precision} - {"fp32"}


def test_clipping_is_deepspeeds_but_for_plain_float32() -> None:
    clip = {"clip_norm": 0.7}
    sharded = TrainerConfig.model_validate({"zero_stage": 1, **clip})
    plain = TrainerConfig.model_validate({"zero_stage": 0, **clip})
    assert deepspeed_config(sharded, world_size=2, on_cpu=True)["gradient_clipping"] == 0.7
    assert deepspeed_config(plain, world_size=2, on_cpu=True)["gradient_clipping"] == 0.0


def test_gradients_are_rounded_only_where_they_are_sent() -> None:
    config = TrainerConfig(gradient_dtype="bf16")
    alone = deepspeed_config(config, world_size=1, on_cpu=True)
    joined = deepspeed_config(config, world_size=2, on_cpu=True)
    assert "communication_data_type" not in alone
    assert joined["communication_data_type"] == "bf16"
    default = deepspeed_config(TrainerConfig(), world_size=2, on_cpu=True)
    assert "communication_data_type" not in default


@pytest.mark.parametrize(("stage", "overlaps"), [(0, False), (1, False), (2, True), (3, True)])
def test_deepspeed_overlaps_where_it_can(stage: int, overlaps: bool) -> None:
    config = TrainerConfig.model_validate({"zero_stage": stage})
    values = deepspeed_config(config, world_size=2, on_cpu=False)
    assert values["zero_optimization"]["overlap_comm"] is overlaps


def test_one_rank_alone_holds_no_buffers_for_what_it_does_not_send() -> None:
    def zero(stage: int, precision: str) -> Any:
        config = TrainerConfig.model_validate({"zero_stage": stage, "precision": precision})
        return deepspeed_config(config, world_size=1, on_cpu=False)["zero_optimization"]

    assert zero(2, "bf16")["overlap_comm"] is False
    assert zero(1, "bf16")["contiguous_gradients"] is False
    assert zero(1, "fp16")["contiguous_gradients"] is True  # DeepSpeed's own update


def test_fp16_on_a_cpu_is_refused_before_deepspeed_is_loaded() -> None:
    config = TrainerConfig(precision="fp16")
    with pytest.raises(UserError, match="fp16 is not supported on a CPU: use bf16"):
        Engine(torch.nn.Linear(2, 2), config, world_size=1, device=torch.device("cpu"))

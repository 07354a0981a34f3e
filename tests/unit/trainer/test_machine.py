"""What a device could do at best."""

from __future__ import annotations

import torch

from trainer import machine
from trainer.config import TrainerConfig

_CPU = torch.device("cpu")


def test_a_cpu_is_measured_and_random_numbers_stay_as_they_are() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = machine.rates(TrainerConfig(), _CPU)
    assert found.source == "measured"
    assert found.peak == found.sustained > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_who_knows_better_may_say_so() -> None:
    found = machine.rates(TrainerConfig(peak_flops=1e15), _CPU)
    assert (found.peak, found.source) == (1e15, "configured")
    assert found.sustained < 1e15


def test_versions_and_names_are_told() -> None:
    assert machine.versions()["torch"] == torch.__version__
    about = machine.describe(_CPU)
    assert about["gpu"] is None
    assert about["cores"] >= 1
    assert about["memory_bytes"] > 1e8

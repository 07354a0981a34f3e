"""The clock of a step's phases."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.phases import PHASES, Phases


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def test_every_moment_belongs_to_one_phase(now: list[float]) -> None:
    phases = Phases(torch.device("cpu"))

    def spend(seconds: float) -> None:
        now[0] += seconds

    spend(1)
    with phases("backward"):
        spend(2)
        with phases("communication"):
            spend(4)
        spend(8)
    spend(16)
    seconds = phases.lap()
    assert seconds == dict.fromkeys(PHASES, 0.0) | {
        "other": 17.0,
        "backward": 10.0,
        "communication": 4.0,
    }
    spend(3)
    assert phases.lap() == dict.fromkeys(PHASES, 0.0) | {"other": 3.0}


def test_an_error_leaves_the_phase(now: list[float]) -> None:
    phases = Phases(torch.device("cpu"))

    def fail() -> None:
        with phases("forward"):
            now[0] += 1
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    now[0] += 1
    lap = phases.lap()
    assert lap is not None
    assert (lap["forward"], lap["other"]) == (1.0, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_phases_of_a_step_are_known_a_step_later() -> None:
    phases = Phases(torch.device("cuda"))
    phases.lap()
    a = torch.ones(4096, 4096, device="cuda")
    for _ in range(3):
        with phases("forward"):
            for _ in range(20):
                a @ a
        torch.cuda.synchronize()
        lap = phases.lap()
    assert lap is not None
    assert lap["forward"] > 10 * lap["other"]

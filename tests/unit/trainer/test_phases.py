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


def test_a_validation_is_not_divided(now: list[float]) -> None:
    phases = Phases(torch.device("cpu"))
    with phases("validation"), phases("communication"):
        now[0] += 5
    phases_of_step = phases.lap()
    assert phases_of_step == dict.fromkeys(PHASES, 0.0) | {"validation": 5.0}


def test_what_came_before_the_first_step_is_forgotten(now: list[float]) -> None:
    phases = Phases(torch.device("cpu"))
    now[0] += 30
    phases.restart()
    now[0] += 1
    assert phases.lap() == dict.fromkeys(PHASES, 0.0) | {"other": 1.0}


class _Event:
    """A CUDA event, as far as the clock needs one."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1000.0 * (end.at - self.at)


def test_on_a_device_each_step_is_known_a_step_later(
    now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    phases = Phases(torch.device("cuda"))
    with phases("other"):
        now[0] += 30
    phases.restart()
    found = []
    for step in (1, 2, 3):
        with phases("forward"):
            now[0] += step
        found.append(phases.lap())
    assert found[0] is None
    assert [lap["forward"] for lap in found[1:] if lap is not None] == [1.0, 2.0]
    assert all(lap["other"] == 0 for lap in found[1:] if lap is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_phases_of_a_step_are_known_a_step_later() -> None:
    phases = Phases(torch.device("cuda"))
    phases.restart()
    a = torch.ones(4096, 4096, device="cuda")
    for step in range(3):
        with phases("forward"):
            for _ in range(20):
                a @ a
        torch.cuda.synchronize()
        lap = phases.lap()
        assert (lap is None) == (step == 0)
    assert lap is not None
    assert lap["forward"] > 10 * lap["other"]

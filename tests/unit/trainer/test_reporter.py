"""What is told of steps: events and metrics that agree, with steps that were not trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from trainer.config import RunConfig
from trainer.events import EventLog
from trainer.interruption import Interruption
from trainer.machine import Rates
from trainer.measures import Measured
from trainer.metrics import RankMetrics, RunMetrics
from trainer.phases import PHASES, Phase
from trainer.reporter import Reporter, Update, Voices
from trainer.state import TrainState

# Of every step: 60 source and 40 target tokens in 5 pairs.
_PLAN: Any = SimpleNamespace(
    source_tokens=lambda step: 60,
    target_tokens=lambda step: 40,
    num_pairs=lambda step: 5,
    locate=lambda step: divmod(step, 10),
    steps_per_epoch=10,
)


class Run:
    """A reporter, and a state that steps."""

    def __init__(self, folder: Path, interruption: Interruption | None = None) -> None:
        self.folder, self.state = folder, TrainState()
        self.run, self.rank = RunMetrics("demo"), RankMetrics("demo", 0)
        self.reporter = Reporter(
            RunConfig.model_validate({"trainer": {"log_every": 4}}),
            _PLAN,
            self.state,
            world_size=2,
            device=torch.device("cpu"),
            rates=Rates(1e6, "measured", 1e6),
            voices=Voices(EventLog(folder / "events.jsonl"), self.run, self.rank),
            interruption=interruption,
            valid_bleu=lambda: 38.5,
        )

    def advance(self) -> tuple[Measured, dict[Phase, float]]:
        state = self.state
        state.step += 1
        state.elapsed_s += 0.5
        state.source_tokens, state.target_tokens = 60 * state.step, 40 * state.step
        measured = Measured(1000.0, 125.0, {"gpu": 3.0}, [0.3, 0.45], [50.0, 50.0])
        phases: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        return measured, phases | {"forward": 0.3, "communication": 0.1, "validation": 7.0}

    def train(self, loss: float = 2.0) -> None:
        measured, phases = self.advance()
        self.reporter.stepped(Update(40 * loss, 20 * loss, 1e-3, 0.5, 1.0, measured, phases))

    def skip(self) -> None:
        measured, phases = self.advance()
        self.reporter.skipped(
            "loss_not_finite", float("nan"), 0.0, lanes=[0], pairs={}, measured=measured,
            phases=phases,
        )  # fmt: skip

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def metric(self, name: str, **labels: str) -> float | None:
        for family in (self.run, self.rank):
            registry = family.registry
            assert isinstance(registry, CollectorRegistry)
            found = registry.get_sample_value(f"babelray_{name}", {"run": "demo", **labels})
            if found is not None:
                return found
        return None


def test_skipped_steps_count_as_work_and_not_as_updates(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(8.0)
    run.train(2.0)
    run.skip()
    run.train(4.0)
    first, last = run.events("step")
    assert (first["step"], last["step"]) == (1, 4)
    assert last["mean_loss"] == pytest.approx(3.0)  # of the two updates since the log before
    assert last["tokens_per_second"] == pytest.approx(300 / 1.5)  # of all three steps
    assert last["mfu"] == pytest.approx(3000 / 1.5 / 1e6)
    assert last["padding_efficiency"] == pytest.approx(0.8)
    assert (last["slowest_rank"], last["skew"]) == (1, 1.5)
    assert last["phases"]["forward"] == 0.3
    for name, expected in {
        "steps_total": 3.0,
        "target_tokens_total": 160.0,
        "source_tokens_total": 240.0,
        "samples_total": 20.0,
        "flops_total": 4000.0,
        "position_steps": 4.0,
        "tokens_per_second": 200.0,
        "mfu_ratio": last["mfu"],
        "rank_skew_ratio": 1.5,
        "valid_bleu": 38.5,
        "step_seconds_count": 4.0,
    }.items():
        assert run.metric(name) == pytest.approx(expected), name
    assert run.metric("energy_joules_total", source="gpu") == 12.0
    assert run.metric("skipped_steps_total", reason="loss_not_finite") == 1.0
    assert run.metric("step_seconds_sum") == pytest.approx(1.6)  # validations are no steps
    assert run.metric("step_phase_seconds_sum", phase="validation") == 28.0
    assert run.metric("rank_busy_seconds", rank="0") == pytest.approx(0.3)


def test_the_first_step_after_a_failure_tells_of_the_recovery(tmp_path: Path) -> None:
    before = Interruption(0.0, "hung", "rank 1 hung", ("killed", "hung"), seen=7)
    run = Run(tmp_path, before)
    assert run.metric("restarts_total", cause="killed") == 1.0
    assert run.events("recovered") == []
    run.skip()
    run.train()
    [event] = run.events("recovered")
    assert (event["step"], event["cause"], event["failures_seen"]) == (1, "hung", 7)
    assert run.metric("recovery_seconds_count", cause="hung") == 1.0
    assert run.metric("recovery_seconds_count", cause="killed") == 0.0


def test_the_end_tells_the_sums_whatever_was_logged_last(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    run.train()
    run.state.flops, run.state.data_hash = 2000.0, 0xAB
    run.reporter.finished("max_steps")
    [end] = run.events("finished")
    assert (end["source_tokens"], end["target_tokens"], end["flops"]) == (120, 80, 2000.0)
    assert end["data_hash"] == f"{0xAB:016x}"
    assert end["energy_joules"] is None


def test_a_validation_is_seen_while_it_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.reporter.validating()
    assert run.metric("validating") == 1
    run.state.best_nll, run.state.stale_validations = 1.5, 2
    run.reporter.validated(1.75, improved=False, seconds=3.0)
    assert run.metric("validating") == 0
    assert run.metric("valid_nll_nats") == 1.75
    assert run.metric("best_valid_nll_nats") == 1.5
    assert run.metric("stale_validations") == 2

"""The learning rate against the paper's formula."""

from __future__ import annotations

import pytest

from trainer.config import TrainerConfig
from trainer.schedule import Decay, learning_rate, planned_decay, timed_decay


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 100_000])
def test_it_is_the_papers_formula_by_default(step: int) -> None:
    config = TrainerConfig(warmup_steps=4000)
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert learning_rate(config, step, d_model=512, decay=None) == pytest.approx(expected)


def test_a_given_peak_is_reached_where_warmup_ends() -> None:
    config = TrainerConfig(warmup_steps=100, peak_learning_rate=0.01)
    rates = [learning_rate(config, step, d_model=64, decay=None) for step in range(1, 300)]
    assert max(rates) == rates[99] == pytest.approx(0.01)


def test_decay_falls_linearly_and_the_last_update_still_moves() -> None:
    config = TrainerConfig(max_steps=200, decay_fraction=0.5, warmup_steps=1)
    decay = planned_decay(config)
    assert decay == Decay(100, 200)
    factors = [
        learning_rate(config, step, d_model=64, decay=decay)
        / learning_rate(config, step, d_model=64, decay=None)
        for step in (100, 101, 150, 200)
    ]
    assert factors == pytest.approx([1.0, 100 / 101, 51 / 101, 1 / 101])


def test_a_timed_decay_waits_for_its_time_and_ends_with_the_budget() -> None:
    config = TrainerConfig(max_steps=None, max_minutes=10, decay_fraction=0.4)
    assert timed_decay(config, step=50, elapsed_s=359, seconds_per_step=2.0) is None
    decay = timed_decay(config, step=180, elapsed_s=360, seconds_per_step=2.0)
    assert decay == Decay(180, 300)


def test_a_timed_decay_never_goes_beyond_max_steps() -> None:
    config = TrainerConfig(max_steps=250, max_minutes=10, decay_fraction=0.4)
    assert timed_decay(config, step=180, elapsed_s=360, seconds_per_step=2.0) == Decay(180, 250)
    # The steps' share comes first when the run is fast.
    assert timed_decay(config, step=150, elapsed_s=60, seconds_per_step=0.4) == Decay(150, 250)


def test_without_decay_there_is_none() -> None:
    assert planned_decay(TrainerConfig(max_steps=10)) is None
    config = TrainerConfig(max_minutes=1)
    assert timed_decay(config, step=9, elapsed_s=59, seconds_per_step=1.0) is None

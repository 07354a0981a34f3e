"""The learning rate against the paper's formula."""

from __future__ import annotations

import pytest

from trainer.config import TrainerConfig
from trainer.schedule import learning_rate, progress


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 100_000])
def test_it_is_the_papers_formula_by_default(step: int) -> None:
    config = TrainerConfig(warmup_steps=4000)
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert learning_rate(config, step, d_model=512, done=0.99) == pytest.approx(expected)


def test_a_given_peak_is_reached_where_warmup_ends() -> None:
    config = TrainerConfig(warmup_steps=100, peak_learning_rate=0.01)
    rates = [learning_rate(config, step, d_model=64, done=0.0) for step in range(1, 300)]
    assert max(rates) == rates[99] == pytest.approx(0.01)


def test_decay_falls_linearly_to_zero_in_the_last_part_of_the_run() -> None:
    config = TrainerConfig(max_steps=200, decay_fraction=0.5, warmup_steps=1)
    factors = [
        learning_rate(config, 77, d_model=64, done=done)
        / learning_rate(config, 77, d_model=64, done=0.0)
        for done in (0.5, 0.6, 0.75, 0.99, 1.0)
    ]
    assert factors == pytest.approx([1.0, 0.8, 0.5, 0.02, 0.0])


def test_the_last_update_of_a_run_bounded_by_steps_still_moves() -> None:
    config = TrainerConfig(max_steps=10, decay_fraction=1.0, warmup_steps=1)
    done = progress(config, steps_done=9, elapsed_s=1e9)
    assert learning_rate(config, 10, d_model=64, done=done) > 0


@pytest.mark.parametrize(
    ("max_steps", "max_minutes", "expected"),
    [(100, None, 0.5), (None, 10.0, 0.2), (100, 10.0, 0.5), (1000, 10.0, 0.2), (25, None, 1.0)],
)
def test_progress_follows_the_bound_that_comes_first(
    max_steps: int | None, max_minutes: float | None, expected: float
) -> None:
    config = TrainerConfig(max_steps=max_steps, max_minutes=max_minutes)
    assert progress(config, steps_done=50, elapsed_s=120) == pytest.approx(expected)

"""The estimate of the time left, against histories whose end is known."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.time_left import Left, TimeLeft, rough
from trainer.config import load_config

LOG_EVERY = 10


def history(
    pace: Callable[[int], float],
    *,
    steps: int = 2000,
    validate_every: int = 200,
    validation_s: float = 0.0,
    crash_at: int | None = None,
    world_sizes: Callable[[int], int] = lambda step: 2,
) -> Iterator[dict[str, Any]]:
    """What the trainer logs: the clock stands at the step's end, validations come after it.

    A run that crashes goes on 30 steps before, with the clock of then.
    """
    clock_s, clocks = 0.0, {}
    step, size = 0, world_sizes(1)
    yield {"event": "started", "step": 0, "world_size": size}
    while step < steps:
        if step == crash_at:
            crash_at, step = None, step - 30
            clock_s = clocks[step]
            yield {"event": "worker_failed", "cause": "killed"}
            yield {"event": "resumed", "step": step, "world_size": size}
        step += 1
        if world_sizes(step) != size:
            size = world_sizes(step)
            yield {"event": "resumed", "step": step - 1, "world_size": size}
        clock_s += pace(step)
        clocks[step] = clock_s
        if step % LOG_EVERY == 0 or step == 1:
            yield {"event": "step", "step": step, "elapsed_s": clock_s, "world_size": size}
        if step % validate_every == 0 or step == steps:
            clock_s += validation_s
            yield {"event": "validated", "step": step, "seconds": validation_s}
    yield {"event": "end", "elapsed_s": clock_s}


def judged(
    events: Iterator[dict[str, Any]], *settings: str
) -> tuple[list[float], list[float], float]:
    """Relative errors, relative moves of the expected end, and the part of steps with an estimate.

    Moves are relative to what is left; the last twentieth of the run is left aside for both.
    """
    told = list(events)
    end_s = told[-1]["elapsed_s"]
    estimator = TimeLeft(
        load_config(
            None, ["trainer.max_steps=2000", "trainer.validate_every=200", *settings]
        ).trainer
    )
    errors, ends, shares = [], [], []
    for event in told:
        estimator.hear(event)
        if event["event"] != "step":
            continue
        truth = end_s - event["elapsed_s"]
        left = estimator.left()
        shares.append(left is not None)
        if left is not None and truth > end_s / 20:
            errors.append(abs(left.seconds - truth) / truth)
            ends.append((event["elapsed_s"] + left.seconds, truth))
    moves = [abs(b - a) / truth for (a, _), (b, truth) in itertools.pairwise(ends)]
    return errors, moves, statistics.fmean(shares)


def test_a_constant_pace_is_foretold_exactly() -> None:
    errors, moves, share = judged(history(lambda step: 5.0 if step == 1 else 0.1))
    assert max(errors) < 0.001  # the slow first step counts for nothing
    assert max(moves) < 0.001
    assert share > 0.95


def test_slow_validations_are_foretold_once_one_was_seen() -> None:
    events = list(history(lambda step: 0.1, validation_s=15.0))
    errors, moves, _ = judged(iter(events))
    assert statistics.median(errors) < 0.01
    after_the_first = errors[25:]
    assert max(after_the_first) < 0.01
    assert max(moves[25:]) < 0.01
    estimator = TimeLeft(
        load_config(None, ["trainer.max_steps=2000", "trainer.validate_every=200"]).trainer
    )
    said = []
    for event in events:
        estimator.hear(event)
        if event["event"] == "step" and estimator.left():
            said.append((event["step"], str(estimator.left()).startswith("at least")))
    assert [bound for step, bound in said] == [step <= 200 for step, bound in said]


def test_a_restart_is_no_part_of_the_pace() -> None:
    errors, moves, _ = judged(history(lambda step: 0.1, validation_s=5.0, crash_at=1111))
    assert statistics.median(errors) < 0.01
    assert max(errors[25:]) < 0.01
    assert max(moves[25:]) < 0.01


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_of_a_busy_machine_moves_the_estimate_little(seed: int) -> None:
    noise = random.Random(seed)

    def pace(step: int) -> float:
        hiccup = 2.0 if noise.random() < 0.002 else 0.0  # a storage that is slow now and then
        return noise.lognormvariate(0.0, 0.5) * 0.1 + hiccup

    errors, moves, share = judged(history(pace, validation_s=4.0))
    assert statistics.median(errors) < 0.10
    assert statistics.median(moves) < 0.02
    assert max(moves[25:]) < 0.15
    assert share > 0.9


def test_one_pause_as_of_a_machine_that_slept_is_not_expected_again() -> None:
    estimator = TimeLeft(load_config(None, ["trainer.max_steps=2000"]).trainer)
    for event in history(lambda step: 600.0 if step == 1000 else 0.1, validate_every=1000):
        estimator.hear(event)
        if event["event"] == "step" and event["step"] < 2000 and (left := estimator.left()):
            # Twice as long would be 2.0; it was 600 s for a step of 0.1 s.
            assert left.seconds / ((2000 - event["step"]) * 0.1) == pytest.approx(1.0, abs=0.15)


def test_another_number_of_workers_begins_anew() -> None:
    events = list(
        history(
            lambda step: 0.1 if step <= 1000 else 0.25,
            validation_s=2.0,
            world_sizes=lambda step: 4 if step <= 1000 else 2,
        )
    )
    estimator = TimeLeft(
        load_config(None, ["trainer.max_steps=2000", "trainer.validate_every=200"]).trainer
    )
    after = []
    for event in events:
        estimator.hear(event)
        if event["event"] == "step" and event["step"] > 1000:
            after.append((event["step"], estimator.left()))
    assert [step for step, left in after if left is None] == [1010, 1020, 1030, 2000]
    step, left = after[3]
    assert left is not None
    assert left.is_least  # how long a validation takes with these is not known
    assert left.seconds == pytest.approx((2000 - step) * 0.25)


def test_a_drift_is_followed() -> None:
    errors, moves, _ = judged(history(lambda step: 0.1 if step < 700 else 0.2))
    assert statistics.median(errors[-60:]) < 0.10
    assert max(moves) < 0.15


def test_a_limit_of_minutes_is_known_at_once() -> None:
    _, _, share = judged(
        history(lambda step: random.Random(step).lognormvariate(0, 1) * 0.1),
        "trainer.max_steps=null",
        "trainer.max_minutes=60",
    )
    assert share == 1.0
    estimator = TimeLeft(load_config(None, ["trainer.max_minutes=10"]).trainer)
    estimator.hear({"event": "step", "step": 1, "elapsed_s": 60.0, "world_size": 1})
    assert estimator.left() == Left(540.0)


def test_the_nearer_limit_counts() -> None:
    estimator = TimeLeft(
        load_config(None, ["trainer.max_minutes=60", "trainer.max_steps=100"]).trainer
    )
    for step in range(10, 60, 10):
        estimator.hear({"event": "step", "step": step, "elapsed_s": step * 2.0, "world_size": 1})
    left = estimator.left()
    assert left is not None
    assert left.seconds == pytest.approx(100.0)


def test_a_pace_that_is_not_known_is_not_told() -> None:
    wild = random.Random(7)
    estimator = TimeLeft(load_config(None, ["trainer.max_steps=1000"]).trainer)
    clock_s = 0.0
    for step in range(10, 60, 10):
        clock_s += wild.choice([1.0, 30.0])
        estimator.hear({"event": "step", "step": step, "elapsed_s": clock_s, "world_size": 1})
    assert estimator.left() is None


def test_a_run_with_patience_may_end_earlier() -> None:
    estimator = TimeLeft(
        load_config(None, ["trainer.max_minutes=10", "trainer.patience=3"]).trainer
    )
    estimator.hear({"event": "step", "step": 1, "elapsed_s": 60.0, "world_size": 1})
    assert str(estimator.left()) == "at most 9 min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "5 s"),
        (13, "15 s"),
        (42, "40 s"),
        (94, "90 s"),
        (97, "2 min"),
        (723, "12 min"),
        (1500, "25 min"),
        (3500, "60 min"),
        (4300, "70 min"),
        (7100, "about 2 h"),
        (9500, "about 2.5 h"),
        (50_000, "about 14 h"),
        (200_000, "about 2.5 days"),
        (86_400 * 12.2, "about 12 days"),
    ],
)
def test_rough(seconds: float, text: str) -> None:
    assert rough(seconds) == text
    number = float(text.removeprefix("about ").split()[0])
    unit = {"s": 1, "min": 60, "h": 3600, "days": 86_400}[text.split()[-1]]
    assert seconds < 10 or number * unit == pytest.approx(seconds, rel=0.25)


def test_the_bounds_in_words() -> None:
    assert str(Left(7100.0)) == "about 2 h"
    assert str(Left(7100.0, is_least=True)) == "at least 2 h"
    assert str(Left(7100.0, is_most=True)) == "at most 2 h"
    assert str(Left(7100.0, is_least=True, is_most=True)) == "about 2 h"

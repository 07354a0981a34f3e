"""Which steps are not trained on, and what follows: properties, and the policy step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import RecoveryConfig
from trainer.guard import Action, Guard, GuardState, Reason

NOT_FINITE = [math.nan, math.inf, -math.inf]


def make_guard(state: GuardState | None = None, **values: Any) -> Guard:
    return Guard(RecoveryConfig(**values), GuardState() if state is None else state)


def feed(guard: Guard, losses: Iterable[float], *, first: int = 1) -> list[int]:
    """Steps that the guard would not train on; the others are trained on."""
    refused = []
    for step, loss in enumerate(losses, start=first):
        reason = guard.judge_loss(loss)
        if reason is None:
            guard.trained(loss)
        else:
            guard.skipped(step, reason)
            refused.append(step)
    return refused


@st.composite
def curves(draw: st.DrawFn, *, min_steps: int = 1) -> list[float]:
    """Losses of a run that goes well: they fall towards a floor, with noise that stays bounded.

    With label smoothing the floor is well above zero, without it may be zero, and then noise is
    many times the level. The noise is at most 1.4 nats each way: two such steps are less than the
    default 3 nats apart.
    """
    floor = draw(st.sampled_from([0.0, 0.01, 1.3, 2.5]))
    height = draw(st.floats(0.0, 10.0))
    steps_to_fall = draw(st.floats(1.0, 2000.0))
    amplitude = draw(st.floats(0.0, 1.4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    level = floor + height * np.exp(-np.arange(draw(st.integers(min_steps, 600))) / steps_to_fall)
    noise = np.clip(rng.standard_t(3, len(level)) / 3, -1, 1) * amplitude
    losses: list[float] = np.maximum(level + noise, 0.0).tolist()
    return losses


@settings(deadline=None)
@given(curves())
def test_a_curve_that_goes_well_is_trained_on_whole(losses: list[float]) -> None:
    guard = make_guard()
    assert feed(guard, losses) == []
    assert guard.state.updates == len(losses)
    assert guard.state.skipped == 0


@settings(deadline=None)
@given(curves(), st.data())
def test_what_is_not_finite_is_refused_from_the_first_step_on(
    losses: list[float], data: st.DataObject
) -> None:
    bad = data.draw(st.sets(st.integers(0, len(losses) - 1), min_size=1, max_size=5))
    for index in bad:
        losses[index] = data.draw(st.sampled_from(NOT_FINITE))
    guard = make_guard(spike_nats=None)
    assert feed(guard, losses) == sorted(index + 1 for index in bad)
    assert guard.state.mean is None or math.isfinite(guard.state.mean)


@settings(deadline=None)
@given(curves(min_steps=100), st.floats(3.0, 1e6), st.integers(1, 9))
def test_a_leap_is_refused_however_long_it_lasts(
    losses: list[float], leap: float, lasts: int
) -> None:
    guard = make_guard()
    feed(guard, losses)
    before = guard.state.to_json()
    leaps = [max(losses) + leap + 1e-6] * lasts
    refused = feed(guard, leaps, first=len(losses) + 1)
    assert refused == list(range(len(losses) + 1, len(losses) + lasts + 1))
    # What was refused has not moved what the next is judged by.
    after = guard.state.to_json()
    assert (after["mean"], after["updates"]) == (before["mean"], before["updates"])


def test_a_spike_is_judged_by_the_limit_after_a_hundred_trained_steps() -> None:
    guard = make_guard(spike_nats=0.5)
    feed(guard, [2.0] * 99)
    assert guard.judge_loss(1000.0) is None
    guard.trained(2.0)
    assert guard.judge_loss(2.51) == "loss_spike"
    assert guard.judge_loss(2.49) is None
    assert guard.judge_loss(-1000.0) is None  # to fall is no spike
    assert make_guard(guard.state, spike_nats=None).judge_loss(1000.0) is None


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=300))
def test_the_mean_weighs_losses_by_their_age(losses: list[float]) -> None:
    guard = make_guard(spike_nats=None)
    feed(guard, losses)
    weights = 0.99 ** np.arange(len(losses))[::-1]
    assert guard.state.mean == pytest.approx(np.average(losses, weights=weights), abs=1e-9)


@pytest.mark.parametrize(
    ("finite_norm", "overflow", "reason"),
    [
        (True, False, None),
        (False, False, "gradient_not_finite"),
        (False, True, "fp16_overflow"),
        (True, True, "fp16_overflow"),
    ],
)
def test_the_update_is_judged_by_what_the_engine_says(
    finite_norm: bool, overflow: bool, reason: Reason | None
) -> None:
    assert make_guard().judge_update(finite_norm=finite_norm, overflow=overflow) == reason


def skip(guard: Guard, steps: Iterable[int], reason: Reason = "loss_spike") -> list[Action]:
    return [guard.skipped(step, reason) for step in steps]


def test_a_streak_leads_back_and_at_last_to_a_stop() -> None:
    guard = make_guard(max_skipped=3, max_rewinds=2)
    saved = GuardState(mean=4.0, updates=200)
    feed(guard, [2.0] * 300)
    for turn in range(2):
        first = 301 + 3 * turn
        assert skip(guard, range(first, first + 3)) == ["go_on", "go_on", "rewind"]
        assert (guard.state.streak, guard.state.streak_start) == (3, first)
        # If going back to 280 has not helped, an older one is tried.
        assert guard.newest_to_try() == (300 if turn == 0 else 279)
        guard.rewound(saved, 280 - 20 * turn)
        assert guard.state == GuardState(
            mean=4.0,
            updates=200,
            skipped=3 * (turn + 1),
            rewinds=turn + 1,
            rewound_to=280 - 20 * turn,
        )
    assert skip(guard, range(307, 310)) == ["go_on", "go_on", "stop"]


def test_the_policy_may_be_to_stop() -> None:
    guard = make_guard(max_skipped=2, then="stop")
    assert skip(guard, [7, 8]) == ["go_on", "stop"]
    assert make_guard(max_skipped=1, max_rewinds=0).skipped(7, "loss_not_finite") == "stop"


def test_a_step_that_is_trained_on_ends_a_streak() -> None:
    guard = make_guard(max_skipped=3)
    assert skip(guard, [5, 6]) == ["go_on", "go_on"]
    guard.trained(2.0)
    assert (guard.state.streak, guard.state.streak_start) == (0, None)
    assert skip(guard, [8, 9, 10], "gradient_not_finite") == ["go_on", "go_on", "rewind"]
    assert guard.state.streak_start == 8
    assert guard.state.skipped == 5


def test_overflows_of_fp16_are_counted_and_leave_a_streak_as_it_is() -> None:
    guard = make_guard(max_skipped=2)
    assert skip(guard, range(1, 51), "fp16_overflow") == ["go_on"] * 50
    assert guard.state == GuardState(skipped=50)
    assert guard.skipped(51, "loss_not_finite") == "go_on"
    assert guard.skipped(52, "fp16_overflow") == "go_on"
    assert guard.skipped(53, "loss_not_finite") == "rewind"
    assert guard.state.streak_start == 51


def test_a_loss_that_is_not_finite_never_joins_the_mean() -> None:
    with pytest.raises(AssertionError):
        make_guard().trained(math.nan)


def decide(guard: Guard, step: int, loss: float, update: str) -> tuple[Reason | None, Action]:
    """One step as the loop takes it; a rewind goes back to a state of its own making."""
    reason = guard.judge_loss(loss) or guard.judge_update(
        finite_norm=update == "fine", overflow=update == "overflow"
    )
    if reason is None:
        guard.trained(loss)
        return None, "go_on"
    action = guard.skipped(step, reason)
    if action == "rewind":
        guard.rewound(GuardState(mean=7.3, updates=500), step - 1)
    return reason, action


@settings(deadline=None)
@given(
    curves(),
    st.integers(0, 2**32),
    st.floats(0.0, 0.9),
    st.data(),
)
def test_a_resumed_run_decides_as_an_undisturbed_one(
    losses: list[float], seed: int, trouble: float, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    steps = []
    for loss in losses:
        kind = rng.choice(["nan", "leap", "overflow", "gradient"]) if rng.random() < trouble else ""
        value = {"nan": math.nan, "leap": loss + rng.uniform(2.0, 4.0)}.get(kind, loss)
        steps.append((value, kind if kind in {"overflow", "gradient"} else "fine"))
    policy: dict[str, Any] = {"max_skipped": 3, "max_rewinds": 5}
    undisturbed, resumed = make_guard(**policy), make_guard(**policy)
    stops = data.draw(st.sets(st.integers(0, len(steps) - 1), max_size=5))
    for index, (loss, update) in enumerate(steps):
        if index in stops:
            text = json.dumps(resumed.state.to_json(), allow_nan=False)
            resumed = make_guard(GuardState.from_json(json.loads(text)), **policy)
            assert resumed.state == undisturbed.state
        expected = decide(undisturbed, index + 1, loss, update)
        assert decide(resumed, index + 1, loss, update) == expected

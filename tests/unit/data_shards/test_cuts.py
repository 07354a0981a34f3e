"""The close cut against a plain search over the same places, and what it is worth."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_shards.cuts import FEWEST_PAIRS, MOST_PAIRS, cut_closely, cut_simply, is_worth_it
from data_shards.plan import Plan

Lengths = list[tuple[int, int]]


def in_order(pairs: Lengths) -> Lengths:
    """As the plan sorts a window."""

    def key(pair: tuple[int, int]) -> tuple[int, int]:
        longer, difference = max(pair), pair[0] - pair[1]
        return -longer, difference if longer % 2 == 0 else -difference

    return sorted(pairs, key=key)


def oracle_places(pairs: Lengths, budget: int) -> list[int]:
    """The places for cuts, one pair after another, straight from the description."""
    even: list[int] = []
    band = 0
    for i, pair in enumerate(pairs):
        if i == 0 or max(pair) != max(pairs[i - 1]):
            band = i
        full = budget // max(pair)
        # The k-th place of a band is floor(k * full / 16) pairs behind its first.
        if any(k * full // 16 == i - band for k in {(i - band) * 16 // full + j for j in (0, 1)}):
            even.append(i)
    places = set(even) | {len(pairs)}
    for begin, end in zip(even, [*even[1:], len(pairs)], strict=True):
        changes = [i for i in range(begin + 1, end) if pairs[i] != pairs[i - 1]]
        places |= set(changes[:1])
    return sorted(places)


def oracle_cost(pairs: Lengths, begin: int, end: int, budget: int) -> Fraction | None:
    """What one batch costs; None if it does not fit."""
    batch = pairs[begin:end]
    source, target = (max(pair[side] for pair in batch) for side in (0, 1))
    if len(batch) * max(source, target) > budget:
        return None
    begins_a_run = begin == 0 or pairs[begin] != pairs[begin - 1]
    ends_a_run = end == len(pairs) or pairs[end] != pairs[end - 1]
    extra = budget // 2 * (1 + (begins_a_run and ends_a_run))
    return Fraction(len(batch) * (source + target) + extra)


def oracle_cut(pairs: Lengths, budget: int) -> list[int]:
    places = oracle_places(pairs, budget)
    best: list[tuple[Fraction, list[int]]] = [(Fraction(0), [])]
    for j, end in enumerate(places[1:], 1):
        choices = []
        for i in range(j):
            cost = oracle_cost(pairs, places[i], end, budget)
            if cost is not None:
                choices.append((best[i][0] + cost, i))
        cost, i = min(choices)
        best.append((cost, [*best[i][1], places[i]]))
    return best[-1][1]


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Lengths], int]:
    longest = draw(st.integers(1, 9))
    length = st.integers(1, longest)
    pair = st.tuples(length, length)
    cases = draw(st.lists(st.lists(pair, min_size=1, max_size=60), min_size=1, max_size=3))
    return [in_order(pairs) for pairs in cases], draw(st.integers(longest, 40 * longest))


def arrays(pairs: Lengths) -> tuple[Any, Any]:
    source, target = np.array(pairs, dtype=np.int32).T
    return source, target


@settings(max_examples=60, deadline=None)
@given(windows())
def test_equals_the_plain_search_whatever_windows_are_cut_beside(
    case: tuple[list[Lengths], int],
) -> None:
    cases, budget = case
    together = cut_closely([arrays(pairs) for pairs in cases], budget)
    for pairs, starts in zip(cases, together, strict=True):
        assert starts.tolist() == oracle_cut(pairs, budget)


def multi30k_like(num: int) -> NDArray[np.uint16]:
    generator = np.random.default_rng(0)
    source = np.round(generator.gamma(9.0, 15.3 / 9.0, num))
    target = np.round(source + generator.normal(0.5, 2.7, num))
    return np.clip(np.stack([source, target], axis=1), 3, 60).astype(np.uint16)


def made_up_lengths(num: int) -> NDArray[np.uint16]:
    """As WMT14's are taken to be where it is not prepared (``trainer.paper.lengths``)."""
    generator = np.random.default_rng(0)
    source: NDArray[np.float64] = 24.5 * generator.lognormal(0.0, 0.62, num)
    target = source * generator.lognormal(0.0, 0.2, num)
    return np.clip(np.round(np.stack([source, target], axis=1)), 2, 256).astype(np.uint16)


def plan_of(lengths: NDArray[np.uint16], lanes: int, tokens_per_lane: int) -> Plan:
    return Plan(
        lengths,
        np.full(len(lengths) // 128, 128),
        lanes=lanes,
        tokens_per_step=lanes * tokens_per_lane,
        window_pairs=65_536,
        seed=1,
    )


def padded(plan: Plan) -> tuple[float, float]:
    """Real tokens as part of all, and how full batches are, of the longer side."""
    real = computed = longer = batches = 0
    for step in plan.steps(0, plan.steps_per_epoch):
        for batch in step:
            num = len(batch.rows)
            real += batch.num_source_tokens + batch.num_target_tokens
            computed += num * (batch.source_length + batch.target_length)
            longer += num * max(batch.source_length, batch.target_length)
            batches += 1
    return real / computed, longer / (batches * plan.tokens_per_batch)


@pytest.mark.parametrize(
    ("lengths", "lanes", "tokens_per_lane"),
    [
        pytest.param(multi30k_like(28_928), 2, 2048, id="multi30k"),
        # Of 36 million pairs a lane has 70 windows of nearly the most pairs, of these one.
        pytest.param(made_up_lengths(127_232), 2, 3125, id="wmt14, 8 lanes of 3,125"),
        pytest.param(made_up_lengths(127_232), 2, 781, id="wmt14, 512 lanes of 781"),
    ],
)
def test_at_most_three_percent_padding_in_full_batches(
    lengths: NDArray[np.uint16], lanes: int, tokens_per_lane: int
) -> None:
    unpadded, full = padded(plan_of(lengths, lanes, tokens_per_lane))
    assert unpadded >= 0.97
    assert full >= 0.95  # of the longer side; 781 tokens are few pairs, of which no half fits


def test_the_close_cut_pads_less_and_few_batches_meet_again() -> None:
    lengths = multi30k_like(28_928)
    source, target = arrays(in_order([tuple(pair) for pair in lengths[:14_464].tolist()]))
    simple = cut_simply(np.maximum(source, target), 2048)
    assert is_worth_it(source, target, simple)
    [close] = cut_closely([(source, target)], 2048)

    def computed(starts: Any) -> int:
        widths = np.maximum.reduceat(source, starts) + np.maximum.reduceat(target, starts)
        return int((np.diff(starts, append=len(source)) * widths).sum())

    assert computed(close) < 0.997 * computed(simple)
    assert len(close) <= 1.02 * len(simple)
    plan = plan_of(lengths, 2, 2048)
    company = []
    for epoch in range(2):
        start = epoch * plan.steps_per_epoch
        steps = plan.steps(start, start + plan.steps_per_epoch)
        company.append({frozenset(batch.pair_ids.tolist()) for step in steps for batch in step})
    assert len(company[0] & company[1]) < 0.1 * len(company[0])


def test_very_small_windows_and_large_ones_are_cut_simply() -> None:
    few = [(9 - i % 3, 1 + i % 7) for i in range(FEWEST_PAIRS - 1)]
    source, target = arrays(in_order(few))
    starts = cut_simply(np.maximum(source, target), 300)
    assert not is_worth_it(source, target, starts)
    more = in_order([*few, (9, 1)])
    source, target = arrays(more)
    assert is_worth_it(source, target, cut_simply(np.maximum(source, target), 300))
    many = MOST_PAIRS // len(more) + 1
    every = 1000  # pairs a batch: of many lengths
    source, target = arrays(in_order(more * many))
    assert not is_worth_it(source, target, np.arange(0, len(source), every))
    source, target = arrays(in_order(more * (many - 1)))
    assert is_worth_it(source, target, np.arange(0, len(source), every))

"""The plan against a slow one that is obviously right, and its promises as properties."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.config import DataConfig
from data_shards.errors import DataError
from data_shards.plan import LaneBatch, Plan, data_hash, lanes_of_rank

MASK = (1 << 64) - 1


# The sequential oracle: plain Python, one pair at a time, straight from the plan's description.


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def draw(key: int, index: int) -> int:
    return mix((key + (index + 1) * 0x9E3779B97F4A7C15) & MASK)


def key_of(*numbers: int) -> int:
    key = len(numbers)
    for number in numbers:
        key = draw(key, number)
    return key


def shuffled(items: list[Any], *key: int) -> list[Any]:
    order = sorted(range(len(items)), key=lambda i: draw(key_of(*key), i))
    return [items[i] for i in order]


def oracle_windows(case: Case) -> list[list[list[int]]]:
    """Pair ids of each window of each lane, in order of position."""
    blocks, first = [], 0
    for size in case.sizes:
        blocks.append(list(range(first, first + size)))
        first += size
    sequence = [pair for block in shuffled(blocks, case.seed, 1) for pair in block]
    total = sum(max(case.lengths[pair]) for pair in sequence)
    lanes: list[list[int]] = [[] for _ in range(case.lanes)]
    before = 0
    for pair in sequence:
        # A pair belongs to the last lane whose share has begun by where the pair ends.
        before += max(case.lengths[pair])
        lane = max(i for i in range(case.lanes) if i == 0 or before > total * i // case.lanes)
        lanes[lane].append(pair)
    result = []
    for pairs in lanes:
        num = (len(pairs) + case.window_pairs - 1) // case.window_pairs
        cuts = [len(pairs) * i // num for i in range(num)] + [len(pairs)] if num else []
        result.append([pairs[a:b] for a, b in pairwise(cuts)])
    return result


def oracle_batches(case: Case, window: list[int], epoch: int) -> list[list[int]]:
    """The batches of a window in an epoch, in sorted order."""

    def order(pair: int) -> tuple[int, int, int]:
        source, target = case.lengths[pair]
        longer, difference = max(source, target), source - target
        tie = draw(key_of(case.seed, 2, epoch), pair) >> 34
        return -longer, difference if longer % 2 == 0 else -difference, tie

    budget = case.tokens_per_step // case.lanes
    batches: list[list[int]] = []
    for pair in sorted(window, key=order):
        if batches and (len(batches[-1]) + 1) * max(case.lengths[batches[-1][0]]) <= budget:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    if len(batches) > 1 and len(batches[-1]) < len(batches[-2]):
        rest = batches[-2] + batches[-1]
        half = (len(rest) + 1) // 2
        batches[-2:] = [rest[:half], rest[half:]]
    return batches


def oracle_epoch(case: Case, epoch: int) -> list[dict[int, list[int]]]:
    """For each step of an epoch: the pairs of each lane that is not empty, in order."""
    lanes, number = [], 0
    for lane, windows in enumerate(oracle_windows(case)):
        numbered = [(number + i, window) for i, window in enumerate(windows)]
        number += len(windows)
        batches: list[list[int]] = []
        for index, window in shuffled(numbered, case.seed, 3, epoch, lane):
            batches += shuffled(oracle_batches(case, window, epoch), case.seed, 4, epoch, index)
        lanes.append(batches)
    num_steps = max(len(batches) for batches in lanes)
    steps: list[dict[int, list[int]]] = [{} for _ in range(num_steps)]
    for lane, batches in enumerate(lanes):
        offset = key_of(case.seed, 5, epoch, lane) % num_steps
        for i, batch in enumerate(batches):
            steps[(i * num_steps + offset) // len(batches)][lane] = batch
    return steps


# Random corpora.


@dataclass(frozen=True)
class Case:
    lengths: list[tuple[int, int]]
    sizes: list[int]
    lanes: int
    tokens_per_step: int
    window_pairs: int
    seed: int

    def plan(self) -> Plan:
        return Plan(
            np.array(self.lengths, dtype=np.uint16),
            self.sizes,
            lanes=self.lanes,
            tokens_per_step=self.tokens_per_step,
            window_pairs=self.window_pairs,
            seed=self.seed,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    longest = draw(st.integers(1, 12))
    length = st.integers(1, longest)
    num = sum(sizes)
    lengths = draw(st.lists(st.tuples(length, length), min_size=num, max_size=num))
    lanes = draw(st.integers(1, 6))
    budget = draw(st.integers(longest, 6 * longest))
    return Case(
        lengths=lengths,
        sizes=sizes,
        lanes=lanes,
        tokens_per_step=budget * lanes + draw(st.integers(0, lanes - 1)),
        window_pairs=draw(st.integers(1, 2 * num)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def ids_of(batches: list[LaneBatch]) -> dict[int, list[int]]:
    return {batch.lane: batch.pair_ids.tolist() for batch in batches}


def multi30k_like(num: int = 29_000, seed: int = 0) -> np.ndarray[Any, Any]:
    """Lengths distributed as Multi30k's are, in pieces of an 8k vocabulary."""
    generator = np.random.default_rng(seed)
    source = np.round(generator.gamma(9.0, 15.3 / 9.0, num))
    target = np.round(source + generator.normal(0.5, 2.7, num))
    return np.clip(np.stack([source, target], axis=1), 3, 60).astype(np.uint16)


def plan_of_lengths(lengths: np.ndarray[Any, Any], **changes: Any) -> Plan:
    values = {"lanes": 4, "tokens_per_step": 4096, "window_pairs": 65_536, "seed": 1} | changes
    sizes = [1024] * (len(lengths) // 1024) + [len(lengths) % 1024 or 1024][: len(lengths) % 1024]
    return Plan(lengths, sizes, **values)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 5))
def test_equals_the_sequential_order(case: Case, epoch: int) -> None:
    plan, expected = case.plan(), oracle_epoch(case, epoch)
    assert plan.steps_per_epoch == len(expected)
    start = epoch * plan.steps_per_epoch
    assert [ids_of(step) for step in plan.steps(start, start + len(expected))] == expected


@settings(max_examples=40, deadline=None)
@given(cases(), st.data())
def test_every_pair_exactly_once_an_epoch_under_any_stops_and_sizes(
    case: Case, data: st.DataObject
) -> None:
    num_steps = case.plan().steps_per_epoch
    seen: Counter[int] = Counter()
    step, rolling = 0, 0
    while step < 2 * num_steps:
        # Each life of the run: another process (a fresh plan), another number of ranks.
        plan = case.plan()
        world_size = data.draw(st.integers(1, case.lanes))
        stop = data.draw(st.integers(step + 1, 2 * num_steps))
        for rank in range(world_size):
            lanes = lanes_of_rank(rank, world_size, case.lanes)
            for batches in plan.steps(step, stop, lanes):
                for batch in batches:
                    seen.update(batch.pair_ids.tolist())
                    rolling += data_hash(batch.step, batch.lane, batch.pair_ids)
        step = stop
        if step >= num_steps:
            assert plan.steps_per_epoch == num_steps
    assert seen == dict.fromkeys(range(len(case.lengths)), 2)
    plan = case.plan()
    assert rolling & MASK == sum(plan.data_hash(step) for step in range(2 * num_steps)) & MASK


@settings(max_examples=40, deadline=None)
@given(cases())
def test_no_batch_is_over_budget_and_what_it_announces_is_true(case: Case) -> None:
    plan = case.plan()
    lengths = np.array(case.lengths)
    for step in range(plan.steps_per_epoch):
        batches = plan.step(step)
        assert batches, "a step without any pair"
        for batch in batches:
            source, target = lengths[batch.pair_ids].T
            num = len(batch.pair_ids)
            assert (batch.source_length, batch.target_length) == (source.max(), target.max())
            assert batch.num_source_tokens == source.sum()
            assert batch.num_target_tokens == target.sum()
            assert num * batch.source_length <= case.tokens_per_step // case.lanes
            assert num * batch.target_length <= case.tokens_per_step // case.lanes
        assert plan.num_pairs(step) == sum(len(batch.pair_ids) for batch in batches)
        assert plan.source_tokens(step) == sum(batch.num_source_tokens for batch in batches)
        assert plan.target_tokens(step) == sum(batch.num_target_tokens for batch in batches)
        filled = [lane for lane in range(case.lanes) if plan.has_batch(step, lane)]
        assert filled == [batch.lane for batch in batches]


@settings(max_examples=30, deadline=None)
@given(cases(), st.data())
def test_seeking_equals_going_through(case: Case, data: st.DataObject) -> None:
    plan = case.plan()
    wanted = data.draw(
        st.lists(st.integers(0, 4 * plan.steps_per_epoch - 1), min_size=1, max_size=6)
    )
    sequence = [ids_of(step) for step in plan.steps(0, max(wanted) + 1)]
    jumping = case.plan()
    assert [ids_of(jumping.step(step)) for step in wanted] == [sequence[step] for step in wanted]


@settings(max_examples=30, deadline=None)
@given(cases())
def test_segments_and_rows_lead_to_the_same_pairs(case: Case) -> None:
    plan = case.plan()
    first_pairs = np.cumsum([0, *case.sizes])
    for batches in plan.steps(0, plan.steps_per_epoch):
        for batch in batches:
            segments = plan.segments(batch.window)
            window = np.concatenate(
                [first_pairs[s.block] + s.first + np.arange(s.num) for s in segments]
            )
            assert all(s.first + s.num <= case.sizes[s.block] for s in segments)
            assert window[batch.rows].tolist() == batch.pair_ids.tolist()


def test_shapes_are_the_same_in_every_epoch_but_order_and_company_are_not() -> None:
    plan = plan_of_lengths(multi30k_like(4096), lanes=2, tokens_per_step=1024)
    epochs = []
    for epoch in range(3):
        start = epoch * plan.steps_per_epoch
        epochs.append(
            [batch for step in plan.steps(start, start + plan.steps_per_epoch) for batch in step]
        )
    shapes = [
        Counter((len(b.pair_ids), b.source_length, b.target_length) for b in e) for e in epochs
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    order = [[(len(b.pair_ids), b.source_length, b.num_target_tokens) for b in e] for e in epochs]
    assert order[0] != order[1] != order[2] != order[0]
    company = [{frozenset(b.pair_ids.tolist()) for b in epoch} for epoch in epochs]
    assert len(company[0] & company[1]) < 0.2 * len(company[0])


def test_lanes_and_steps_are_balanced() -> None:
    # Lengths that drift along the corpus, as where a corpus is several joined.
    lengths = multi30k_like()
    lengths[: len(lengths) // 2] += 10
    plan = plan_of_lengths(lengths, lanes=8)
    filled = sum(
        plan.has_batch(step, lane) for step in range(plan.steps_per_epoch) for lane in range(8)
    )
    assert filled == plan.num_batches
    assert filled >= 0.97 * 8 * plan.steps_per_epoch
    tokens = [plan.target_tokens(step) for step in range(plan.steps_per_epoch)]
    assert min(tokens) > 0.6 * np.mean(tokens)


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_little_padding(lanes: int) -> None:
    plan = plan_of_lengths(multi30k_like(), lanes=lanes)
    assert sum(plan.padding_efficiency()) / 2 >= 0.95


def test_steps_are_looked_up_not_replayed() -> None:
    plan = plan_of_lengths(multi30k_like(4096))
    step = 10**15
    epoch, step_in_epoch = plan.locate(step)
    assert epoch * plan.steps_per_epoch + step_in_epoch == step
    assert plan.target_tokens(step) == sum(batch.num_target_tokens for batch in plan.step(step))


def test_fewer_pairs_than_lanes_leaves_lanes_empty() -> None:
    plan = Plan(
        np.array([[3, 4], [5, 2]]), [2], lanes=5, tokens_per_step=25, window_pairs=9, seed=3
    )
    assert plan.steps_per_epoch == 1
    batches = plan.step(0)
    assert sorted(pair for batch in batches for pair in batch.pair_ids) == [0, 1]
    empty = set(range(5)) - {batch.lane for batch in batches}
    assert all(plan.batch(0, lane) is None for lane in empty)
    assert not any(plan.has_batch(0, lane) for lane in empty)


def test_longest_lengths_that_are_stored() -> None:
    lengths = np.array([[65_535, 1], [1, 65_535], [65_535, 65_535], [1, 1]], dtype=np.uint16)
    plan = Plan(lengths, [4], lanes=1, tokens_per_step=65_535, window_pairs=4, seed=0)
    pairs = [pair for step in plan.steps(0, 4) for batch in step for pair in batch.pair_ids]
    assert sorted(pairs) == [0, 1, 2, 3]
    assert sum(plan.source_tokens(step) for step in range(4)) == int(lengths[:, 0].sum(dtype=int))


def test_a_pair_over_the_budget_is_named_with_the_mend() -> None:
    lengths = np.array([[3, 4], [5, 90]], dtype=np.uint16)
    with pytest.raises(DataError, match=r"pair 1 has 90 pieces.*at least 360"):
        Plan(lengths, [2], lanes=4, tokens_per_step=300, window_pairs=9, seed=3)


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(DataError, match="no sentence pair"):
        Plan(np.zeros((0, 2), np.uint16), [], lanes=4, tokens_per_step=99, window_pairs=9, seed=3)


def test_of_takes_the_configuration() -> None:
    lengths = multi30k_like(2048)
    blocks = np.array([(1024,), (1024,)], dtype=[("num_pairs", "<u4")])
    manifest: Any = SimpleNamespace(lengths=lengths, blocks=blocks)
    config = DataConfig(lanes=2, tokens_per_step=1024, window_pairs=700)
    expected = plan_of_lengths(lengths, lanes=2, tokens_per_step=1024, window_pairs=700, seed=5)
    plan = Plan.of(manifest, config, 5)
    assert plan.digest == expected.digest
    assert ids_of(plan.step(7)) == ids_of(expected.step(7))


def test_digest_tells_plans_apart() -> None:
    lengths = multi30k_like(2048)
    altered = lengths.copy()
    altered[5, 1] += 1
    others = [
        plan_of_lengths(lengths, seed=2),
        plan_of_lengths(lengths, lanes=8),
        plan_of_lengths(lengths, tokens_per_step=4095),
        plan_of_lengths(lengths, window_pairs=1024),
        plan_of_lengths(altered),
        Plan(lengths, [2048], lanes=4, tokens_per_step=4096, window_pairs=65_536, seed=1),
    ]
    digests = [plan_of_lengths(lengths).digest, *(plan.digest for plan in others)]
    assert len(set(digests)) == len(digests)
    assert plan_of_lengths(lengths).digest == digests[0]


def test_needs_no_torch() -> None:
    code = "import sys, data_shards.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The rolling hash and the ranks' lanes.


@given(st.lists(st.integers(0, 2**40), max_size=20), st.integers(0, 2**40), st.integers(0, 4095))
def test_hash_equals_the_sequential_sum(ids: list[int], step: int, lane: int) -> None:
    expected = sum(draw(key_of(6, step, lane), pair) for pair in ids) & MASK
    assert data_hash(step, lane, np.array(ids, dtype=np.int64)) == expected
    assert data_hash(step, lane, np.array(ids[::-1], dtype=np.int64)) == expected


def test_hash_tells_pairs_steps_and_lanes_apart() -> None:
    ids = np.arange(10)
    hashes = {
        data_hash(step, lane, ids + k) for step in range(5) for lane in range(5) for k in (0, 1)
    }
    assert len(hashes) == 50
    # A pair that moves to another lane, or is seen twice instead of another, is noticed.
    assert data_hash(0, 0, np.array([1, 2])) + data_hash(0, 1, np.array([3])) != data_hash(
        0, 0, np.array([1])
    ) + data_hash(0, 1, np.array([2, 3]))
    assert data_hash(0, 0, np.array([1, 1])) != data_hash(0, 0, np.array([1, 2]))


@given(st.integers(1, 64), st.integers(1, 64))
def test_ranks_share_out_the_lanes(world_size: int, lanes: int) -> None:
    shares = [list(lanes_of_rank(rank, world_size, lanes)) for rank in range(world_size)]
    assert sorted(lane for share in shares for lane in share) == list(range(lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0][0] == 0

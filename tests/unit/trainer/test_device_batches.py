"""Steps made ready ahead of their use, on a CPU: what a GPU adds is in tests/gpu."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from data_shards.errors import DataError
from data_shards.stream import Batch, StepBatches
from trainer.device_batches import DeviceBatches, Packer

_CPU = torch.device("cpu")


def batch(lane: int, *lengths: tuple[int, int]) -> Batch:
    source, target = (
        torch.zeros((len(lengths), max(pair[side] for pair in lengths)), dtype=torch.int64)
        for side in (0, 1)
    )
    for row, (s, t) in enumerate(lengths):
        source[row, :s], target[row, :t] = 4 + lane, 5 + lane
    return Batch(source, target, target, lane, len(lengths), 0, 0, (0, 0, 0), lane)


def steps(num: int | None = None) -> Iterator[StepBatches]:
    for step in itertools.count() if num is None else range(num):
        yield StepBatches(step, [batch(lane, (lane + 1, 3), (2, 1)) for lane in range(3)])


def test_steps_come_whole_and_in_order() -> None:
    with DeviceBatches(steps(4), Packer(None), _CPU) as ready:
        taken = list(ready)
    assert [step.step for step in taken] == [0, 1, 2, 3]
    assert [one.lanes for one in taken[0].passes] == [(0,), (1,), (2,)]
    first = taken[2].passes[1]
    assert first.packing is None
    assert first.ids[0].tolist() == [[5, 5], [5, 5]]
    assert first.computed_tokens == 4 + 6


def test_lanes_are_packed_together() -> None:
    packer = Packer(2)
    assert [packer.num_passes(num) for num in (0, 1, 2, 3)] == [0, 1, 1, 2]
    with DeviceBatches(steps(), packer, _CPU) as ready:
        one, other = next(ready).passes
    assert (one.lanes, other.lanes) == ((0, 1), (2,))
    assert one.ids[0].tolist() == [4, 4, 4, 5, 5, 5, 5]
    assert one.lane_tokens == ((3, 4), (4, 4))
    assert one.packing is not None
    assert one.packing.source.starts_B.tolist() == [0, 1, 3, 5, 7]
    assert other.computed_tokens == 5 + 4


def test_an_error_comes_in_its_place() -> None:
    def spoilt() -> Iterator[StepBatches]:
        yield from steps(2)
        raise DataError("block 7 is torn")

    with DeviceBatches(spoilt(), Packer(1), _CPU) as ready:
        assert [next(ready).step, next(ready).step] == [0, 1]
        for _ in range(2):
            with pytest.raises(DataError, match="torn"):
                next(ready)


def test_closing_ends_the_thread_whatever_it_waits_for() -> None:
    ready = DeviceBatches(steps(), Packer(1), _CPU)
    next(ready)
    ready.close()
    ready.close()
    assert not any(t.name == "babelray-device-batches" for t in threading.enumerate())
    with pytest.raises(StopIteration):
        next(ready)


def test_a_few_steps_are_ready_and_no_more() -> None:
    taken = 0

    def counted() -> Iterator[StepBatches]:
        nonlocal taken
        for step in steps():
            taken += 1
            yield step

    with DeviceBatches(counted(), Packer(1), _CPU) as ready:
        next(ready)
        deadline = time.monotonic() + 5
        while taken < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert taken == 4  # one given, two ready, one that waits for room

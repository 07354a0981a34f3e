"""What ranks tell each other of a step, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_shards.stream import Batch
from model.config import ModelConfig
from model.cost import batch_flops
from trainer.energy import EnergyMeter
from trainer.measures import Measured, Measures
from trainer.phases import PHASES, Phase

_MODEL = ModelConfig(preset="tiny")
_CPU = torch.device("cpu")


def batch(source_lengths: list[int], target_lengths: list[int]) -> Batch:
    pairs = list(zip(source_lengths, target_lengths, strict=True))
    shape = len(pairs), max(source_lengths)
    target = torch.zeros(len(pairs), max(target_lengths), dtype=torch.int64)
    return Batch(
        source_BS=torch.zeros(shape, dtype=torch.int64),
        target_in_BT=target,
        target_out_BT=target,
        lane=0,
        num_pairs=len(pairs),
        num_source_tokens=sum(source_lengths),
        num_target_tokens=sum(target_lengths),
        length_products=(
            sum(s * s for s, _ in pairs),
            sum(s * t for s, t in pairs),
            sum(t * t for _, t in pairs),
        ),
        data_hash=0,
    )


def measures(rank: int, world_size: int, tmp_path: Path, *, stragglers: bool = True) -> Measures:
    return Measures(
        _MODEL,
        vocab_size=1000,
        rank=rank,
        world_size=world_size,
        energy=EnergyMeter(_CPU, local_rank=rank, powercap=tmp_path),
        energy_every=2,
        stragglers=stragglers,
    )


def summed(*parts: list[float]) -> list[float]:
    return [sum(column) for column in zip(*parts, strict=True)]


def phases(**seconds: float) -> dict[Phase, float]:
    return {phase: seconds.get(phase, 0.0) for phase in PHASES}


def test_flops_and_padding_are_those_of_all_ranks(tmp_path: Path) -> None:
    zero, one = (measures(rank, 2, tmp_path) for rank in range(2))
    mine, yours = batch([3, 5], [4, 2]), batch([7], [9])
    parts = zero.pack(0, [mine], None), one.pack(0, [yours], None)
    assert len(parts[0]) == zero.size
    found = zero.unpack(summed(*parts))
    lengths = [3, 5, 7], [4, 2, 9]
    assert found.flops == pytest.approx(3 * batch_flops(_MODEL, 1000, *lengths))
    assert found.computed_tokens == 2 * 5 + 2 * 4 + 7 + 9
    assert found.joules == {}


def test_the_slowest_rank_is_the_one_that_needs_most_for_a_token(tmp_path: Path) -> None:
    ranks = [measures(rank, 3, tmp_path) for rank in range(3)]
    work = [[batch([5], [5])], [batch([5], [5])], [batch([5], [5]), batch([5], [5])]]
    for rank, batches in zip(ranks, work, strict=True):
        rank.pack(0, batches, None)
    # Rank 2 works longest, on twice as much; rank 1 needs most for what it has. Time spent waiting
    # for others is nobody's fault.
    laps = [phases(forward=1, communication=9), phases(backward=1.5), phases(forward=1, backward=1)]
    parts = [
        rank.pack(1, batches, lap) for rank, batches, lap in zip(ranks, work, laps, strict=True)
    ]
    found = ranks[0].unpack(summed(*parts))
    assert found.busy_s == [1, 1.5, 2]
    assert found.tokens == [10, 10, 20]
    assert found.skew() == (1, pytest.approx(1.5))


def test_looking_for_stragglers_can_be_left(tmp_path: Path) -> None:
    alone = measures(0, 64, tmp_path, stragglers=False)
    numbers = alone.pack(0, [batch([5], [5])], None)
    assert len(numbers) == alone.size == 6
    assert alone.unpack(numbers).skew() is None


def test_a_rank_alone_or_without_work_is_no_straggler() -> None:
    assert Measured(busy_s=[1.0], tokens=[5.0]).skew() is None
    assert Measured(busy_s=[1.0, 0.0], tokens=[5.0, 0.0]).skew() is None


def test_steps_add_up() -> None:
    total = Measured()
    total += Measured(1.0, 2.0, {"gpu": 3.0}, [1.0, 2.0], [3.0, 4.0])
    total += Measured(1.0, 2.0, {"gpu": 3.0}, [1.0, 2.0], [3.0, 4.0])
    assert total == Measured(2.0, 4.0, {"gpu": 6.0}, [2.0, 4.0], [6.0, 8.0])


def test_energy_is_told_by_those_who_know_it(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    part = tmp_path / "intel-rapl:0:0"
    for folder, joules in ((package, 100), (part, 7)):
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{joules * 1_000_000}\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
    zero, one = (measures(rank, 2, tmp_path) for rank in range(2))
    (package / "energy_uj").write_text("160000000\n")
    work = [batch([5], [5])]
    between = zero.unpack(summed(zero.pack(1, work, None), one.pack(1, work, None)))
    assert between.joules == {}  # read at every second step only
    found = zero.unpack(summed(zero.pack(2, work, None), one.pack(2, work, None)))
    assert found.joules == {"cpu_package": 60.0}
    (package / "energy_uj").write_text("10000000\n")  # past its range, from the beginning
    again = zero.unpack(summed(zero.pack(4, work, None), one.pack(4, work, None)))
    assert again.joules == {"cpu_package": 850.0}

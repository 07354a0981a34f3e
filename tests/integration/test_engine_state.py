"""The engine's state on real ranks: whole at every stage and size, untouched by skipped steps."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.engine_ranks import (
    CLIP_NORM,
    EMA_DECAY,
    KINDS,
    LEARNING_RATE,
    accumulate,
    assert_unchanged,
    equal,
    make_engine,
    probe,
    restore,
    run_tasks,
    snapshot,
    train,
    whole_state,
)
from trainer.engine import StepResult
from trainer.parts import EMA, MOMENTS, WEIGHT

pytestmark = pytest.mark.timeout(300)

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")


def state_file(folder: Path, world_size: int, stage: int, precision: str) -> Path:
    return folder / f"{world_size}-{stage}-{precision}.pt"


def skip_and_rewind(
    rank: int, world_size: int, stage: int, precision: str, folder: Path
) -> list[StepResult]:
    """Six undisturbed steps; the last three again from the third's state, with steps skipped."""
    engine = make_engine(world_size, stage, precision)
    fresh = whole_state(engine, rank, world_size)
    assert not any(fresh[kind][name].any() for kind in MOMENTS for name in fresh[kind])
    assert all(torch.equal(fresh[EMA][name], fresh[WEIGHT][name]) for name in fresh[WEIGHT])
    assert engine.scalars() == {"updates": 0, "ema_decay": EMA_DECAY}
    restore(engine, fresh, engine.scalars())
    results = train(engine, range(3), rank, world_size)
    middle, scalars, loss = whole_state(engine, rank, world_size), engine.scalars(), probe(engine)
    assert scalars == {"updates": 3, "ema_decay": EMA_DECAY}
    assert not equal(fresh, middle)
    results += train(engine, range(3, 6), rank, world_size)
    end = whole_state(engine, rank, world_size)
    end_loss = probe(engine)
    assert end_loss < loss

    restore(engine, middle, scalars)
    assert equal(whole_state(engine, rank, world_size), middle)
    assert probe(engine) == loss
    before = snapshot(engine)
    accumulate(engine, 3, rank, world_size)
    vetoed = engine.step(LEARNING_RATE, veto=True)
    assert vetoed == StepResult(results[3].grad_norm, applied=False, overflow=False)
    assert_unchanged(engine, before)
    assert engine.scalars() == scalars
    assert probe(engine) == loss
    assert train(engine, range(3, 4), rank, world_size) == results[3:4]

    before, loss = snapshot(engine), probe(engine)
    spoilt = math.nan if rank == world_size - 1 else 1.0
    accumulate(engine, 4, rank, world_size, factor=spoilt)
    broken = engine.step(LEARNING_RATE)
    assert not math.isfinite(broken.grad_norm)
    assert not broken.applied
    assert not broken.overflow
    assert_unchanged(engine, before)
    assert engine.scalars() == {"updates": 4, "ema_decay": EMA_DECAY}
    assert probe(engine) == loss
    assert train(engine, range(4, 6), rank, world_size) == results[4:]
    assert equal(whole_state(engine, rank, world_size), end)
    assert probe(engine) == end_loss

    restore(engine, middle, scalars)
    saved = {"middle": middle, "scalars": scalars, "end": end, "probe": probe(engine)}
    if rank == 0:
        torch.save(saved, state_file(folder, world_size, stage, precision))
    return results


def alone_and_deepspeeds_own(rank: int, world_size: int, precision: str) -> None:
    """One rank's update in one piece is DeepSpeed's: as it comes, clipped, vetoed, no number."""
    alone = make_engine(world_size, 1, precision)
    with mock.patch("trainer.engine._updates_alone", return_value=False):
        theirs = make_engine(world_size, 1, precision)
    assert alone._alone is not None
    assert theirs._alone is None
    clipped = []
    for step, factor in enumerate((1e-3, 50.0, 0.0, math.nan, 0.3)):
        results = []
        for engine in (alone, theirs):
            accumulate(engine, step, rank, world_size, factor=factor or 1.0)
            results.append(engine.step(LEARNING_RATE, veto=factor == 0))
        found, expected = results
        assert found.applied == expected.applied == (factor > 0)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5, nan_ok=True) or not (
            math.isfinite(found.grad_norm) or math.isfinite(expected.grad_norm)
        )
        clipped.append(found.grad_norm > CLIP_NORM)
        ours, others = (whole_state(engine, rank, world_size) for engine in (alone, theirs))
        torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-7)
        weights = [list(engine.module.parameters()) for engine in (alone, theirs)]
        torch.testing.assert_close(*weights, rtol=1e-2 if precision == "bf16" else 1e-5, atol=1e-6)
        assert alone.scalars() == theirs.scalars()
        # So that both have the same gradients next, where a weight was rounded the other way.
        restore(theirs, ours, alone.scalars())
    assert clipped[:2] == [False, True]


def carry_over(
    rank: int, world_size: int, stage: int, precision: str, file: Path, exact: bool
) -> None:
    """Three steps of a new engine from a state that another world size and stage wrote."""
    saved = torch.load(file)
    engine = make_engine(world_size, stage, precision)
    restore(engine, saved["middle"], saved["scalars"])
    assert equal(whole_state(engine, rank, world_size), saved["middle"])
    assert engine.scalars() == saved["scalars"]
    # Stage 3 has its own linear layer, which rounds to bf16 once more, before it adds the bias.
    assert probe(engine) == pytest.approx(saved["probe"], rel=1e-6 if precision == "fp32" else 3e-3)
    train(engine, range(3, 6), rank, world_size)
    end = whole_state(engine, rank, world_size)
    if exact:
        assert equal(end, saved["end"])
        return
    if precision == "fp32":
        torch.testing.assert_close(end, saved["end"], rtol=1e-5, atol=1e-6)
        return
    # bf16's gradients are rounded anew where they are summed in another order: here and there an
    # element goes another way, but the whole does not.
    for kind in KINDS:
        there, expected, before = (
            torch.cat(list(state[kind].values())) for state in (end, saved["end"], saved["middle"])
        )
        assert (there - expected).norm() < 0.05 * (expected - before).norm()


def moving_average(rank: int, world_size: int, stage: int, precision: str) -> None:
    """The average after each of five steps, computed anew from the weights after each."""
    engine = make_engine(world_size, stage, precision)
    expected = whole_state(engine, rank, world_size)[WEIGHT]
    for step in range(5):
        train(engine, range(step, step + 1), rank, world_size)
        if step == 2:  # a resume goes on with it
            restore(engine, whole_state(engine, rank, world_size), engine.scalars())
        state = whole_state(engine, rank, world_size)
        decay = min(EMA_DECAY, (2 + step) / (11 + step))
        for name, weight in state[WEIGHT].items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
        torch.testing.assert_close(state[EMA], expected)
        assert not torch.equal(state[EMA][name], state[WEIGHT][name])


def fp16_scale(rank: int, world_size: int, stage: int) -> list[StepResult]:
    """The dynamic loss scale, on a CPU, of which DeepSpeed must be told that it can do fp16."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        engine = make_engine(world_size, stage, "fp16")
    fresh, scalars = whole_state(engine, rank, world_size), engine.scalars()
    assert scalars["loss_scale"]["cur_scale"] == 2.0**14
    scalars["loss_scale"]["cur_scale"] = 2.0**10
    restore(engine, fresh, scalars)
    loss = probe(engine)
    results = train(engine, range(2), rank, world_size)
    assert results[0].grad_norm == pytest.approx(5.65, rel=0.02)  # unscaled, as in float32
    assert probe(engine) < 0.8 * loss
    middle, scalars = whole_state(engine, rank, world_size), engine.scalars()
    assert scalars["updates"] == scalars["loss_scale"]["cur_iter"] == 2

    def overflow(*, veto: bool = False) -> StepResult:
        before = snapshot(engine)
        accumulate(engine, 2, rank, world_size, factor=1e6 if rank == 0 else 1.0)
        result = engine.step(LEARNING_RATE, veto=veto)
        assert_unchanged(engine, before)
        assert not result.applied
        return result

    assert not overflow(veto=True).overflow
    assert engine.scalars() == scalars
    # ZeRO's scaler lets one overflow pass before it halves the scale.
    results += [overflow(), overflow()]
    assert results[-2].overflow
    assert results[-1].overflow
    assert engine.scalars()["loss_scale"]["cur_scale"] == (2.0**8 if stage == 0 else 2.0**9)
    assert engine.scalars()["updates"] == 2
    restore(engine, middle, scalars)
    assert engine.scalars() == scalars
    assert equal(whole_state(engine, rank, world_size), middle)
    results += train(engine, range(2, 4), rank, world_size)
    # At the smallest scale an overflow is the gradient's own fault, and still no exception.
    lowest = {"cur_scale": 0.25 if stage == 0 else 1.0, "cur_hysteresis": 1}
    restore(engine, middle, {"updates": 2, "loss_scale": scalars["loss_scale"] | lowest})
    last = overflow()
    assert not last.overflow
    assert not math.isfinite(last.grad_norm)
    return [*results, last]


def assert_alike(results_by_rank: list[list[StepResult]]) -> None:
    assert all(str(results) == str(results_by_rank[0]) for results in results_by_rank)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States after three and after six steps, for every stage, precision and world size."""
    folder = tmp_path_factory.mktemp("states")
    for world_size in (1, 2, 3):
        settings = [(stage, precision, folder) for stage in STAGES for precision in PRECISIONS]
        for results in run_tasks(world_size, folder, [(skip_and_rewind, s) for s in settings]):
            assert_alike(results)
    return folder


@pytest.mark.parametrize(
    ("before", "after", "stages_on"), [(2, 2, 0), (2, 1, 1), (1, 3, 2), (3, 2, 3)]
)
def test_a_state_goes_on_at_another_size_and_stage(
    written: Path, before: int, after: int, stages_on: int
) -> None:
    """From each stage to the one ``stages_on`` further (in a ring): all pairs, over the cases."""
    tasks = [
        (
            carry_over,
            (
                (stage + stages_on) % 4,
                precision,
                state_file(written, before, stage, precision),
                stages_on == 0,
            ),
        )
        for stage in STAGES
        for precision in PRECISIONS
    ]
    run_tasks(after, written, tasks)


def test_fp16_lowers_its_scale_and_remembers_it(tmp_path: Path) -> None:
    for results in run_tasks(2, tmp_path, [(fp16_scale, (stage,)) for stage in STAGES]):
        assert_alike(results)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_moving_average_is_that_of_the_weights(tmp_path: Path, world_size: int) -> None:
    settings = [(stage, precision) for stage in STAGES for precision in PRECISIONS]
    run_tasks(world_size, tmp_path, [(moving_average, one) for one in settings])


def test_one_rank_alone_updates_as_deepspeed_does(tmp_path: Path) -> None:
    tasks = [(alone_and_deepspeeds_own, (precision,)) for precision in PRECISIONS]
    run_tasks(1, tmp_path, tasks)

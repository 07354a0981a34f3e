"""Several ranks of the bare engine on a tiny module, joined by gloo: what tests/integration asks of
its state.

A task is a module-level function ``task(rank, world_size, *arguments)``; what it asserts, it
asserts on every rank, and what it returns comes back from every rank.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import TrainerConfig
from trainer.engine import Engine, StepResult

TIMEOUT_S = 200
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
EMA_DECAY = 0.3
VOCABULARY, WIDTH, ROWS, LENGTH = 13, 7, 6, 5
LEARNING_RATE = 0.01
CLIP_NORM = 0.5
State = dict[str, dict[str, Tensor]]  # kind, parameter: whole and flat


class Tiny(nn.Module):
    """A tied weight, sizes that nothing divides, and one matrix that stage 3 does not keep whole.

    (DeepSpeed keeps parameters of up to 100,000 elements gathered on every rank.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 331)
        self.wide = nn.Linear(331, 331)
        self.down = nn.Linear(331, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.out.weight = self.embedding.weight

    def forward(self, ids_BL: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        hidden = self.embedding(ids_BL)
        hidden = hidden + self.down(torch.relu(self.wide(torch.relu(self.up(hidden)))))
        logits = self.out(self.norm(hidden)) * self.scale
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids_BL.roll(1, 1).flatten()).mul(
            ids_BL.numel()
        )
        # The loss as float32, as the real model gives it; the factor spoils it where a test wants.
        return nll * factor, nll.detach()


def make_engine(world_size: int, stage: int, precision: str) -> Engine:
    """An engine on a fresh module, the same on all ranks.

    fp16 on a CPU works, slowly, and only tests want it: see ``fp16_scale``.
    """
    torch.manual_seed(1)
    config = TrainerConfig.model_validate(
        {
            "zero_stage": stage,
            "precision": precision,
            "weight_decay": 0.01,
            # Large: else elements whose gradient is nearly zero magnify rounding.
            "adam_epsilon": 1e-3,
            "clip_norm": CLIP_NORM,
            "ema_decay": EMA_DECAY,
        }
    )
    # Engine refuses fp16 where it is told "cpu"; DeepSpeed finds the device out by itself.
    device = torch.device("meta" if precision == "fp16" else "cpu")
    return Engine(Tiny(), config, world_size=world_size, device=device)


def accumulate(engine: Engine, step: int, rank: int, world_size: int, factor: float = 1.0) -> None:
    """Two micro-batches a rank of the step's global batch, which no rank's number changes."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (2 * ROWS, LENGTH), generator=generator)
    for micro_batch in ids.chunk(2):
        loss, _ = engine(micro_batch[rank::world_size], factor)
        engine.backward(loss, target_tokens=ids.numel())


def train(engine: Engine, steps: range, rank: int, world_size: int) -> list[StepResult]:
    """One update for each of the steps."""
    results = []
    for step in steps:
        accumulate(engine, step, rank, world_size)
        results.append(engine.step(LEARNING_RATE))
        assert results[-1].applied
        assert not results[-1].overflow
    return results


def probe(engine: Engine) -> float:
    """A loss on the module's weights as they are used: alike at every stage and world size."""
    ids = torch.arange(60).remainder(VOCABULARY).view(6, 10)
    with torch.no_grad():
        return float(engine(ids, 1.0)[0])


def snapshot(engine: Engine) -> list[tuple[str, int, dict[str, Tensor]]]:
    """This rank's fragments, copied."""
    return [
        (part.name, part.start, {kind: part.tensors[kind].clone() for kind in KINDS})
        for part in engine.fragments()
    ]


def assert_unchanged(engine: Engine, before: list[tuple[str, int, dict[str, Tensor]]]) -> None:
    """Bitwise, NaNs included."""
    for (name, start, tensors), now in zip(before, engine.fragments(), strict=True):
        assert (name, start) == (now.name, now.start)
        for kind in KINDS:
            assert torch.equal(tensors[kind].view(torch.int32), now.tensors[kind].view(torch.int32))


def whole_state(engine: Engine, rank: int, world_size: int) -> State:
    """All ranks' fragments put together, after a check that they cover everything exactly once."""
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, snapshot(engine))
    shapes = engine.shapes()
    assert list(shapes) == [name for name, _ in Tiny().named_parameters()]
    assert shapes == {name: tuple(p.shape) for name, p in Tiny().named_parameters()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    state = {kind: {n: torch.zeros(size) for n, size in sizes.items()} for kind in KINDS}
    covered = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    for name, start, tensors in (fragment for part in parts for fragment in part):
        length = tensors["weight"].numel()
        assert length > 0
        covered[name][start : start + length] += 1
        for kind in KINDS:
            assert tensors[kind].dtype == torch.float32
            assert tensors[kind].shape == (length,)
            state[kind][name][start : start + length] = tensors[kind]
    assert all(bool((times == 1).all()) for times in covered.values())
    return state


def restore(engine: Engine, state: State, scalars: dict[str, Any]) -> None:
    """Give the engine a whole state, piece by piece as it asks for it."""

    def read(kind: str, name: str, start: int, length: int) -> Tensor:
        return state[kind][name][start : start + length]

    engine.restore(read, scalars)


def equal(one: State, other: State) -> bool:
    """Bitwise."""
    return all(
        torch.equal(one[kind][name], other[kind][name]) for kind in KINDS for name in one[kind]
    )


def run_tasks(
    world_size: int, folder: Path, tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]]
) -> list[list[Any]]:
    """Run the tasks one after the other in one group; each one's results, by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    results: Any = context.Queue()
    store = folder / f"store-{world_size}-{len(list(folder.iterdir()))}"
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, store, tasks, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    gathered: list[dict[int, Any]] = [{} for _ in tasks]
    try:
        for _ in range(world_size * len(tasks)):
            index, rank, result = results.get(timeout=TIMEOUT_S)
            assert not isinstance(result, str), f"rank {rank} of {world_size}: {result}"
            gathered[index][rank] = result
    except queue.Empty:
        raise AssertionError(f"the ranks said nothing for {TIMEOUT_S} s") from None
    finally:
        for process in ranks:
            process.join(timeout=0 if len(gathered[-1]) < world_size else 20)
            if process.is_alive():
                process.kill()
    return [[by_rank[rank] for rank in range(world_size)] for by_rank in gathered]


def _rank(
    rank: int,
    world_size: int,
    store: Path,
    tasks: list[tuple[Callable[..., Any], tuple[Any, ...]]],
    results: Any,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    for index, (task, arguments) in enumerate(tasks):
        try:
            result = task(rank, world_size, *arguments)
        except Exception:
            results.put((index, rank, f"{task.__name__}{arguments}: {traceback.format_exc()}"))
            return
        results.put((index, rank, result))
        # A dead engine's finalizer imports. Python before 3.12 fails (KeyError in _ModuleLock)
        # where the collector runs it in the middle of another import, and DeepSpeed makes many of
        # them while it builds an engine: let this one be gone before the next.
        gc.collect()
    torch.distributed.destroy_process_group()

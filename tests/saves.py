"""A state to save without DeepSpeed: flat tensors cut over the ranks as ZeRO would."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import Checkpoints
from trainer.engine import Fragment
from trainer.parts import EMA, MOMENTS, WEIGHT
from trainer.saver import Saved, Saver
from trainer.storage import Storage

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (7, 5), "norm.bias": (3,), "layer.cube": (2, 3, 4), "scale": (),
}  # fmt: skip
KINDS = (WEIGHT, *MOMENTS, EMA)


class FakeEngine:
    """One rank's equal share of all elements; parameters are cut where they come to be."""

    def __init__(self, rank: int = 0, world_size: int = 1, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(math.prod(shape) for shape in SHAPES.values())
        self.flat = {kind: torch.rand(total, generator=generator) for kind in KINDS}
        share = -(-total // world_size)
        self._begin, self._end = rank * share, min((rank + 1) * share, total)

    kinds = KINDS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return SHAPES

    def scalars(self) -> dict[str, Any]:
        return {"step": 3, "ema_decay": 0.9}

    def fragments(self) -> list[Fragment]:
        found, position = [], 0
        for name, shape in SHAPES.items():
            end = position + math.prod(shape)
            first, last = max(position, self._begin), min(end, self._end)
            if first < last:
                tensors = {kind: flat[first:last] for kind, flat in self.flat.items()}
                found.append(Fragment(name, first - position, tensors))
            position = end
        return found

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every parameter's tensor of a kind, flat, as it should come back."""
        sizes = [math.prod(shape) for shape in SHAPES.values()]
        return dict(zip(SHAPES, self.flat[kind].split(sizes), strict=True))


class Group:
    """All ranks' savers of one attempt, in this process."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        world_size: int = 1,
        *,
        token: str = "0a0b0c0d",
        keep: int = 3,
        staging: Path | None = None,
        seed: int = 1,
    ) -> None:
        self.checkpoints = checkpoints
        checkpoints.begin_attempt(token)
        self.engines = [FakeEngine(rank, world_size, seed=seed) for rank in range(world_size)]
        self.savers = [
            Saver(
                checkpoints,
                engine,  # type: ignore[arg-type]
                rank=rank,
                world_size=world_size,
                token=token,
                keep=keep,
                staging=staging,
            )
            for rank, engine in enumerate(self.engines)
        ]

    def begin(self, step: int, *, best: int | None = None, data_hash: str | None = None) -> None:
        state = {
            "step": step,
            "data_hash": data_hash or f"{step:016x}",
            "settings": {"model.d_ff": 64},
            "best_nll": 1.5,
        }
        for saver in self.savers:
            saver.begin(state, step=step, best=best)

    def wait(self) -> list[Saved]:
        """How the save that was begun ended on each rank."""
        deadline = time.monotonic() + 30
        while any(saver.busy for saver in self.savers):
            assert time.monotonic() < deadline, "a save does not end"
            time.sleep(0.002)
        found = [saver.finished() for saver in self.savers]
        assert all(saved is not None for saved in found)
        return [saved for saved in found if saved is not None]

    def save(self, step: int, **values: Any) -> list[Saved]:
        """A save that must go well."""
        self.begin(step, **values)
        found = self.wait()
        assert [saved.error for saved in found] == [None] * len(found)
        return found


def open_storage(where: str | Path, cache: Path) -> Checkpoints:
    """A run's checkpoints at a path or URL."""
    return Checkpoints(Storage.of(where), cache)


def assert_holds(checkpoints: Checkpoints, step: int, engine: FakeEngine) -> None:
    """The checkpoint gives back every element of the state, whole and in parts."""
    with checkpoints.open(step) as reader:
        for kind in KINDS:
            for name, expected in engine.whole(kind).items():
                assert torch.equal(reader.read(kind, name, 0, len(expected)), expected)
                for cut in range(len(expected)):
                    found = reader.read(kind, name, cut // 2, cut - cut // 2)
                    assert torch.equal(found, expected[cut // 2 : cut])


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, before: Any) -> Iterator[None]:
    """Calls ``before(operation, arguments)`` ahead of each system call that changes a disk."""
    import os

    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir"):
            original = getattr(os, name)

            def call(*args: Any, _name: str = name, _original: Any = original, **kw: Any) -> Any:
                before(_name, args)
                return _original(*args, **kw)

            patch.setattr(os, name, call)
        yield

"""Inside each rank of a disturbed run: notes what is really trained on, as it happens.

``train`` takes the place of ``trainer.attempt.train``. It runs the real loop, with a look at three
doors: what the model is given, what the optimizer does with it, and what a checkpoint brings back.
Nothing is taken from the plan: a pair is known by the token ids that went into the model, and a
state by a hash of the weights, so that neither a wrong position nor a wrong checkpoint can hide.

One file a rank and attempt, a JSON object a line, flushed before the step's reduction.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from data_shards.config import PAD_ID
from data_shards.stream import Stream
from trainer import attempt
from trainer.config import RunConfig
from trainer.engine import Engine

RECORDS = "records"

# Written into the run's folder: seconds a step, instead of ``Options.pace_s``.
PACE_FILE = "pace"


@dataclass(frozen=True)
class Options:
    """What the harness wants of the ranks.

    Attributes:
        pace_s: least time a step takes, so that moments in time are moments in the run.
        nan_steps: steps (from 0) whose loss is made NaN on one rank.
        nan_rank: that rank, modulo the number of ranks.
    """

    pace_s: float = 0.0
    nan_steps: tuple[int, ...] = ()
    nan_rank: int = 1


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    options: Options,
    rank: int,
    world_size: int,
    **arguments: Any,
) -> str:
    """``trainer.attempt.train``, recorded. Called in a process that trains once and ends."""
    recorder = _Recorder(run_dir, options, rank=rank, world_size=world_size)
    recorder.install()
    return attempt.train(config, run_dir, rank=rank, world_size=world_size, **arguments)


def pair_key(source: Iterable[int], target: Iterable[int]) -> str:
    """What a pair is known by: 16 hexadecimal digits of its token ids (end signs included)."""
    text = f"{' '.join(map(str, source))}|{' '.join(map(str, target))}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def weights_key(weights: dict[str, Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of any weight."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Recorder:
    def __init__(self, run_dir: Path, options: Options, *, rank: int, world_size: int) -> None:
        self._options, self._rank, self._world_size = options, rank, world_size
        self._pace_file = run_dir / PACE_FILE
        # Attempts are ordered by rank 0's clock.
        attempt = [f"{time.time_ns():020d}-{os.getpid()}"]
        if world_size > 1:
            torch.distributed.broadcast_object_list(attempt)
        folder = run_dir / RECORDS
        folder.mkdir(exist_ok=True)
        self._stream = (folder / f"{attempt[0]}-rank-{rank}.jsonl").open("w", encoding="utf-8")
        self._write("begin", rank=rank, world_size=world_size, pid=os.getpid())
        self._step = -1
        self._lanes: dict[int, int] = {}  # of the step's batches, by the identity of their tensors
        self._given: tuple[int, list[str]] = -1, []
        self._weights: str | None = None
        self._step_ended = time.monotonic()

    def install(self) -> None:
        """Stand in the doors of this process' loop."""
        _wrap(Stream, "__next__", self._next)
        _wrap(Engine, "__call__", self._forward)
        _wrap(Engine, "backward", self._backward)
        _wrap(Engine, "step", self._update)
        _wrap(Engine, "restore", self._restore)

    def _next(self, call: Callable[..., Any], stream: Any) -> Any:
        batches = call(stream)
        self._step = batches.step
        self._lanes = {id(batch.source_BS): batch.lane for batch in batches.batches}
        return batches

    def _forward(
        self, call: Callable[..., Any], engine: Engine, source: Tensor, *rest: Tensor
    ) -> Any:
        loss, nll = call(engine, source, *rest)
        if not torch.is_grad_enabled():
            return loss, nll  # a validation
        lane = self._lanes.get(id(source), -1)
        rows = zip(source.tolist(), rest[1].tolist(), strict=True)
        # A pass over nothing, which keeps the ranks in step, is of no lane.
        self._given = lane, [] if lane < 0 else [pair_key(*map(_unpadded, row)) for row in rows]
        if (
            self._step in self._options.nan_steps
            and self._rank == self._options.nan_rank % self._world_size
        ):
            loss = loss * float("nan")
        return loss, nll

    def _backward(
        self, call: Callable[..., Any], engine: Engine, *arguments: Any, **named: Any
    ) -> None:
        call(engine, *arguments, **named)
        lane, pairs = self._given
        if pairs:
            self._write("trained", step=self._step, lane=lane, pairs=pairs)
        self._given = -1, []

    def _update(
        self, call: Callable[..., Any], engine: Engine, *arguments: Any, **named: Any
    ) -> Any:
        before = self._weights or _weights_of(engine)
        result = call(engine, *arguments, **named)
        self._weights = _weights_of(engine)
        self._write("update", step=self._step, before=before, after=self._weights)
        self._keep_pace()
        return result

    def _restore(
        self, call: Callable[..., Any], engine: Engine, *arguments: Any, **named: Any
    ) -> None:
        call(engine, *arguments, **named)
        self._weights = _weights_of(engine)
        self._write("restored", weights=self._weights)

    def _keep_pace(self) -> None:
        # Rank 0 alone: the others wait for it in the next step's reduction.
        if self._rank == 0:
            try:
                pace_s = float(self._pace_file.read_text())
            except (FileNotFoundError, ValueError):
                pace_s = self._options.pace_s
            time.sleep(max(0.0, self._step_ended + pace_s - time.monotonic()))
        self._step_ended = time.monotonic()

    def _write(self, kind: str, **values: Any) -> None:
        line = {"kind": kind, **values, "time": time.time()}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by ``around(the method, self, its arguments)``."""
    method = getattr(owner, name)

    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        return around(method, self, *arguments, **named)

    setattr(owner, name, wrapper)


def _weights_of(engine: Engine) -> str:
    return weights_key(dict(engine.module.named_parameters()))


def _unpadded(row: list[int]) -> list[int]:
    return [token for token in row if token != PAD_ID]

"""A rank of communication.py: the trainer's own loop, joined by gloo, that counts what it sends.

Every rank stands still after each step until the first one goes on, so that a group of ranks can
take turns with others.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from trainer.config import RunConfig, parse_config
from trainer.loop import Loop, StepTotals
from trainer.phases import PHASES, Seconds
from trainer.rank import Rank
from trainer.reporter import Voices

WARM_UP_STEPS = 2

# Of torch.distributed; all of DeepSpeed's and the trainer's collectives come by one of them.
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


def sent(name: str, size: float, ranks: int) -> float:
    """Bytes that a rank sends on average for a tensor of ``size`` bytes, by gloo's algorithms.

    A ring for all but the broadcast, which is a tree. To reduce to one rank, gloo scatters the sums
    over the ring and then brings the parts together; to reduce and scatter, torch lets it reduce
    for all ranks (the bytes on the interface say so).
    """
    ring = (ranks - 1) / ranks * size
    return {
        "all_reduce": 2 * ring,
        "reduce_scatter_tensor": 2 * ring,
        "reduce": ring * (1 + 1 / ranks),
        "broadcast": ring,
    }.get(name, ring)


@dataclass
class Traffic:
    """What the collectives of a process passed, and took; bytes whole, as one rank has them."""

    calls: dict[str, int] = field(default_factory=dict)
    tensor_bytes: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def watch(self) -> None:
        """From now on; before DeepSpeed is imported, which keeps some functions."""
        for name in _COLLECTIVES:
            call = getattr(torch.distributed, name)
            setattr(torch.distributed, name, functools.wraps(call)(self._watched(name, call)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any, **named: Any) -> Any:
            size = max(map(_bytes, (*arguments, *named.values())), default=0)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.tensor_bytes[name] = self.tensor_bytes.get(name, 0) + size
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                self.wall_s += time.perf_counter() - wall_s
                self.cpu_s += time.process_time() - cpu_s

        return watch

    def clear(self) -> None:
        """Count from here."""
        self.calls, self.tensor_bytes, self.wall_s, self.cpu_s = {}, {}, 0.0, 0.0


def _bytes(argument: object) -> int:
    """Of a tensor, or of a list of them."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def loopback_bytes() -> int:
    """What went over the loopback interface of this network namespace, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("no loopback interface in /proc/net/dev")


class EnoughError(Exception):
    """The loop has made its steps."""


class StoppedLoop(Loop):
    """Stands still after every step, in ``gate``."""

    def __init__(self, rank: Rank, gate: Callable[[StoppedLoop, StepTotals, int], None]) -> None:
        super().__init__(rank, Voices())
        self.gate = gate
        self.phase_s: Seconds = dict.fromkeys(PHASES, 0.0)

    def _update(self, totals: StepTotals, step: int, lap: Seconds | None) -> None:
        super()._update(totals, step, lap)
        for phase, seconds in (lap or {}).items():
            self.phase_s[phase] += seconds
        with self.phases("validation"):  # which nobody looks at here
            self.gate(self, totals, step)


def make(config: RunConfig, run_dir: Path, rank: int, ranks: int) -> Rank:
    """A rank, ready to train."""
    made = Rank(config, run_dir, rank=rank, world_size=ranks, local_rank=rank)
    made.prepare()
    return made


# What is sent at a step.


def measure_traffic(
    traffic: Traffic, folders: list[str], rank: int, ranks: int, steps: int
) -> list[dict[str, Any]]:
    """Of each configuration in turn, a step's collectives, and what the interface counted."""
    rows = []
    for folder in folders:
        run_dir = Path(folder)
        this = make(read_config(run_dir), run_dir, rank, ranks)
        found: dict[str, Any] = {"parameters": this.num_parameters}
        before = 0

        def gate(
            loop: StoppedLoop,
            _totals: StepTotals,
            _step: int,
            found: dict[str, Any] = found,
        ) -> None:
            nonlocal before
            torch.distributed.barrier()
            if loop.state.step == WARM_UP_STEPS:
                before = loopback_bytes()
                torch.distributed.barrier()
                traffic.clear()
            elif loop.state.step == WARM_UP_STEPS + steps:
                found["calls"] = {n: count / steps for n, count in traffic.calls.items()}
                found["tensor_bytes"] = {n: s / steps for n, s in traffic.tensor_bytes.items()}
                found["interface_bytes"] = (loopback_bytes() - before) / steps / ranks
                torch.distributed.barrier()
                raise EnoughError

        with suppress(EnoughError):
            StoppedLoop(this, gate).run()
        found["counted_bytes"] = sum(
            sent(name, size, ranks) for name, size in found["tensor_bytes"].items()
        )
        rows.append(found)
    return rows


# Turns.


@dataclass
class GroupTurn:
    """What a group of ranks did; CPU seconds are of all its processes, the rest of the first."""

    tokens: int = 0
    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    collective_wall_s: float = 0.0
    collective_cpu_s: float = 0.0
    phases: Seconds = field(default_factory=dict)


class Turns:
    """The gate of a group that trains for so many seconds at a time, when it is told to."""

    def __init__(self, traffic: Traffic, ranks: int) -> None:
        self._traffic, self._ranks = traffic, ranks
        self._seconds = self._cpu_s = 0.0
        self._steps = self._tokens = 0
        self._phases: Seconds = {}
        self._began: float | None = None

    def __call__(self, loop: StoppedLoop, _totals: StepTotals, step: int) -> None:
        """After a step: go on, or tell what the turn was and wait for the next."""
        first = loop.rank.is_first
        if self._began is not None:
            cpu_s = time.process_time() - self._cpu_s
            numbers = torch.tensor([cpu_s, self._traffic.cpu_s], dtype=torch.float64)
            wall_s, collective_wall_s = time.perf_counter() - self._began, self._traffic.wall_s
            if self._ranks > 1:
                torch.distributed.all_reduce(numbers)
            self._steps += 1
            self._tokens += loop.plan.source_tokens(step) + loop.plan.target_tokens(step)
            if not self._all_know(wall_s >= self._seconds, first):
                return
            if first:
                phases = {name: s - self._phases[name] for name, s in loop.phase_s.items()}
                total_s, collective_s = numbers.tolist()
                done = GroupTurn(
                    tokens=self._tokens,
                    steps=self._steps,
                    wall_s=wall_s,
                    cpu_s=total_s,
                    collective_wall_s=collective_wall_s,
                    collective_cpu_s=collective_s,
                    phases=phases,
                )
                answer(asdict(done))
        elif loop.state.step < WARM_UP_STEPS:
            return
        elif first:
            answer({})
        line = sys.stdin.readline() if first else ""
        if self._all_know(first and not line, first):
            raise EnoughError
        self._seconds = float(line) if first else 0.0
        self._steps = self._tokens = 0
        self._phases = dict(loop.phase_s)
        self._all_know(True, first)  # so that all begin together
        self._traffic.clear()
        self._cpu_s = time.process_time()
        self._began = time.perf_counter()

    def _all_know(self, what: bool, first: bool) -> bool:
        """The first rank's word."""
        if self._ranks == 1:
            return what
        told = torch.tensor([float(what and first)])
        torch.distributed.broadcast(told, 0)
        return bool(told.item())


def take_turns(traffic: Traffic, folder: str, rank: int, ranks: int) -> None:
    """Train the configuration of a folder, a turn at a time."""
    this = make(read_config(Path(folder)), Path(folder), rank, ranks)
    with suppress(EnoughError):
        StoppedLoop(this, Turns(traffic, ranks)).run()


def train_all(folders: list[str], rank: int, ranks: int) -> None:
    """Whole trainings, one after the other."""
    from trainer.attempt import train

    for folder in folders:
        run_dir = Path(folder)
        train(read_config(run_dir), run_dir, rank=rank, world_size=ranks, resume=False)


# The collectives alone.


def measure_collectives(
    rank: int, ranks: int, *, sizes: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Seconds and CPU seconds a rank of each collective by element type and size, best of all."""
    functions: dict[str, Callable[[torch.Tensor], object]] = {
        "all_reduce": torch.distributed.all_reduce,
        "reduce": lambda whole: torch.distributed.reduce(whole, 0),
        "all_gather_into_tensor": lambda whole: torch.distributed.all_gather_into_tensor(
            whole, whole.chunk(ranks)[rank].clone()
        ),
    }
    cases = [
        (name, dtype, size)
        for name in functions
        for dtype in (torch.float32, torch.bfloat16)
        for size in sizes
    ]
    taken: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            name, dtype, size = case
            whole = torch.full((size // dtype.itemsize,), 1e-3, dtype=dtype)
            torch.distributed.barrier()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            functions[name](whole)
            taken[case].append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    rows = []
    for (name, dtype, size), pairs in taken.items():
        wall_s, cpu_s = (min(column) for column in zip(*pairs, strict=True))
        kind = {"collective": name, "dtype": str(dtype).removeprefix("torch."), "bytes": size}
        rows.append({**kind, "wall_s": wall_s, "cpu_s": cpu_s})
    return rows


def measure_copies(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """The same of a copy in memory."""
    rows = []
    for size in sizes:
        source, target = torch.ones(size // 4), torch.ones(size // 4)
        best = float("inf")
        for _ in range(rounds):
            began = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - began)
        rows.append({"collective": "copy", "dtype": "float32", "bytes": size, "wall_s": best})
    return rows


def read_config(run_dir: Path) -> RunConfig:
    """The configuration that lies in a contestant's folder."""
    file = run_dir / "config.json"
    return parse_config(json.loads(file.read_text()), where=str(file))


_answers = sys.stdout


def answer(content: Any) -> None:
    """Tell the coordinator."""
    print(json.dumps(content), file=_answers, flush=True)


def main(rank: int, ranks: int, work: dict[str, Any]) -> None:
    """A rank's process."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    traffic = Traffic()
    traffic.watch()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work['rendezvous']}", rank=rank, world_size=ranks
    )
    found: Any = None
    try:
        if work["what"] == "traffic":
            found = measure_traffic(traffic, work["folders"], rank, ranks, work["steps"])
        elif work["what"] == "collectives":
            options = {"sizes": work["sizes"], "rounds": work["rounds"]}
            found = measure_collectives(rank, ranks, **options)
            torch.distributed.barrier()
            found += measure_copies(**options) if rank == 0 else []
        elif work["what"] == "trainings":
            train_all(work["folders"], rank, ranks)
            found = len(work["folders"])
        else:
            take_turns(traffic, work["folder"], rank, ranks)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others may wait in a collective for ever
    if rank == 0 and found is not None:
        answer(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # prefetching threads are not waited for

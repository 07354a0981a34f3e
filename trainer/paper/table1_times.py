"""Time and memory of Table 1's layers on this machine's processor, one thread, batch 1, float32."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainer.paper.table1_layers import LAYERS, make

Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = ("forward", "training")

# A sample is repeated until it takes this long, so that the clock's grain and one interruption
# weigh little; what takes longer than the second has fewer rounds.
_SAMPLE_S = 0.005
_LONG_S = 0.2
_LONG_ROUNDS = 3


@dataclass(frozen=True)
class Cell:
    """One layer of one size."""

    layer: str
    n: int
    d: int


@dataclass(frozen=True)
class Timed:
    """CPU seconds of a pass: the median of the rounds, and what they lie between."""

    cell: Cell
    mode: Mode
    median_s: float
    lowest_s: float
    highest_s: float
    rounds: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a pass takes at its peak, beside the layer's parameters and its input."""

    cell: Cell
    mode: Mode
    peak_bytes: int


class _Bench:
    """Layers and inputs, made once for all cells that use them."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, int], nn.Module] = {}

    def work(self, cell: Cell, mode: Mode) -> Callable[[], object]:
        """A pass: forward without gradients, or forward and backward to input and parameters."""
        key = cell.layer, cell.d
        if key not in self._modules:
            torch.manual_seed(0)
            self._modules[key] = make(LAYERS[cell.layer], cell.d)
        module = self._modules[key]
        inputs_BND = torch.randn(1, cell.n, cell.d)
        if mode == "forward":
            return lambda: _forward(module, inputs_BND)
        inputs_BND.requires_grad_()
        wanted = [inputs_BND, *module.parameters()]
        gradient_BND = torch.randn(1, cell.n, cell.d)
        return lambda: torch.autograd.grad(module(inputs_BND), wanted, gradient_BND)


def _forward(module: nn.Module, inputs_BND: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(inputs_BND)
        return result


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Of glibc's mallopt: what is asked of the system directly, and what is given back to it.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEEPS = {_TRIM_THRESHOLD: 2_000_000_000, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65_536}


@contextmanager
def memory_kept() -> Iterator[None]:
    """The allocator keeps what is freed, as in the workers that train (``cluster/session.py``).

    Else glibc gives large blocks back and faults them in again at every pass: at n = 2048, d = 64
    that was 23 of 38 ms of self-attention's forward pass. Does nothing with another C library.
    """
    _set_allocator(_KEEPS)
    try:
        yield
    finally:
        _set_allocator(_DEFAULTS)


def _set_allocator(settings: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in settings.items():
            mallopt(parameter, value)


def measure_times(cells: Sequence[Cell], *, rounds: int, say: Callable[[str], None]) -> list[Timed]:
    """CPU time of all cells, in turns: every round measures each once, every other one backwards.

    CPU time is steadier than the clock's where others use the machine, too.
    """
    bench = _Bench()
    jobs = [(cell, mode) for cell in cells for mode in MODES]
    samples: list[list[float]] = [[] for _ in jobs]
    repeats = []
    with one_thread(), memory_kept():
        for cell, mode in jobs:
            work = bench.work(cell, mode)
            once = _sample(work, 1)  # the first also chooses kernels and fills caches
            if once < _LONG_S:
                once = _sample(work, 1)
            repeats.append(max(1, round(_SAMPLE_S / once)))
        for number in range(rounds):
            order = range(len(jobs))
            for index in order if number % 2 == 0 else reversed(order):
                done = samples[index]
                if len(done) >= _LONG_ROUNDS and statistics.median(done) > _LONG_S:
                    continue
                done.append(_sample(bench.work(*jobs[index]), repeats[index]))
            say(f"times: round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")
    return [
        Timed(cell, mode, statistics.median(done), min(done), max(done), len(done))
        for (cell, mode), done in zip(jobs, samples, strict=True)
    ]


def _sample(work: Callable[[], object], repeats: int) -> float:
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def measure_memory(cells: Sequence[Cell]) -> list[Memory]:
    """Peak memory of all cells, by PyTorch's profiler, which sees its allocator."""
    bench = _Bench()
    with one_thread():
        return [
            Memory(cell, mode, peak_bytes(bench.work(cell, mode)))
            for cell in cells
            for mode in MODES
        ]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that ``work`` holds at a time of what it allocates through PyTorch."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells standard error that it starts
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
        del result
    found = profiled.profiler
    assert found is not None
    assert found.kineto_results is not None
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

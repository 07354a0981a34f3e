"""Time and memory of a piece of work in PyTorch: on one thread of a CPU, or on a GPU."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]

# A sample is repeated until it takes this long, so that the clock's grain and one interruption
# weigh little.
_SAMPLE_S = 0.005
# What takes longer is not warmed up in every round: its first pass is as its others.
_WARM_S = 0.02
# What takes longer still has fewer rounds.
_LONG_S = 0.2
_LONG_ROUNDS = 3
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timed:
    """Seconds of a pass: the median of the rounds, and what they lie between."""

    median_s: float
    lowest_s: float
    highest_s: float
    rounds: int


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
    """The allocator keeps what is freed, as in the workers that train (``cluster/allocator.py``).

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


def time_in_turns(
    jobs: Sequence[Callable[[], Work]],
    *,
    rounds: int,
    say: Callable[[str], None],
    device: torch.device = _CPU,
) -> list[Timed]:
    """Seconds of every job's work: every round takes each once, every other one backwards.

    On a CPU seconds are this process's with one thread, which are steadier than the clock's where
    others use the machine, too; on a GPU the clock's.

    Args:
        jobs: each makes its work, with its inputs, anew; what that takes does not count.
    """
    samples: list[list[float]] = [[] for _ in jobs]
    repeats = []
    with one_thread(), memory_kept():
        for job in jobs:
            work = job()
            once = _sample(work, 1, device)  # the first also chooses kernels and fills caches
            if once < _LONG_S:
                once = _sample(work, 1, device)
            repeats.append(max(1, round(_SAMPLE_S / max(once, 1e-9))))
        for number in range(rounds):
            order = range(len(jobs))
            for index in order if number % 2 == 0 else reversed(order):
                done = samples[index]
                if len(done) >= _LONG_ROUNDS and statistics.median(done) > _LONG_S:
                    continue
                work = jobs[index]()
                if not done or done[0] < _WARM_S:
                    work()
                done.append(_sample(work, repeats[index], device))
            say(f"times: round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")
    return [Timed(statistics.median(done), min(done), max(done), len(done)) for done in samples]


def _sample(work: Work, repeats: int, device: torch.device) -> float:
    began = _clock(device)
    for _ in range(repeats):
        work()
    return (_clock(device) - began) / repeats


def _clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(ranges: Iterable[tuple[float, float]]) -> str:
    """How far the rounds of what was timed lie apart, in words.

    Args:
        ranges: of each, the least and the most seconds.
    """
    ratios = sorted(highest / lowest for lowest, highest in ranges)
    middle, most = ratios[len(ratios) // 2], ratios[len(ratios) * 9 // 10]
    return (
        f"the slowest round took {middle:.2f} times as long as the fastest in the middle case, "
        f"{most:.2f} times or less in nine of ten, {ratios[-1]:.2f} times at most"
    )


def peak_bytes(work: Work, device: torch.device = _CPU) -> int:
    """The most that ``work`` holds at a time of what it allocates through PyTorch."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells standard error that it starts
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

"""What a trace of some training steps says in numbers: where their time went.

Works on the events of a Chrome trace as PyTorch's profiler writes it: dictionaries with ``ph``,
``cat``, ``name``, ``pid``, ``tid`` and, in microseconds, ``ts`` and ``dur``. Marks that it looks
for: a ``step <n>`` range for each step and ``phase: <name>`` ranges within, on the main thread.

On a GPU the host only queues work. So phases also get the time of the kernels that were launched
while the host was in them, and idle means that no kernel ran.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

STEP_PREFIX = "step "
PHASE_PREFIX = "phase: "
NUM_OPERATORS = 30

Event = dict[str, Any]
Interval = tuple[float, float]

_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_COLLECTIVES = ("gloo:", "nccl:", "mpi:")


def summarize(events: Sequence[Event], *, with_memory: bool = False) -> dict[str, Any]:
    """Times in milliseconds, over all profiled steps together unless said otherwise.

    Returns:
        ``steps`` (their numbers), ``step_ms`` (of each), ``phases`` (``host_ms`` and ``device_ms``
        by phase; host times add up to the steps), ``operators`` (the most expensive by own time),
        ``collectives``, ``in_operators_ms`` and ``idle_ms`` (see ``idle_of``), ``memory``.

    Raises:
        ValueError: there is no step in the trace.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    steps = sorted((e for e in spans if _is_step(e)), key=lambda event: float(event["ts"]))
    if not steps:
        raise ValueError("the trace holds no step: it was stopped before one began")
    windows = [_interval(step) for step in steps]
    main = steps[0]["pid"], steps[0]["tid"]
    host_ops = [e for e in spans if e.get("cat") == "cpu_op" and _within(e, windows)]
    device_work = [e for e in spans if e.get("cat") in _DEVICE_WORK and _within(e, windows)]
    marks = [
        event
        for event in spans
        if str(event["name"]).startswith(PHASE_PREFIX)
        and event.get("cat") == "user_annotation"
        and (event["pid"], event["tid"]) == main
        and _within(event, windows)
    ]
    total_ms = sum(end - start for start, end in windows) / 1e3
    in_operators_ms = covered(
        (_interval(e) for e in host_ops if (e["pid"], e["tid"]) == main), windows
    )
    busy_ms = covered(map(_interval, device_work), windows) if device_work else None
    return {
        "steps": [int(str(step["name"]).removeprefix(STEP_PREFIX)) for step in steps],
        "step_ms": [_round((end - start) / 1e3) for start, end in windows],
        "total_ms": _round(total_ms),
        "phases": _phases(marks, windows, spans, device_work, total_ms),
        "in_operators_ms": _round(in_operators_ms),
        "device_busy_ms": None if busy_ms is None else _round(busy_ms),
        "idle_ms": _round(total_ms - (in_operators_ms if busy_ms is None else busy_ms)),
        "idle_of": "main thread" if busy_ms is None else "device",
        "operators": _operators(host_ops, device_work),
        "collectives": _collectives(spans, device_work, windows),
        "memory": _memory(events) if with_memory else None,
    }


def self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Each range and its own microseconds: its duration without the ranges directly in it.

    Ranges of one thread nest; those of different threads have nothing to do with each other.
    """
    result: list[tuple[Event, float]] = []
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for ranges in threads.values():
        # Of two that begin together, the longer is outside.
        ranges.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        open_ranges: list[tuple[float, int]] = []  # end, index in result
        for event in ranges:
            start, end = _interval(event)
            while open_ranges and open_ranges[-1][0] <= start:
                open_ranges.pop()
            if open_ranges:
                outer_end, outer = open_ranges[-1]
                around, own = result[outer]
                result[outer] = around, own - (min(end, outer_end) - start)
            open_ranges.append((end, len(result)))
            result.append((event, end - start))
    return result


def covered(intervals: Iterable[Interval], windows: Sequence[Interval]) -> float:
    """Milliseconds of ``windows`` (disjoint, in order) that lie in at least one interval."""
    total, reached = 0.0, float("-inf")
    starts = [start for start, _ in windows]
    for start, end in sorted(intervals):
        start = max(start, reached)
        reached = max(reached, end)
        index = max(0, bisect.bisect_right(starts, start) - 1)
        while index < len(windows) and windows[index][0] < end:
            low, high = windows[index]
            total += max(0.0, min(end, high) - max(start, low))
            index += 1
    return total / 1e3


def _phases(
    marks: list[Event],
    windows: Sequence[Interval],
    spans: Sequence[Event],
    device_work: Sequence[Event],
    total_ms: float,
) -> dict[str, dict[str, float | None]]:
    host: dict[str, float] = defaultdict(float)
    for mark, own_us in self_times(marks):
        host[_phase(mark)] += own_us / 1e3
    host["other"] += total_ms - sum(host.values())
    device = _device_phases(marks, spans, device_work) if device_work else None
    names = [*host, *(name for name in device or {} if name not in host)]
    return {
        name: {
            "host_ms": _round(host.get(name, 0.0)),
            "device_ms": None if device is None else _round(device.get(name, 0.0)),
        }
        for name in names
    }


def _device_phases(
    marks: list[Event], spans: Sequence[Event], device_work: Sequence[Event]
) -> dict[str, float]:
    """Kernels' milliseconds by the phase in which the main thread was when they were launched.

    By time, not by thread: the backward pass launches from a thread of its own.
    """
    launched: dict[Any, float] = {}
    for event in spans:
        if event.get("cat") in {"cuda_runtime", "cuda_driver"}:
            launched[event.get("args", {}).get("correlation")] = float(event["ts"])
    # The innermost mark at a time: changes of it, in order.
    changes: list[tuple[float, str]] = []
    open_marks: list[tuple[float, str]] = []
    for mark in sorted(marks, key=lambda event: (float(event["ts"]), -float(event["dur"]))):
        start, end = _interval(mark)
        while open_marks and open_marks[-1][0] <= start:
            changes.append((open_marks.pop()[0], open_marks[-1][1] if open_marks else "other"))
        changes.append((start, _phase(mark)))
        open_marks.append((end, _phase(mark)))
    while open_marks:
        changes.append((open_marks.pop()[0], open_marks[-1][1] if open_marks else "other"))
    times = [when for when, _ in changes]
    device: dict[str, float] = defaultdict(float)
    for work in device_work:
        when = launched.get(work.get("args", {}).get("correlation"), float(work["ts"]))
        place = bisect.bisect_right(times, when) - 1
        phase = changes[place][1] if place >= 0 else "other"
        device[phase] += float(work["dur"]) / 1e3
    return device


def _operators(host_ops: list[Event], device_work: Sequence[Event]) -> list[dict[str, Any]]:
    device_us: dict[Any, float] = defaultdict(float)
    for work in device_work:
        device_us[work.get("args", {}).get("External id")] += float(work["dur"])
    calls: dict[str, int] = defaultdict(int)
    own: dict[str, float] = defaultdict(float)
    on_device: dict[str, float] = defaultdict(float)
    for event, own_us in self_times(host_ops):
        name = str(event["name"])
        calls[name] += 1
        own[name] += own_us
        on_device[name] += device_us.get(event.get("args", {}).get("External id"), 0.0)
    cost = on_device if device_work else own
    all_own_us, all_device_us = sum(own.values()), sum(on_device.values())
    total_us = all_device_us if device_work else all_own_us
    first = sorted(own, key=lambda name: (-cost[name], name))[:NUM_OPERATORS]
    return [
        {
            "name": name,
            "calls": calls[name],
            "self_ms": _round(own[name] / 1e3),
            "device_ms": _round(on_device[name] / 1e3) if device_work else None,
            "share": round(cost[name] / total_us, 4) if total_us else 0.0,
        }
        for name in first
    ]


def _collectives(
    spans: Sequence[Event], device_work: Sequence[Event], windows: Sequence[Interval]
) -> list[dict[str, Any]]:
    """How often and how long; on a CPU from call to end, in threads beside the main one."""
    found: dict[str, list[Interval]] = defaultdict(list)
    for work in device_work:
        if "nccl" in str(work["name"]).lower():
            found[str(work["name"])].append(_interval(work))
    if not found:
        for event in spans:
            if str(event["name"]).startswith(_COLLECTIVES) and _within(event, windows):
                found[str(event["name"])].append(_interval(event))
    return [
        {"name": name, "calls": len(times), "ms": _round(sum(e - s for s, e in times) / 1e3)}
        for name, times in sorted(found.items())
    ]


def _memory(events: Sequence[Event]) -> dict[str, Any]:
    """What PyTorch's allocators handed out while the steps ran, by device type."""
    kinds: dict[str, dict[str, int]] = {}
    for event in events:
        if event.get("name") != "[memory]":
            continue
        args = event.get("args", {})
        kind = kinds.setdefault(
            {0: "cpu", 1: "cuda"}.get(args.get("Device Type"), "other"),
            {"peak_bytes": 0, "allocations": 0, "allocated_bytes": 0},
        )
        num_bytes = int(args.get("Bytes", 0))
        kind["peak_bytes"] = max(kind["peak_bytes"], int(args.get("Total Allocated", 0)))
        if num_bytes > 0:
            kind["allocations"] += 1
            kind["allocated_bytes"] += num_bytes
    return kinds


def _is_step(event: Event) -> bool:
    name = str(event["name"])
    number = name.removeprefix(STEP_PREFIX)
    return event.get("cat") == "user_annotation" and number != name and number.isdigit()


def _phase(mark: Event) -> str:
    return str(mark["name"]).removeprefix(PHASE_PREFIX)


def _interval(event: Event) -> Interval:
    start = float(event["ts"])
    return start, start + float(event["dur"])


def _within(event: Event, windows: Sequence[Interval]) -> bool:
    return windows[0][0] <= float(event["ts"]) < windows[-1][1]


def _round(milliseconds: float) -> float:
    return round(milliseconds, 3)

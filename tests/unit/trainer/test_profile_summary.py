"""The arithmetic of a trace's summary, on traces small enough to reckon by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.profile_summary import covered, self_times, summarize


def event(name: str, start: float, end: float, cat: str = "cpu_op", **more: Any) -> dict[str, Any]:
    """Times in milliseconds; on the main thread unless told."""
    return {
        "ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1,
        "ts": 1000 * start, "dur": 1000 * (end - start), **more,
    }  # fmt: skip


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return event(name, start, end, "user_annotation")


def test_own_time_is_without_what_is_directly_inside() -> None:
    events = [
        event("outer", 0, 10),
        event("inner", 1, 4),
        event("innermost", 2, 3),
        event("inner", 5, 6),
        event("elsewhere", 0, 8, tid=2),
    ]
    own = [(e["name"], us / 1000) for e, us in self_times(reversed(events))]
    assert sorted(own) == [
        ("elsewhere", 8), ("inner", 1), ("inner", 2), ("innermost", 1), ("outer", 6),
    ]  # fmt: skip


def test_overlapping_intervals_cover_once() -> None:
    windows = [(0.0, 10e3), (20e3, 30e3)]
    assert covered([(1e3, 4e3), (2e3, 5e3), (3e3, 3.5e3)], windows) == pytest.approx(4)
    assert covered([(8e3, 22e3)], windows) == pytest.approx(4)
    assert covered([(-5e3, 50e3)], windows) == pytest.approx(20)
    assert covered([(12e3, 15e3), (-9e3, -1e3)], windows) == 0
    assert covered([], windows) == 0


def test_a_cpu_trace() -> None:
    found = summarize(
        [
            mark("step 10", 100, 200),
            mark("step 11", 200, 260),
            mark("phase: data_wait", 100, 105),
            mark("phase: backward", 110, 190),
            mark("phase: communication", 170, 185),  # inside: taken out of backward
            mark("phase: backward", 210, 250),
            event("before", 0, 90),
            event("aten::linear", 110, 150),
            event("aten::addmm", 112, 148),
            event("aten::linear", 210, 230),
            event("aten::elsewhere", 120, 140, tid=2),
            event("gloo:all_reduce", 171, 184, "user_annotation", tid=3),
            {"ph": "i", "name": "Record Window End", "ts": 1},
        ]
    )
    assert found["steps"] == [10, 11]
    assert found["step_ms"] == [100, 60]
    assert {name: phase["host_ms"] for name, phase in found["phases"].items()} == {
        "data_wait": 5, "backward": 105, "communication": 15, "other": 35,
    }  # fmt: skip
    assert found["in_operators_ms"] == 60
    assert found["idle_ms"] == 100
    assert found["idle_of"] == "main thread"
    rows = {row["name"]: (row["calls"], row["self_ms"]) for row in found["operators"]}
    assert rows == {
        "aten::addmm": (1, 36), "aten::linear": (2, 24), "aten::elsewhere": (1, 20),
    }  # fmt: skip
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1, abs=1e-3)
    assert found["collectives"] == [{"name": "gloo:all_reduce", "calls": 1, "ms": 13}]


def test_a_gpu_trace() -> None:
    """Kernels run later than they were launched, by a thread that knows no phase."""

    def kernel(name: str, start: float, end: float, launch: int, op: int) -> dict[str, Any]:
        args = {"correlation": launch, "External id": op}
        return event(name, start, end, "kernel", pid=0, tid=7, args=args)

    def launched(when: float, number: int) -> dict[str, Any]:
        args = {"correlation": number}
        return event("cudaLaunchKernel", when, when + 0.1, "cuda_runtime", tid=2, args=args)

    found = summarize(
        [
            mark("step 5", 0, 100),
            mark("phase: forward", 0, 20),
            mark("phase: backward", 20, 60),
            mark("phase: communication", 50, 55),
            event("aten::mm", 1, 2, args={"External id": 1}),
            event("aten::mm", 21, 22, tid=2, args={"External id": 2}),
            launched(1.5, 11), launched(21.5, 12), launched(52, 13), launched(57, 14),
            kernel("gemm", 10, 30, 11, 1),
            kernel("gemm", 30, 70, 12, 2),
            kernel("ncclDevKernel_AllReduce", 60, 75, 13, 3),
            kernel("fill", 90, 92, 14, 4),
        ]
    )  # fmt: skip
    device = {name: phase["device_ms"] for name, phase in found["phases"].items()}
    assert device == {"forward": 20, "backward": 42, "communication": 15, "other": 0}
    assert found["device_busy_ms"] == 67
    assert found["idle_ms"] == 33
    assert found["idle_of"] == "device"
    assert found["operators"][0] == {
        "name": "aten::mm", "calls": 2, "self_ms": 2, "device_ms": 60, "share": 1.0,
    }  # fmt: skip
    assert found["collectives"] == [{"name": "ncclDevKernel_AllReduce", "calls": 1, "ms": 15}]


def test_memory() -> None:
    def moved(num_bytes: int, total: int) -> dict[str, Any]:
        args = {"Device Type": 0, "Bytes": num_bytes, "Total Allocated": total}
        return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1, "args": args}

    events = [mark("step 1", 0, 1), moved(100, 300), moved(-100, 200), moved(50, 250)]
    assert summarize(events, with_memory=True)["memory"] == {
        "cpu": {"peak_bytes": 300, "allocations": 2, "allocated_bytes": 150}
    }
    assert summarize(events)["memory"] is None


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        summarize([event("aten::mm", 0, 1), mark("stepped", 0, 1), mark("step x", 0, 1)])

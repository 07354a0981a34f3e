"""Trackers: found by name, fed in order, never in the way."""

from __future__ import annotations

import sys
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from trainer import trackers
from trainer.trackers import Event, Trackers, find_trackers, flat, scalars

STARTED = {"event": "started", "step": 0}
CONFIG = {"trainer": {"seed": 1}}


class Notes:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begin(
        self, run: str, run_dir: Path, config: dict[str, Any], resumed_from: int | None
    ) -> None:
        self.calls.append(("begin", run, run_dir, config, resumed_from))

    def event(self, event: Event) -> None:
        self.calls.append((event["event"], event.get("step")))

    def close(self) -> None:
        self.calls.append("close")


def fed(tmp_path: Path, tracker: Any, events: list[Event]) -> list[str]:
    """Give a tracker the events; the complaints."""
    complaints: list[str] = []
    all_of_them = Trackers({"it": lambda: tracker}, "run", tmp_path, CONFIG, complaints.append)
    for event in events:
        all_of_them.event(event)
    all_of_them.close()
    return complaints


def test_a_tracker_hears_a_run_from_beginning_to_end(tmp_path: Path) -> None:
    notes = Notes()
    events = [STARTED, {"event": "step", "step": 1}, {"event": "evaluated", "step": 1}]
    assert fed(tmp_path, notes, events) == []
    assert notes.calls == [
        ("begin", "run", tmp_path, CONFIG, None),
        ("started", 0),
        ("step", 1),
        ("evaluated", 1),
        "close",
    ]


def test_no_step_comes_twice_when_workers_restart(tmp_path: Path) -> None:
    notes = Notes()
    steps = [*range(5, 9), "crash", *range(6, 12)]
    events: list[Event] = [{"event": "resumed", "step": 4}]
    for step in steps:
        if step == "crash":
            events += [{"event": "worker_failed"}, {"event": "resumed", "step": 5}]
        else:
            events.append({"event": "step", "step": step})
            if step == 7:
                events.append({"event": "validated", "step": 7})
    fed(tmp_path, notes, events)
    assert notes.calls[0] == ("begin", "run", tmp_path, CONFIG, 4)
    assert [step for kind, step in notes.calls[1:-1] if kind == "step"] == list(range(5, 12))
    assert notes.calls.count(("validated", 7)) == 1
    assert notes.calls.count(("worker_failed", None)) == 1


@pytest.mark.parametrize("method", ["begin", "event", "close"])
def test_a_tracker_that_raises_is_told_of_once_and_left_out(tmp_path: Path, method: str) -> None:
    broken, sound = Notes(), Notes()

    def fail(*arguments: Any) -> None:
        raise OSError("the server is gone")

    setattr(broken, method, fail)
    complaints: list[str] = []
    both = Trackers(
        {"broken": lambda: broken, "sound": lambda: sound},
        "run",
        tmp_path,
        CONFIG,
        complaints.append,
    )
    both.event(STARTED)
    for step in range(100):
        both.event({"event": "step", "step": step})
    both.close()
    assert complaints == ["tracker broken failed and is left out: OSError: the server is gone"]
    assert len(sound.calls) == 103


def test_a_slow_tracker_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MAX_WAITING", 10)
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.2)
    slow, may_go_on = Notes(), threading.Event()
    slow.event = lambda event: may_go_on.wait(10) and None  # type: ignore[method-assign]
    began = time.monotonic()
    complaints = fed(
        tmp_path, slow, [STARTED, *({"event": "step", "step": step} for step in range(1000))]
    )
    assert time.monotonic() - began < 5
    may_go_on.set()
    assert complaints == ["tracker it: it does not end; left behind"]


def test_events_that_do_not_fit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_MAX_WAITING", 10)
    notes, may_go_on = Notes(), threading.Event()
    notes.begin = lambda *arguments: may_go_on.wait(10) and None  # type: ignore[method-assign]
    complaints: list[str] = []
    one = Trackers({"it": lambda: notes}, "run", tmp_path, CONFIG, complaints.append)
    for event in [STARTED, *({"event": "step", "step": step} for step in range(20))]:
        one.event(event)
    may_go_on.set()
    one.close()
    assert complaints == ["tracker it: too slow for 11 events"]
    assert notes.calls == [("started", 0), *(("step", step) for step in range(9)), "close"]


def test_a_run_that_never_began_needs_no_tracker(tmp_path: Path) -> None:
    notes = Notes()
    assert fed(tmp_path, notes, [{"event": "worker_failed"}]) == []
    assert notes.calls == []


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "my_tracker_beside.py").write_text(
        "class Mine:\n    class Inner: pass\nVALUE = 3\n"
    )
    (tmp_path / "my_broken_tracker.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.setattr(
        trackers,
        "entry_points",
        lambda group: [EntryPoint("theirs", "my_tracker_beside:Mine", group)],
    )
    found = find_trackers(["tensorboard", "my_tracker_beside:Mine.Inner", "theirs"])
    assert [factory.__qualname__ for factory in found.values()] == [  # type: ignore[attr-defined]
        "TensorBoard",
        "Mine.Inner",
        "Mine",
    ]
    for name, message in {
        "tensorbord": "is not known here: give tensorboard, theirs, or package.module:factory",
        "no_such_module:Mine": "cannot be imported: No module named 'no_such_module'",
        "my_tracker_beside:Yours": "has no attribute 'Yours'",
        "my_tracker_beside:": "cannot be imported",
        "my_tracker_beside:VALUE": "is a int, not a class or a function",
        "my_broken_tracker:Mine": "cannot be imported: RuntimeError: no licence",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            find_trackers([name])
        assert str(error.value).startswith(f"trainer.trackers: {name}")


def test_numbers_have_names_that_trackers_share() -> None:
    step = {
        "event": "step",
        "step": 5,
        "mean_loss": 3.0,
        "mean_nll": None,
        "phases": {"forward": 0.25, "data_wait": 0.01},
        "gpu_memory_bytes": 1000,
        "data_hash": "00ff",
        "world_size": 2,
    }
    assert scalars(step) == {
        "train/loss": 3.0,
        "workers/world_size": 2.0,
        "phases/forward": 0.25,
        "phases/data_wait": 0.01,
        "gpu_memory_bytes/all": 1000.0,
    }
    validated = {"event": "validated", "step": 5, "valid_nll": 2.5, "best": True}
    assert scalars(validated) == {"valid/nll": 2.5}
    beside = {"event": "evaluated", "step": 5, "test_set": "valid", "bleu": 31.5, "best": False}
    assert scalars(beside) == {"valid/bleu": 31.5}
    by_hand = {"event": "evaluated", "step": 5, "test_set": "test_2016", "bleu": 30.0}
    assert scalars(by_hand) == {"evaluation/test_2016/bleu": 30.0}
    assert scalars({**by_hand, "step": None}) == {}
    assert scalars({"event": "worker_failed", "cause": "killed"}) == {}


def test_a_flat_configuration() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}

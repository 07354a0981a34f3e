"""What a first rank finds of the failures before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.interruption import failures_seen, interruption


def write(run_dir: Path, events: list[dict[str, Any]], failures: list[dict[str, Any]]) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    for file, lines in (("events.jsonl", events), ("logs/failures.jsonl", failures)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / file).write_text(text + '{"event": "cut sh')


def event(kind: str, at: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"event": kind, **fields, "time": at}


def failed(at: float, cause: str = "killed", *, final: bool = False) -> dict[str, Any]:
    return event("worker_failed", at, cause=cause, message=f"{cause} at {at}", final=final)


def test_a_fresh_run_comes_after_nothing(tmp_path: Path) -> None:
    assert interruption(tmp_path) is None
    write(tmp_path, [event("started")], [event("commanded")])
    assert interruption(tmp_path) is None
    assert failures_seen(tmp_path) == 1


def test_failures_without_an_update_between_them_are_one(tmp_path: Path) -> None:
    now = time.time()
    failures = [event("commanded", now - 100), failed(now - 75), failed(now - 40)]
    events = [
        event("started", failures_seen=1),
        event("step", step=50),
        event("resumed", failures_seen=2),
        event("recovered", failures_seen=2),
        event("resumed", failures_seen=3),  # it made no update
    ]
    failures.append(failed(now - 20, "hung"))
    write(tmp_path, events, failures)
    found = interruption(tmp_path)
    assert found is not None
    assert found.began == now - 40  # what came before is recovered from
    assert (found.cause, found.message) == ("hung", f"hung at {now - 20}")
    assert found.causes == ("hung",)  # the other one was counted by the attempt in between
    assert found.seen == failures_seen(tmp_path) == 4
    assert found.seconds() == pytest.approx(40, abs=5)


def test_clocks_of_other_machines_do_not_matter(tmp_path: Path) -> None:
    write(
        tmp_path,
        [event("started", 5000.0, failures_seen=0), event("recovered", 5000.0, failures_seen=0)],
        [failed(10.0)],
    )
    found = interruption(tmp_path)
    assert found is not None
    assert found.causes == ("killed",)


def test_a_planned_change_of_size_counts_as_such(tmp_path: Path) -> None:
    changes = [event("resized", 2, to=1, planned=True), event("resized", 3, to=2, planned=False)]
    write(tmp_path, [event("started")], changes)
    found = interruption(tmp_path)
    assert found is not None
    assert found.causes == ("resized",)


def test_a_run_that_is_resumed_by_hand_has_not_recovered_by_itself(tmp_path: Path) -> None:
    write(tmp_path, [event("started")], [failed(2), failed(3, final=True)])
    assert interruption(tmp_path) is None
    write(tmp_path, [event("started")], [failed(2), event("commanded", 86_400)])
    assert interruption(tmp_path) is None

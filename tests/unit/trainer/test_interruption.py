"""What a first rank finds of the failures before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.interruption import interruption


def write(run_dir: Path, events: list[dict[str, Any]], failures: list[dict[str, Any]]) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    for file, lines in (("events.jsonl", events), ("logs/failures.jsonl", failures)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run_dir / file).write_text(text + '{"event": "cut sh')


def event(kind: str, at: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, **fields, "time": at}


def failed(at: float, cause: str = "killed", *, final: bool = False) -> dict[str, Any]:
    return event("worker_failed", at, cause=cause, message=f"{cause} at {at}", final=final)


def test_a_fresh_run_comes_after_nothing(tmp_path: Path) -> None:
    assert interruption(tmp_path) is None
    write(tmp_path, [event("started", 1)], [])
    assert interruption(tmp_path) is None


def test_failures_without_an_update_between_them_are_one(tmp_path: Path) -> None:
    now = time.time()
    events = [
        event("started", now - 90),
        event("step", now - 80, step=50),
        event("recovered", now - 70),
        event("resumed", now - 30),
    ]
    failures = [failed(now - 75), failed(now - 40), failed(now - 20, "hung")]
    write(tmp_path, events, failures)
    found = interruption(tmp_path)
    assert found is not None
    assert found.began == now - 40  # what came before is recovered from
    assert found.cause == "hung"
    assert found.causes == ("hung",)  # the other one was counted by the attempt in between
    assert found.seconds() == pytest.approx(40, abs=5)


def test_a_planned_change_of_size_counts_as_such(tmp_path: Path) -> None:
    write(
        tmp_path,
        [event("started", 1)],
        [event("resized", 2, to=1, planned=True), event("resized", 3, to=2, planned=False)],
    )
    found = interruption(tmp_path)
    assert found is not None
    assert found.causes == ("resized",)


def test_a_run_that_was_given_up_has_not_recovered_by_itself(tmp_path: Path) -> None:
    write(tmp_path, [event("started", 1)], [failed(2), failed(3, final=True)])
    assert interruption(tmp_path) is None
    write(tmp_path, [event("started", 1), event("finished", 4)], [failed(2)])
    assert interruption(tmp_path) is None

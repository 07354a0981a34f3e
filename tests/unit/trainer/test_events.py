"""events.jsonl as it is written."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from trainer.events import EventLog


def test_each_event_is_one_line_with_its_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.write("step", step=1, loss=0.5, grad_norm=math.nan)
    log.write("finished", reason="max_steps")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "finished"]
    assert lines[0]["grad_norm"] is None
    assert lines[0]["loss"] == 0.5
    assert lines[1]["time"] > 1.7e9


def test_after_a_killed_writer_the_next_event_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "step", "step": 1}\n{"event": "st')
    log = EventLog(file)
    log.write("resumed", step=1)
    log.close()
    assert json.loads(file.read_text().splitlines()[-1])["event"] == "resumed"


def test_a_full_disk_delays_events_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "events.jsonl"
    log = EventLog(file)
    write, space = os.write, 40  # bytes that the disk still takes

    def limited(descriptor: int, data: bytes) -> int:
        nonlocal space
        if space == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, data[:space])
        space -= taken
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", limited)
        for step in (1, 2, 3):
            log.write("step", step=step)
    assert file.stat().st_size == 40
    log.write("step", step=4)
    log.close()
    events = []
    for line in file.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            assert line == file.read_text()[:40]
    assert [event["step"] for event in events] == [1, 2, 3, 4]

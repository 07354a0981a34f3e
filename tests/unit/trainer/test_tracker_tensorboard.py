"""TensorBoard's event files, read back as TensorBoard reads them."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from trainer.config import load_config
from trainer.tracker_tensorboard import TensorBoard
from trainer.trackers import Trackers

CONFIG = load_config(None).model_dump(mode="json")


def records(folder: Path) -> list[Any]:
    """The events of all files of a folder, in the order of their names.

    A record is a length, its checksum, the data, their checksum:
    https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/tensorflow_stub/pywrap_tensorflow.py
    """
    found = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            found.append(event)
            at += 12 + length + 4
        assert at == len(data)
    return found


def series(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[str]]]:
    """Scalars and texts by tag; a session that begins at a step voids what is later, as
    TensorBoard's event_accumulator does.
    """
    numbers: dict[str, list[tuple[int, float]]] = defaultdict(list)
    texts: dict[str, list[str]] = defaultdict(list)
    for event in records(folder):
        if event.session_log.status == SessionLog.START:
            for tag in numbers:
                numbers[tag] = [point for point in numbers[tag] if point[0] < event.step]
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                numbers[value.tag].append((event.step, value.simple_value))
            else:
                texts[value.tag.removesuffix("/text_summary")].append(
                    value.tensor.string_val[0].decode()
                )
    return numbers, texts


def run(run_dir: Path, first: dict[str, Any], steps: range) -> None:
    """One command's part of a run: ``steps``, and a validation after the last."""
    complaints: list[str] = []
    tracker = Trackers({"tensorboard": TensorBoard}, "run", run_dir, CONFIG, complaints.append)
    tracker.event({**first, "time": 1000.0})
    for step in steps:
        tracker.event(
            {
                "event": "step",
                "step": step,
                "mean_loss": 10.0 - step / 100,
                "mfu": None,
                "tokens_per_second": 1234.5,
                "phases": {"forward": 0.25},
                "time": 1000.0 + step,
            }
        )
    tracker.event({"event": "validated", "step": steps[-1], "valid_nll": 2.0, "time": 2000.0})
    tracker.close()
    assert complaints == []


def test_one_series_across_resumes(tmp_path: Path) -> None:
    run(tmp_path, {"event": "started", "step": 0}, range(1, 51))
    # Its last checkpoint was of step 40, and it is trained on otherwise than before.
    run(tmp_path, {"event": "resumed", "step": 40}, range(45, 91, 5))
    run(tmp_path, {"event": "resumed", "step": 90}, range(95, 101, 5))
    numbers, texts = series(tmp_path / "tensorboard")
    steps = [step for step, _ in numbers["train/loss"]]
    assert steps == [*range(1, 41), *range(45, 101, 5)]
    assert numbers["train/loss"][-1] == (100, pytest.approx(9.0))
    assert numbers["speed/tokens_per_second"][0] == (1, 1234.5)
    assert numbers["phases/forward"][0] == (1, 0.25)
    assert numbers["valid/nll"] == [(90, 2.0), (100, 2.0)]  # that of step 50 is void
    assert "speed/mfu" not in numbers
    (config,) = texts["config"]
    assert '"validate_every": 1000' in config
    assert len(texts["events"]) == 3
    assert '"step": 40' in texts["events"][1]


def test_the_clock_is_that_of_the_event(tmp_path: Path) -> None:
    run(tmp_path, {"event": "started", "step": 0}, range(1, 3))
    times = {
        event.step: event.wall_time
        for event in records(tmp_path / "tensorboard")
        if event.summary.value and event.summary.value[0].tag == "train/loss"
    }
    assert times == {1: 1001.0, 2: 1002.0}

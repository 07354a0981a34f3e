"""A launched job's lines, as they are told here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from cluster.console import JsonConsole, TextConsole
from cluster.launch.follow import follow_training
from cluster.launch.target import Ended, LogLine, Update, Waiting
from cluster.progress import Narrator
from tests.targets import ended
from trainer.config import RunConfig

EVENTS = [
    {"event": "started", "step": 0, "world_size": 2, "time": 1.0},
    {"event": "step", "step": 50, "epoch": 0, "mean_loss": 5.5, "learning_rate": 1e-3,
     "tokens_per_second": 1000.0, "elapsed_s": 10.0, "time": 11.0},
    {"event": "worker_failed", "cause": "killed", "message": "rank 1 died", "restarts_left": 2,
     "time": 12.0},
    {"event": "step", "step": 100, "epoch": 0, "mean_loss": 4.5, "learning_rate": 1e-3,
     "tokens_per_second": 1000.0, "elapsed_s": 20.0, "time": 32.0},
    {"event": "finished", "step": 100, "reason": "max_steps", "time": 33.0},
]  # fmt: skip


def logged() -> list[str]:
    """What the command on the cluster writes."""
    stream = io.StringIO()
    console = JsonConsole(stream)
    console.name("one")
    console.say("training /mnt/babelray/runs/one on 2 workers")
    narrator = Narrator(RunConfig())
    for event in EVENTS:
        console.tell(narrator.hear(event))
    return stream.getvalue().splitlines()


def told_here() -> str:
    """What a command on this machine would have told of the same events."""
    stream = io.StringIO()
    with TextConsole(stream) as console:
        console.say("training /mnt/babelray/runs/one on 2 workers")
        narrator = Narrator(RunConfig())
        for event in EVENTS:
            console.tell(narrator.hear(event))
    return stream.getvalue()


def follow(updates: list[Update]) -> tuple[str, object]:
    stream = io.StringIO()
    with TextConsole(stream) as console:
        job = follow_training(iter(updates), RunConfig(), console)
    return stream.getvalue(), job


def test_a_run_there_is_told_as_one_here() -> None:
    def updates() -> Iterator[Update]:
        yield from map(LogLine, logged())
        yield ended("succeeded")

    text, job = follow(list(updates()))
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        " ".join(line.split()) for line in told_here().splitlines()
    ]
    assert job == ended("succeeded").job


def test_hints_of_the_cluster_are_not_for_here() -> None:
    entry = {"message": "next: babelray evaluate one --runs /mnt/x", "level": "info"}
    line = json.dumps({**entry, "time": "2026-01-01T00:00:00Z"})
    assert follow([LogLine(line)])[0] == ""


def test_other_lines_pass_as_they_are() -> None:
    lines = ["Job submission server address: x", "{not json", '{"a": 1}', "[1, 2]", ""]
    text, _ = follow([LogLine(line) for line in lines])
    assert text.splitlines() == lines


def test_why_it_waits_is_told() -> None:
    text, job = follow([Waiting("3 Insufficient nvidia.com/gpu"), Ended(ended("failed").job)])
    assert text == "waiting: 3 Insufficient nvidia.com/gpu\n"
    assert job is not None


def test_a_job_that_vanishes_has_no_end() -> None:
    assert follow([LogLine("x")])[1] is None


def test_a_run_that_was_asked_to_stop_did_not_finish() -> None:
    event = {"event": "finished", "step": 60, "reason": "stopped", "level": "info"}
    line = json.dumps(
        {**event, "message": "step 60 finished: stopped", "time": "2026-01-01T00:00:00Z"}
    )
    _, job = follow([LogLine(line), ended("succeeded")])
    assert job == ended("stopped").job

"""Events as lines for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.progress import Narrator, Tail, duration
from trainer.config import load_config


def narrator(*settings: str) -> Narrator:
    return Narrator(load_config(None, settings))


def step(number: int, elapsed_s: float) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "epoch": 2,
        "mean_loss": 3.25,
        "tokens_per_second": 12345.6,
        "learning_rate": 0.001,
        "elapsed_s": elapsed_s,
    }


def test_tail_gives_what_is_appended_and_waits_for_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    tail = Tail(file)
    assert list(tail.read()) == []
    file.write_text('{"a": 1}\n{"b"')
    assert list(tail.read()) == [{"a": 1}]
    with file.open("a") as stream:
        stream.write(': 2}\nbroken\n[1]\n{"ä": 3}\n')
    assert list(tail.read()) == [{"b": 2}, {"ä": 3}]
    assert list(tail.read()) == []


def test_tail_begins_at_the_end_of_an_earlier_attempt(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"old": 1}\n')
    tail = Tail(file)
    with file.open("a") as stream:
        stream.write('{"new": 1}\n')
    assert list(tail.read()) == [{"new": 1}]


def test_tail_survives_a_file_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"old": 1}\n' * 5)
    tail = Tail(file)
    file.write_text('{"kept": 1}\n')
    assert list(tail.read()) == []
    with file.open("a") as stream:
        stream.write('{"new": 1}\n')
    assert list(tail.read()) == [{"new": 1}]


def test_a_step_in_one_line() -> None:
    line = narrator("trainer.max_steps=100").line(step(10, 5.0))
    assert line is not None
    for part in ("10", "epoch   2", "3.2500", "12,346 tokens/s", "1.00e-03"):
        assert part in line
    assert "left" not in line  # one point is no pace


def test_a_step_says_how_much_time_is_left_once_it_is_known() -> None:
    told = narrator("trainer.max_steps=1000", "trainer.max_minutes=2")
    line = told.line(step(10, 10.0))
    assert line is not None
    assert line.endswith("left 2 min")
    for number in (20, 30, 40):
        line = told.line(step(number, number * 0.1 + 9))
    assert line is not None
    assert line.endswith("left at least 2 min")  # 960 steps at 0.1 s


def test_a_loss_that_json_cannot_hold_is_a_dash() -> None:
    line = narrator().line({**step(1, 1.0), "mean_loss": None})
    assert line is not None
    assert "loss        -" in line


def test_other_events() -> None:
    told = narrator()
    lines = [
        told.line(event)
        for event in (
            {"event": "started", "step": 0, "parameters": 1234567, "steps_per_epoch": 89},
            {"event": "resumed", "step": 4, "start_s": {"ray": 4.0, "workers": 2.04, "data": 0.01}},
            {"event": "validated", "step": 5, "valid_nll": 1.5, "perplexity": 4.4817},
            {"event": "checkpoint", "step": 5, "bytes": 2_500_000, "seconds": 0.25, "best": True},
            {"event": "worker_failed", "message": "rank 1: gone", "final": False},
            {"event": "worker_failed", "message": "rank 1: no data", "final": True},
            {"event": "finished", "step": 5, "reason": "max_steps"},
            {"event": "something new", "step": 6},
        )
    ]
    assert lines == [
        "started: 1,234,567 parameters, 89 steps an epoch",
        "resumed from step 4; 6.0 s after the command: Ray 4.0, workers 2.0 s",
        "step      5  validated: nll 1.5000, perplexity 4.48",
        "step      5  checkpoint saved: 2.5 MB in 0.2 s, the best so far",
        "failed: rank 1: gone; restarting from the last checkpoint",
        None,
        "step      5  finished: max_steps",
        None,
    ]
    assert (told.last_step, told.reason, told.valid_nll) == (5, "max_steps", 1.5)


def test_what_failed_and_what_is_done_about_it() -> None:
    told = narrator()
    failed = {"event": "worker_failed", "final": False}
    no_room = {**failed, "cause": "start", "message": "no room"}
    lines = [
        told.line(event)
        for event in (
            {**failed, "cause": "killed", "message": "rank 1: gone", "restarts_left": 2},
            {**failed, "cause": "preempted", "message": "saved at step 7", "restarts_left": 3},
            no_room,
            no_room,
            {**failed, "cause": "killed", "message": "rank 0: gone", "restarts_left": 0},
            no_room,
            {"event": "waiting", "room": 1, "needed": 2},
            {"event": "resized", "from": 4, "to": 1, "planned": False, "saved_at": None},
            {"event": "resized", "from": 1, "to": 2, "planned": True, "saved_at": 90},
            {"event": "resized", "from": 1, "to": 2, "planned": True, "saved_at": None},
        )
    ]
    assert lines == [
        "failed: rank 1: gone; restarting from the last checkpoint "
        "(2 more without a new checkpoint are borne)",
        "moving on: saved at step 7",
        "the workers do not start: no room; trying again",
        None,
        "failed: rank 0: gone; restarting from the last checkpoint "
        "(0 more without a new checkpoint are borne)",
        "the workers do not start: no room; trying again",
        "waiting for machines: room for 1 of at least 2 workers",
        "going on with 1 worker instead of 4",
        "going on with 2 workers instead of 1",
        "going on with 2 workers instead of 1; no checkpoint was saved in time: "
        "some steps will be done again",
    ]


def test_a_run_that_may_stop_early_says_how_near_it_is() -> None:
    past = [
        {"event": "validated", "step": 5, "valid_nll": 1.0, "best": True},
        {"event": "validated", "step": 10, "valid_nll": 1.1, "best": False},
    ]
    told = Narrator(load_config(None, ["trainer.patience=3"]), past)
    assert told.line({"event": "resumed", "step": 10}) == "resumed from step 10"
    line = told.line({"event": "validated", "step": 15, "valid_nll": 1.2, "best": False})
    assert line is not None
    assert line.endswith("; 2 without a better one, the run stops at 3")
    line = told.line({"event": "validated", "step": 20, "valid_nll": 0.9, "best": True})
    assert line is not None
    assert "without" not in line

    scored = Narrator(
        load_config(None, ["trainer.patience=3", "trainer.best_by=bleu", "trainer.bleu_every=10"])
    )
    line = scored.line({"event": "validated", "step": 5, "valid_nll": 1.1, "best": False})
    assert line is not None
    assert "without" not in line
    event = {"event": "evaluated", "step": 5, "test_set": "valid", "bleu": 30.0, "best": False}
    line = scored.line(event)
    assert line is not None
    assert line.endswith("; 1 without a better one, the run stops at 3")


def test_the_time_without_training_is_told_at_the_end() -> None:
    told = narrator()
    lost = {"event": "worker_failed", "cause": "killed", "message": "gone", "restarts_left": 2}
    for seconds in (61.5, 8.0):
        assert told.hear(lost).status.doing == "restarting"
        told.hear({"event": "resumed", "step": 40})
        news = told.hear({"event": "recovered", "step": 41, "cause": "killed", "seconds": seconds})
        assert news.line == (
            f"step     41  training again, {seconds:.1f} s after the workers failed"
        )
        assert news.status.doing == "training"
    news = told.hear({"event": "finished", "step": 50, "reason": "max_steps"})
    assert news.line == (
        "step     50  finished: max_steps; restarted 2 times, 1:10 without training"
    )


def test_news_have_a_level_and_a_state() -> None:
    told = narrator("trainer.max_steps=100")
    assert told.hear({"event": "started", "step": 0}).status.doing == "training"
    news = told.hear(step(25, 5.0))
    assert (news.level, news.status.done, news.status.step) == ("info", 0.25, 25)
    assert news.status.loss == 3.25
    failed = {"event": "worker_failed", "cause": "killed", "message": "gone"}
    assert told.hear({**failed, "final": False}).level == "warning"
    assert told.hear({**failed, "final": True}).level == "error"
    assert told.hear({"event": "waiting", "room": 0, "needed": 1}).status.doing == (
        "waiting for machines"
    )
    checkpoint = {"event": "checkpoint", "step": 20, "bytes": 1, "seconds": 1.0}
    assert told.hear(checkpoint).status.step == 25  # told of late


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (723, "12:03"), (12345, "3:25:45")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_events_are_json_lines_as_the_trainer_writes_them(tmp_path: Path) -> None:
    from trainer.events import EventLog

    tail = Tail(tmp_path / "events.jsonl")
    log = EventLog(tmp_path / "events.jsonl")
    log.write("validated", step=3, valid_nll=2.0, perplexity=7.389)
    log.close()
    (event,) = tail.read()
    assert json.dumps(event)
    assert narrator().line(event) == "step      3  validated: nll 2.0000, perplexity 7.39"


def test_a_run_that_goes_on_stands_where_its_log_ends() -> None:
    past = [
        {"event": "started", "step": 0},
        step(50, 5.0),
        {"event": "checkpoint", "step": 40},  # committed later
    ]
    told = Narrator(load_config(None, ()), past)
    assert told.last_step == 50
    news = told.hear({"event": "waiting", "room": 0, "needed": 1})
    assert news.status.step == 50
    told.hear({"event": "resumed", "step": 40})
    assert told.last_step == 40

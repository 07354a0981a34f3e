"""A run's log as a report reads it: its end, its restarts, and lines that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.trainer.test_report_numbers import _begin, _interrupted, _step, _write
from trainer import (
    exhibits_cost,
    exhibits_method,
    exhibits_reliability,
    exhibits_summary,
    report_lines,
)
from trainer.events import history
from trainer.exhibits_cost import Rate
from trainer.report import write_report
from trainer.report_comparison import read_runs, write_comparison
from trainer.report_log import Event, RunLog, read_run
from trainer.report_numbers import numbers
from trainer.run import read_events

_COMMANDED = {"event": "commanded"}


def _failed(time: float, cause: str = "killed", *, final: bool = False) -> Event:
    return {"event": "worker_failed", "cause": cause, "message": "m", "time": time, "final": final}


def _end(kind: str, step: int, time: float, **values: Any) -> Event:
    """The last line of workers that leave, with the run's sums."""
    return {**_step(step, time, **values), "event": kind, "reason": "max_steps"}


def _tiles(log: RunLog) -> dict[str, dict[str, str]]:
    return {tile["label"]: tile for tile in exhibits_summary.tiles(log)}


@pytest.mark.parametrize("kind", ["finished", "handed_over"])
def test_the_end_is_the_runs_and_not_the_last_logged_steps(tmp_path, kind):
    """300 steps of which only the first is logged, the last 50 by workers that logged none."""
    events = [
        _begin("started", 0, 1000.0, sustained_flops=1e12, steps_per_epoch=100),
        _step(1, 1001.0, epoch=0),
        _end("handed_over", 250, 1250.0),
        _begin("resumed", 250, 1260.0, sustained_flops=1e12, steps_per_epoch=100),
        _end(kind, 300, 1310.0, data_hash="cd"),
    ]
    log = _write(tmp_path, events)
    found = numbers(log, Rate(1.0))
    training = found["training"]
    assert (training["steps"], training["tokens_step"], training["epoch"]) == (300, 300, 2)
    assert (training["source_tokens"], training["target_tokens"]) == (300 * 90, 300 * 100)
    assert training["training_seconds"] == 300
    assert (training["data_hash"], training["data_hash_step"]) == ("cd", 300)
    assert found["cost"]["counted_flops"] == pytest.approx(300 * 5e9)
    assert found["cost"]["energy_joules"] == pytest.approx(300 * 7)
    assert found["cost"]["held_s"] == pytest.approx(300)
    assert _tiles(log)["Tokens trained on"]["value"] == "57k"
    assert "last logged" not in str(_tiles(log))
    [text] = [
        text for text in exhibits_method.method(log, exhibits_cost.cost(log)) if "upd" in text
    ]
    assert "300 updates, 57k tokens in all." in text
    assert "up to step 300: the same" in write_report(log.run_dir).read_text()


def test_what_is_known_of_an_earlier_step_alone_says_so(tmp_path):
    """A log of an earlier version: its last line has no sums."""
    finished = {"event": "finished", "step": 64, "reason": "max_steps", "elapsed_s": 64.0}
    log = _write(tmp_path, [*_interrupted()[:7], {**finished, "time": 1064.0}])
    tiles = _tiles(log)
    assert tiles["Steps"]["value"] == "64"
    assert tiles["Tokens trained on"]["note"].endswith(
        "target tokens, at step 60 (the last logged)"
    )
    assert tiles["Training time"]["note"] == "set-up not counted"
    text = " ".join(exhibits_method.method(log, exhibits_cost.cost(log)))
    assert "64 updates, 11.4k tokens in all, at step 60 (the last logged)." in text
    assert "up to step 60 (the last logged): the same" in write_report(log.run_dir).read_text()
    page = write_comparison(read_runs([log.run_dir]), tmp_path / "page.html").read_text()
    assert "at step 60 (the last logged)" in page
    assert "ab at step 60" in page


def test_sums_that_were_undone_are_not_the_end(tmp_path):
    """They left at step 60, but the checkpoint of then could not be read."""
    events = _interrupted()
    events.insert(7, _end("handed_over", 60, 1061.0, data_hash="undone"))
    log = _write(tmp_path, events[:9])
    assert log.totals["step"] == 40
    assert log.hashed["data_hash"] == "ab"
    assert log.end["step"] == 40


@pytest.mark.parametrize("noted", [True, False])
def test_nobody_pays_from_giving_up_to_the_resume(tmp_path, noted):
    """Failed, started anew in vain, given up; resumed an hour later."""
    failures = [_failed(1061.0), _failed(1065.0, "start"), _failed(1066.0, final=True)]
    seen: dict[str, Any] = {}
    if noted:
        failures = [{**_COMMANDED, "time": 990.0}, *failures, {**_COMMANDED, "time": 4600.0}]
        seen = {"failures_seen": len(failures)}
    events = _interrupted(**seen)
    for event in events[7:]:
        event["time"] += 3600.0
    log = _write(tmp_path, events, failures)
    found = exhibits_reliability.numbers(log)
    assert [row["cause"] for row in found["restarts"]] == ["killed", "start", "given_up"]
    assert [row["lost_seconds"] for row in found["restarts"]] == [4.0, 1.0, None]
    assert found["useful_share"] == pytest.approx(100 / 125)
    assert found["redone_steps"] == 20
    cost = exhibits_cost.cost(log, Rate(3.0))
    assert cost.held_s == pytest.approx(60 + 6 + 60)
    assert cost.price == pytest.approx(3.0 * 126 * 2 / 3600)
    assert _tiles(log)["Workers"]["note"] == "restarted twice, resumed once"


def test_a_command_that_was_killed_while_it_restarted(tmp_path):
    """Nobody noted its end: it counts up to its last word."""
    waiting = {"event": "waiting", "room": 1, "needed": 2, "time": 1063.0}
    failures = [_failed(1061.0), waiting, {**_COMMANDED, "time": 4600.0}]
    events = _interrupted(failures_seen=3)
    for event in events[7:]:
        event["time"] += 3600.0
    log = _write(tmp_path, events, failures)
    found = exhibits_reliability.numbers(log)
    assert found["restarts_by_cause"] == {"command": 1, "killed": 1}
    assert found["lost_seconds"] == 2.0
    assert exhibits_cost.cost(log).held_s == pytest.approx(60 + 3 + 60)


def test_a_restart_that_failed_before_it_logged_anything(tmp_path):
    log = _write(tmp_path, _interrupted(), [_failed(1061.0), _failed(1063.0, "start")])
    found = exhibits_reliability.numbers(log)
    assert [(row["step"], row["lost_seconds"]) for row in found["restarts"]] == [
        (None, 2.0), (40, 7.0),
    ]  # fmt: skip
    assert found["restarts_by_cause"] == {"killed": 1, "start": 1}
    assert _tiles(log)["Workers"]["note"] == "restarted twice"
    # The same, and then it was given up.
    events = _interrupted()[:7]
    log = _write(tmp_path, events, [_failed(1061.0), _failed(1073.0, final=True)])
    found = exhibits_reliability.numbers(log)
    assert (len(found["restarts"]), found["lost_seconds"]) == (1, 12.0)
    assert found["useful_share"] == pytest.approx(60 / 72)
    assert exhibits_cost.cost(log).held_s == pytest.approx(73)
    assert "none came up" in write_report(log.run_dir).read_text()
    # And one whose first workers could not even start.
    failures = [{**_COMMANDED, "time": 980.0}, _failed(990.0, "start")]
    log = _write(tmp_path, [_begin("started", 0, 1000.0, failures_seen=2), *events[1:]], failures)
    [row] = exhibits_reliability.numbers(log)["restarts"]
    assert (row["cause"], row["lost_seconds"], row["workers_before"]) == ("start", 10.0, None)
    assert exhibits_cost.cost(log).held_s == pytest.approx(70)


def test_workers_that_died_again_before_an_update_are_lost_once(tmp_path):
    """The run measures a recovery from the first failure; no second may be counted twice."""
    events = _interrupted()
    recovered = {"event": "recovered", "step": 41, "cause": "killed", "seconds": 12.0}
    events[7:7] = [_begin("resumed", 40, 1064.0, failures_seen=1)]
    events[8] = {**events[8], "failures_seen": 2}
    events.insert(9, {**recovered, "time": 1073.0, "failures_seen": 2})
    log = _write(tmp_path, events, [_failed(1061.0), _failed(1066.0)])
    found = exhibits_reliability.numbers(log)
    assert [row["lost_seconds"] for row in found["restarts"]] == [5.0, 7.0]
    assert found["redone_steps"] == 20
    assert _tiles(log)["Workers"]["note"] == "restarted twice"


def test_a_run_that_a_command_resumed_was_not_restarted(tmp_path):
    assert _tiles(_write(tmp_path, _interrupted()))["Workers"]["note"] == "resumed once"
    assert _tiles(_write(tmp_path, _interrupted()[:7]))["Workers"]["note"] == "never restarted"


@pytest.mark.parametrize(
    "line",
    [
        {"event": "step", "step": "7"},
        {"event": "step", "step": None},
        {"event": "step", "step": 7.5},
        {"event": "step", "step": True},
        {"event": "validated", "step": [1], "perplexity": 1.0, "valid_nll": 1.0},
        {"event": "finished", "step": "end"},
        {"event": "checkpoint"},
        {"event": "resumed", "step": "x"},
        {"event": ["step"], "step": 7},
        {"event": "step", "step": 7, "elapsed_s": "1 s"},
        {"event": "step", "step": 7, "time": "now"},
    ],
)
def test_a_line_that_is_none_is_as_if_torn(tmp_path, line):
    want = numbers(_write(tmp_path, _interrupted()))
    log = _write(tmp_path, [*_interrupted()[:3], line, *_interrupted()[3:], line])
    assert numbers(log) == want


def test_a_validation_without_a_number(tmp_path):
    bad = {"event": "validated", "step": 60, "valid_nll": None, "perplexity": None, "time": 1.0}
    good = {**bad, "step": 50, "valid_nll": 1.0, "perplexity": 2.718}
    log = _write(tmp_path, [*_interrupted()[:7], good, bad])
    assert (
        _tiles(log)["Validation perplexity"]["note"]
        == "best, at step 50; the last, at step 50: 2.72"
    )
    write_report(log.run_dir)


def test_of_very_many_steps_evenly_taken_ones_are_read(tmp_path, monkeypatch):
    def events() -> list[Event]:
        first = [_step(step, 1000.0 + step, skew=1 + step / 1e4) for step in range(1, 601)]
        second = [_step(step, 1100.0 + step, skew=1 + step / 1e4) for step in range(401, 2001)]
        resumed = _begin("resumed", 400, 1500.0, sustained_flops=1e12)
        return [_begin("started", 0, 1000.0, sustained_flops=1e12), *first, resumed, *second]

    every = numbers(_write(tmp_path, events(), [_failed(1600.0)]))
    monkeypatch.setattr(report_lines, "_MAX_STEPS", 100)
    log = _write(tmp_path, events(), [_failed(1600.0)])
    with (log.run_dir / "events.jsonl").open("a") as stream:
        stream.write('{"event": "step", "step": 2001, "ela')  # cut off
    log = read_run(log.run_dir)
    assert len(log.raw) < 110
    found = numbers(log)
    for section in ("cost", "reliability"):
        assert found[section] == every[section]
    middle = found["training"].pop("skew"), every["training"].pop("skew")
    assert middle[0] == pytest.approx(middle[1], rel=0.01)
    assert found["training"] == every["training"]
    assert found["curves"]["loss"]["training"]["step"][-1] == 2000


def test_one_history_is_the_same_as_the_runs_own(tmp_path):
    skipped = {"event": "skipped", "step": 60, "reason": "loss", "time": 1.0}
    events = _interrupted()
    events[7:7] = [
        skipped,
        {**skipped, "step": 30},
        {"event": "evaluated", "step": 60, "time": 2.0},
    ]
    log = _write(tmp_path, [*events, _begin("started", 0, 3000.0), _step(10, 3010.0)])
    assert history(log.raw) == read_events(log.run_dir)
    assert json.dumps(log.events) == json.dumps(read_events(log.run_dir))

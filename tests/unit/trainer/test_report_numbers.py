"""The numbers behind a report, reckoned from logs whose sums are known."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.manifest import Manifest
from model.cost import Work, training_flops
from trainer import (
    exhibits_cost,
    exhibits_curves,
    exhibits_method,
    exhibits_phases,
    exhibits_reliability,
    exhibits_summary,
    phases,
)
from trainer.config import RunConfig, load_config, parse_config
from trainer.exhibits_cost import Rate
from trainer.figures import Series
from trainer.report_log import Event, RunLog, read_run
from trainer.report_numbers import differences, numbers
from trainer.run import read_config

_RATE = 1e12  # sustained, all workers together


def _begin(event: str, step: int, time: float, **values: Any) -> Event:
    return {"event": event, "step": step, "time": time, "world_size": 2, **values}


def _step(step: int, time: float, **values: Any) -> Event:
    """A second a step, 5e9 operations, 7 joules."""
    return {
        "event": "step", "step": step, "time": time, "elapsed_s": float(step), "flops": step * 5e9,
        "energy_joules": step * 7.0, "source_tokens": step * 90, "target_tokens": step * 100,
        "mean_nll": 5.0, "world_size": 2, "data_hash": "ab", **values,
    }  # fmt: skip


def _interrupted(resumed_at: int = 40, **values: Any) -> list[Event]:
    """Steps to 60, killed, on from an earlier one to 100; the clock starts at 1000."""
    return [
        _begin("started", 0, 1000.0, sustained_flops=_RATE),
        *(_step(step, 1000.0 + step) for step in range(10, 61, 10)),
        _begin("resumed", resumed_at, 1070.0, sustained_flops=_RATE, **values),
        *(
            _step(step, 1070.0 + step - resumed_at)
            for step in range(resumed_at - resumed_at % 10 + 10, 101, 10)
        ),
    ]


_KILLED = {"event": "worker_failed", "cause": "killed", "message": "rank 1 died", "time": 1061.0}


def _write(folder: Path, events: list[Event], failures: list[Event] | None = None) -> RunLog:
    run_dir = folder / "runs" / "demo"
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    config = RunConfig(data={"root": str(folder / "data"), "corpus": "embedded"})
    (run_dir / "config.json").write_text(config.to_json())
    for name, lines in (("events.jsonl", events), ("logs/failures.jsonl", failures or [])):
        (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(run_dir)


def test_work_that_was_undone_was_paid_for(tmp_path):
    cost = exhibits_cost.cost(_write(tmp_path, _interrupted(), [_KILLED]), Rate(3.0, "EUR"))
    assert cost.training_s == 120  # 60, and 60 from step 40 on
    assert cost.counted_flops == pytest.approx(120 * 5e9)
    assert not cost.is_reckoned
    assert cost.energy_joules == pytest.approx(120 * 7.0)
    assert cost.energy_kwh == pytest.approx(840 / 3.6e6)
    assert cost.paper_flops == pytest.approx(120 * _RATE)
    assert cost.ratio == pytest.approx(5e9 / _RATE)
    assert cost.device_hours == pytest.approx(120 * 2 / 3600)
    # 60 s, 10 s of restart, 60 s.
    assert cost.held_s == pytest.approx(130)
    assert cost.price == pytest.approx(3.0 * 130 * 2 / 3600)
    told = {row["name"]: row["value"] for row in exhibits_cost.rows(cost)}
    assert told["Operations, the paper's method"] == "1.2·10¹⁴"
    assert told["The paper's own models"] == "3.3·10¹⁸ base, 2.3·10¹⁹ big"
    assert told["Price"].endswith(" EUR")


def test_what_a_restart_cost(tmp_path):
    found = exhibits_reliability.numbers(_write(tmp_path, _interrupted(), [_KILLED]))
    [restart] = found["restarts"]
    assert (restart["cause"], restart["message"], restart["step"]) == ("killed", "rank 1 died", 40)
    assert restart["lost_seconds"] == pytest.approx(9.0)  # from the failure to the new workers
    assert (restart["redone_steps"], restart["redone_seconds"]) == (20, 20.0)
    assert found["restarts_by_cause"] == {"killed": 1}
    assert found["useful_share"] == pytest.approx(100 / 129)
    assert found["data_hash"] == "ab"


def test_the_runs_own_measure_of_a_recovery_comes_first(tmp_path):
    events = _interrupted()
    measured = {"event": "recovered", "step": 41, "cause": "hung", "seconds": 12.5, "message": "m"}
    events.insert(8, {**measured, "time": 1071.0})
    found = exhibits_reliability.numbers(_write(tmp_path, events))
    assert found["restarts"][0]["lost_seconds"] == 12.5
    assert found["restarts_by_cause"] == {"hung": 1}
    [mark] = exhibits_curves.marks(_write(tmp_path, events))
    assert (mark.kind, list(mark.x)) == ("restarted", [40])


def test_a_checkpoint_between_two_logged_steps(tmp_path):
    found = exhibits_reliability.numbers(_write(tmp_path, _interrupted(45), [_KILLED]))
    assert found["restarts"][0]["redone_seconds"] == pytest.approx(15.0)
    assert found["restarts"][0]["redone_steps"] == 15


def test_nobody_holds_devices_between_a_stop_and_a_resume_by_hand(tmp_path):
    events = _interrupted(60)
    events.insert(7, {"event": "finished", "step": 60, "reason": "stopped", "time": 1060.0})
    log = _write(tmp_path, events)
    [restart] = exhibits_reliability.numbers(log)["restarts"]
    assert (restart["cause"], restart["lost_seconds"]) == ("stopped", None)
    assert exhibits_cost.cost(log).held_s == pytest.approx(100.0)
    assert [mark.kind for mark in exhibits_curves.marks(log)] == ["resumed"]
    # Killed with its command, it says nothing of why.
    log = _write(tmp_path, _interrupted(60))
    assert exhibits_reliability.numbers(log)["restarts"][0]["cause"] == "command"


def test_marks_of_all_that_can_happen(tmp_path):
    events = _interrupted()
    for event in events[7:]:
        event["world_size"] = 1
    skipped = {"event": "skipped", "reason": "spike", "time": 1.0}
    events[7:7] = [{**skipped, "step": 63}, {**skipped, "step": 64, "reason": "loss"}]
    events.append({"event": "rewound", "step": 90, "to_step": 80, "time": 2.0})
    log = _write(tmp_path, events, [_KILLED])
    assert {mark.kind: list(mark.x) for mark in exhibits_curves.marks(log)} == {
        "resized": [40], "skipped": [63, 64], "rewound": [90],
    }  # fmt: skip
    found = exhibits_reliability.numbers(log)
    assert found["skipped_by_reason"] == {"loss": 1, "spike": 1}
    assert (found["skipped_steps"], found["rewinds"]) == (2, 1)


def test_a_log_of_an_earlier_version(tmp_path):
    """No count, no rate, no phases: said, not guessed."""
    new = ("flops", "energy_joules", "sustained_flops")
    events = [
        {name: value for name, value in event.items() if name not in new}
        for event in _interrupted()
    ]
    log = _write(tmp_path, events, [_KILLED])
    cost = exhibits_cost.cost(log)
    assert (cost.counted_flops, cost.paper_flops, cost.ratio, cost.energy_joules) == (None,) * 4
    values = [row["value"] for row in exhibits_cost.rows(cost)]
    assert sum(value.startswith("not known: ") for value in values) == 3
    assert exhibits_phases.rows(log) == []
    assert exhibits_phases.chart(log) is None


def test_operations_of_an_earlier_version_follow_from_the_tokens(trained_run, tmp_path):
    config = read_config(trained_run)
    manifest = Manifest.load(config.data.folder())
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(config.to_json())
    data = manifest.data
    event = {"event": "step", "step": 9, "elapsed_s": 1.0, "time": 5.0}
    tokens = {"source_tokens": 3 * data.source_tokens, "target_tokens": 3 * data.target_tokens}
    (run_dir / "events.jsonl").write_text(json.dumps({**event, **tokens}) + "\n")
    cost = exhibits_cost.cost(read_run(run_dir))
    sources, targets = manifest.lengths.T.tolist()
    an_epoch = training_flops(
        config.model, Work.of(sources, targets), vocab_size=manifest.vocabulary_size
    )
    assert cost.is_reckoned
    assert cost.counted_flops == pytest.approx(3 * an_epoch, rel=1e-9)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_is_a_price(price):
    with pytest.raises(UserError, match="--price"):
        Rate(price)


def test_phases_weigh_the_steps_they_stand_for(tmp_path):
    named = dict.fromkeys(phases.PHASES, 0.0)
    events = [
        _begin("started", 0, 0.0),
        _step(1, 1.0, phases={**named, "forward": 5.0}),
        _step(100, 2.0, phases={**named, "forward": 1.0, "backward": 3.0}),
        _step(101, 3.0, phases=None),
    ]
    log = _write(tmp_path, events)
    rows = {row["phase"]: row for row in exhibits_phases.rows(log)}
    assert list(rows) == list(exhibits_phases.PHASES)
    assert rows["forward"]["seconds"] == pytest.approx((5 + 99 * 1) / 100)
    assert rows["backward"]["seconds"] == pytest.approx(99 * 3 / 100)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert "backward 74%" in exhibits_phases.chart(log)


def test_phases_are_those_that_are_measured():
    assert set(exhibits_phases.PHASES) == set(phases.PHASES)


def test_the_commands_train_the_same_again(tmp_path):
    log = _write(tmp_path, _interrupted())
    settings = {
        "model": {"preset": "tiny", "dropout": 0.3},
        "data": {"corpus": "multi30k", "max_length": 96, "root": "/elsewhere", "source": "no"},
        "trainer": {"max_steps": None, "max_minutes": 5.0, "adam_epsilon": 1e-8, "ema_decay": 0.9},
    }
    settings["data"]["shards_url"] = "https://elsewhere/corpus"
    config = parse_config(settings, where="test")
    (log.run_dir / "config.json").write_text(config.to_json())
    log = read_run(log.run_dir)
    words = shlex.split(exhibits_method.command_alone(log).replace("\\\n", " "))
    assert words[:4] == ["babelray", "train", "--workers", "2"]
    again = load_config(None, words[5::2])
    elsewhere = config.data.model_copy(update={"root": again.data.root, "shards_url": None})
    assert again == config.model_copy(update={"data": elsewhere})
    words = shlex.split(exhibits_method.command(log))
    assert load_config(Path(words[words.index("--config") + 1])) == config


def test_a_paragraph_tells_only_what_is_known(tmp_path):
    log = _write(tmp_path, [])
    text = " ".join(exhibits_method.method(log, exhibits_cost.cost(log)))
    assert "None" not in text
    assert "Training ran" not in text
    log = _write(tmp_path, _interrupted(machine={"cpu": "A processor", "gpu": None}))
    text = " ".join(exhibits_method.method(log, exhibits_cost.cost(log)))
    assert "Training ran on 2 workers (A processor) in fp32 with ZeRO stage 1" in text
    assert "6·10¹¹ floating-point operations" in text
    assert "100 updates" in text


def test_numbers_of_a_run_that_has_just_begun_are_plain_values(tmp_path):
    for events in ([], [_begin("started", 0, 1.0)]):
        found = numbers(_write(tmp_path, events))
        assert json.loads(json.dumps(found, allow_nan=False))["training"]["steps"] == 0
    whole = numbers(_write(tmp_path, _interrupted(), [_KILLED]), Rate(1.0))
    assert set(found) == set(whole)
    assert whole["curves"]["loss"]["training"]["step"][-1] == 100
    json.dumps(whole, allow_nan=False)


def test_how_a_run_stands(tmp_path):
    log = _write(tmp_path, _interrupted(), [{**_KILLED, "final": True, "time": 1999.0}])
    assert exhibits_summary.state(log) == {"word": "failed", "detail": "rank 1 died"}
    # It was given up, and then went on.
    log = _write(tmp_path, _interrupted(), [{**_KILLED, "final": True}])
    assert exhibits_summary.state(log)["word"] == "unfinished"
    assert exhibits_summary.state(read_run(log.run_dir, is_live=True))["word"] == "running"


def test_curves_over_time_and_tokens(tmp_path):
    log = _write(tmp_path, _interrupted())
    line = Series("validation", [25, 100], [3.0, 2.0])
    assert exhibits_curves.against(log, "hours", line).x == pytest.approx([25 / 3600, 100 / 3600])
    assert exhibits_curves.against(log, "tokens", line).x == pytest.approx([25 * 190, 100 * 190])
    assert exhibits_curves.against(log, "step", line) == line


def test_only_what_differs_is_listed():
    every = [{"a": 1, "b": [1], "c": None}, {"a": 1, "b": [2]}, {"a": 1, "b": [1], "d": 0}]
    assert differences(every) == {"b": [[1], [2], [1]], "d": [None, None, 0]}


def test_the_keys_are_those_that_are_documented(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
    table = text[text.index("| key |") :]
    assert set(numbers(_write(tmp_path, []))) == set(re.findall(r"`(\w+)`", _first_column(table)))


def _first_column(table: str) -> str:
    return "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))

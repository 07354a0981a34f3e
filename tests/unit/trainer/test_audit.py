"""The audit against runs whose records are made by hand; a trained one is in tests/integration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.config import DataConfig
from data_shards.errors import UserError
from data_shards.manifest import Manifest
from data_shards.plan import Plan
from tests import recorded
from tests.recorded import LOG_EVERY, Recorded
from trainer.audit import Audit, audit

Record = Callable[..., Recorded]


@pytest.fixture
def record(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Record:
    """Makes a run; see ``tests.recorded.record``."""

    def make(name: str = "run", **values: Any) -> Recorded:
        return recorded.record(tmp_path / name, prepared[0], **values)

    return make


def epochs_that_differ(result: Audit) -> list[int]:
    return [row.epoch for row in result.epochs if not row.exact]


def test_a_run_as_planned_is_exact_in_every_epoch(record: Record) -> None:
    run = record(epochs=2.5)
    result = audit(run.run_dir)
    assert result.exact
    assert result.findings() == []
    per_epoch = run.plan.steps_per_epoch
    assert [row.steps for row in result.epochs] == [per_epoch, per_epoch, run.steps - 2 * per_epoch]
    assert [row.pairs for row in result.epochs[:2]] == [2800, 2800]
    assert result.pairs == sum(row.pairs for row in result.epochs)
    assert result.steps == run.steps == result.epochs[-1].at_step
    assert all(row.expected == row.found for row in result.epochs)
    assert result.pairs_untrained == 0


@pytest.mark.parametrize("loss", ["lost", "repeated", "swapped"])
def test_pairs_that_are_not_the_plan_s_are_found_where_they_were_consumed(
    record: Record, loss: str
) -> None:
    """Every record from there on is off; only the first is news, and only its epoch differs."""

    def consumed(step: int, batch: Any) -> Any:
        ids = batch.pair_ids
        if (step, batch.lane) != (33, 2):
            return ids
        changed = {"lost": ids[1:], "repeated": np.append(ids, ids[0]), "swapped": ids.copy()}[loss]
        if loss == "swapped":
            changed[0] = (ids[0] + 1) % 2800
        return changed

    result = audit(record(consumed=consumed).run_dir)
    assert not result.exact
    [difference] = result.differences
    assert (difference.first_step, difference.step) == (31, 35)
    assert not difference.only_record
    assert "steps 31 to 35" in result.findings()[0]
    per_epoch = result.epochs[0].steps_per_epoch
    assert epochs_that_differ(result) == [32 // per_epoch]
    assert result.epochs[32 // per_epoch].first_difference == (31, 35)
    assert result.epochs[-1].expected != result.epochs[-1].found


def test_two_departures_are_both_found(record: Record) -> None:
    def consumed(step: int, batch: Any) -> Any:
        return batch.pair_ids[1:] if step in {12, 58} else batch.pair_ids

    result = audit(record(consumed=consumed).run_dir)
    assert [(one.first_step, one.step) for one in result.differences] == [(11, 15), (56, 60)]


def test_two_lines_altered_alike_are_both_found(record: Record) -> None:
    run = record()
    rolling = 0
    for step in range(1, 51):
        rolling = (rolling + run.plan.data_hash(step - 1)) % 2**64
        if step in {25, 50}:
            run.edit(step, data_hash=f"{rolling + 1:016x}")
    assert [one.step for one in audit(run.run_dir).differences] == [25, 50]


@pytest.mark.parametrize("found", ["0123456789abcdef", "not a hash", ""])
def test_an_altered_line_of_the_log_is_found_and_told_from_altered_data(
    record: Record, found: str
) -> None:
    run = record()
    run.edit(25, data_hash=found)
    result = audit(run.run_dir)
    [difference] = result.differences
    assert (difference.where, difference.step) == ("events.jsonl (step)", 25)
    assert (difference.only_record, difference.found) == (True, found)
    assert difference.expected in result.findings()[0]
    assert "altered and not the data" in result.findings()[0]


def test_an_altered_checkpoint_is_found(record: Record) -> None:
    run = record()
    state = json.loads(run.state(40).read_text())
    run.state(40).write_text(json.dumps({**state, "data_hash": "0" * 16}))
    [difference] = audit(run.run_dir).differences
    assert difference.where == "checkpoints/step-00000040/state.json"
    assert (difference.step, difference.only_record) == (40, True)


@pytest.mark.parametrize("logged", [False, True])
def test_the_last_record_is_told_from_the_data_only_by_another_of_its_step(
    record: Record, logged: bool
) -> None:
    run = record(epochs=2.4)
    assert run.steps % LOG_EVERY
    state = json.loads(run.state(run.steps).read_text())
    if logged:
        run.log("step", step=run.steps, data_hash=state["data_hash"])
    run.state(run.steps).write_text(json.dumps({**state, "data_hash": "0" * 16}))
    [difference] = audit(run.run_dir).differences
    assert (difference.step, difference.only_record) == (run.steps, logged)


def test_checkpoints_in_another_storage_are_read_there(record: Record, tmp_path: Path) -> None:
    run = record()
    config = json.loads((run.run_dir / "config.json").read_text())
    config["recovery"]["storage"] = str(tmp_path / "bucket")
    (run.run_dir / "config.json").write_text(json.dumps(config))
    published = tmp_path / "bucket" / run.run_dir.name
    published.mkdir(parents=True)
    (run.run_dir / "checkpoints").rename(published / "checkpoints")
    assert audit(run.run_dir).exact
    (published / "checkpoints" / "step-00000040" / "state.json").write_text("{")
    [problem] = audit(run.run_dir).problems
    assert "step-00000040" in problem


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 20}', '{"step": 2, "data_hash": "0"}'])
def test_a_checkpoint_that_cannot_be_read_is_named(record: Record, content: str) -> None:
    run = record()
    run.state(20).write_text(content)
    result = audit(run.run_dir)
    assert not result.exact
    assert ["step-00000020/state.json" in problem for problem in result.problems] == [True]


def test_an_unfinished_epoch_holds_what_was_consumed_so_far(record: Record) -> None:
    run = record(epochs=0.4)
    [row] = audit(run.run_dir).epochs
    assert (row.steps, row.exact) == (run.steps, True)
    assert row.steps < row.steps_per_epoch
    assert row.pairs == sum(run.plan.num_pairs(step) for step in range(run.steps))


def test_an_epoch_without_a_record_is_judged_by_the_next_one(record: Record) -> None:
    def sparse(run: Recorded) -> Recorded:
        shutil.rmtree(run.run_dir / "checkpoints")
        lines = (run.run_dir / "events.jsonl").read_text().splitlines()
        (run.run_dir / "events.jsonl").write_text(f"{lines[1]}\n{lines[-1]}\n")
        return run

    result = audit(sparse(record()).run_dir)
    assert [row.at_step for row in result.epochs[:2]] == [1, None]
    assert result.epochs[2].at_step == result.steps
    assert result.exact
    wrong = record(consumed=lambda step, batch: batch.pair_ids[step == 3 :], name="wrong")
    assert epochs_that_differ(audit(sparse(wrong).run_dir)) == [0, 1, 2]


class TestSkipsAndRewinds:
    def skip(self, run: Recorded, step: int, reason: str = "loss_spike", **values: Any) -> None:
        pairs = {str(batch.lane): batch.pair_ids.tolist() for batch in run.plan.step(step - 1)}
        run.log("skipped", step=step, **{"reason": reason, "lanes": [], "pairs": pairs, **values})

    def pairs(self, run: Recorded, *steps: int) -> int:
        return sum(run.plan.num_pairs(step - 1) for step in steps)

    def test_they_are_listed_with_what_was_not_trained_on(self, record: Record) -> None:
        run = record()
        for step, reason in ((7, "loss_not_finite"), (51, "loss_spike"), (52, "loss_spike")):
            self.skip(run, step, reason)
        run.log("rewound", step=52, to_step=40)
        result = audit(run.run_dir)
        assert result.exact
        assert [(one.step, one.reason, one.pairs) for one in result.skipped] == [
            (step, reason, self.pairs(run, step))
            for step, reason in ((7, "loss_not_finite"), (51, "loss_spike"), (52, "loss_spike"))
        ]
        [rewound] = result.rewound
        assert (rewound.step, rewound.to_step) == (52, 40)
        assert rewound.pairs == self.pairs(run, *range(41, 53))
        # A step that was skipped and undone counts once.
        assert result.pairs_untrained == self.pairs(run, 7, *range(41, 53))
        assert sum(row.pairs_untrained for row in result.epochs) == result.pairs_untrained

    def test_what_a_resume_undid_does_not_count(self, record: Record) -> None:
        run = record()
        self.skip(run, 51)
        run.log("resumed", step=40)
        assert audit(run.run_dir).pairs_untrained == 0

    def test_what_comes_after_the_last_record_is_for_the_next_audit(self, record: Record) -> None:
        run = record()
        self.skip(run, run.steps + 1)
        run.log("rewound", step=run.steps + 1, to_step=40)
        result = audit(run.run_dir)
        assert result.exact
        assert (result.skipped, result.rewound) == ((), ())

    @pytest.mark.parametrize("pairs", [{"0": [1, 2, 3]}, {"9": [1]}, {"x": [1]}])
    def test_listed_pairs_that_are_not_the_batch_s_are_named(
        self, record: Record, pairs: dict[str, list[int]]
    ) -> None:
        run = record()
        self.skip(run, 7, pairs=pairs)
        [problem] = audit(run.run_dir).problems
        assert "step 7" in problem
        assert f"lane {next(iter(pairs))}" in problem

    @pytest.mark.parametrize(
        ("counted", "problems"),
        [((1, 0), 0), ((2, 0), 1), ((0, 0), 1), ((1, 1), 1), ((0, 1), 2)],
    )
    def test_a_checkpoint_that_counts_others_than_the_log_lists_is_named(
        self, record: Record, counted: tuple[int, int], problems: int
    ) -> None:
        run = record()
        self.skip(run, 7)
        self.skip(run, 41)  # after the checkpoint
        state = json.loads(run.state(40).read_text())
        guard = {"skipped": counted[0], "rewinds": counted[1]}
        run.state(40).write_text(json.dumps({**state, "guard": guard}))
        found = audit(run.run_dir).problems
        assert len(found) == problems
        assert all("step-00000040/state.json counts" in problem for problem in found)


def test_a_plan_that_repeats_a_pair_is_found(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot happen (tests of the plan); if it did, equal hashes would hide it."""
    run = record(epochs=1.2)
    whole = Plan.step

    def doubled(plan: Plan, step: int, lanes: Any = None) -> Any:
        batches = whole(plan, step, lanes)
        if step == 4:
            batches[0].pair_ids[0] = batches[0].pair_ids[1]
        return batches

    monkeypatch.setattr(Plan, "step", doubled)
    [problem] = audit(run.run_dir).problems
    assert "epoch 0 of the plan: 2 pairs do not come exactly once" in problem


def test_another_corpus_or_plan_is_refused(record: Record) -> None:
    for key in ("data", "plan"):
        run = record(name=key)
        state = json.loads(run.state(20).read_text())
        state["settings"][key] = "other"
        run.state(20).write_text(json.dumps(state))
        with pytest.raises(UserError, match="trained on another corpus or plan"):
            audit(run.run_dir)


def test_a_run_that_has_recorded_nothing_is_refused(record: Record) -> None:
    with pytest.raises(UserError, match="has recorded no step yet"):
        audit(record(epochs=0).run_dir)


def test_a_long_audit_tells_how_far_it_is(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(epochs=1)
    told: list[str] = []
    audit(run.run_dir, progress=told.append)
    assert told == []
    monkeypatch.setattr("trainer.audit._PROGRESS_EVERY_S", 0.0)
    audit(run.run_dir, progress=told.append)
    assert told[-1] == f"audited {run.steps:,} of {run.steps:,} steps"


def test_the_result_is_json(record: Record) -> None:
    run = record()
    run.edit(25, data_hash="0" * 16)
    values = json.loads(json.dumps(audit(run.run_dir).to_json()))
    assert values["exact"] is False
    assert values["differences"][0]["step"] == 25
    assert values["epochs"][0]["epoch"] == 0

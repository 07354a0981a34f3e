"""``babelray data audit``: its table, its messages, its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cluster.cli import cli
from cluster.tables import audit_table
from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from tests.recorded import Recorded, record
from trainer.audit import audit


@pytest.fixture
def run(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Recorded:
    return record(tmp_path / "runs" / "demo", prepared[0], epochs=2.5)


def data_audit(run: Recorded, *arguments: str) -> Result:
    runs = str(run.run_dir.parent)
    return CliRunner().invoke(cli, ["data", "audit", "demo", "--runs", runs, *arguments])


def test_an_exact_run_is_a_table_and_status_0(run: Recorded) -> None:
    result = data_audit(run)
    assert (result.exit_code, result.stderr) == (0, "")
    head, first, _, last, verdict = result.stdout.splitlines()
    assert head.split() == [
        "epoch", "steps", "pairs", "untrained", "at", "step", "expected", "found",
    ]  # fmt: skip
    assert first.startswith("    0  ")
    assert first.endswith("  exact")
    assert " 2,800 " in first
    assert last.endswith("  exact so far")
    assert verdict.endswith("every pair exactly once an epoch")
    # Numbers stand under one another.
    assert first.index("exact") == last.index("exact so far")


def test_a_run_that_differs_is_status_1_and_says_where_first(run: Recorded) -> None:
    run.edit(25, data_hash="0123456789abcdef")
    run.edit(15, data_hash="fedcba9876543210")
    result = data_audit(run)
    assert result.exit_code == 1
    assert "differs in steps 11-15" in result.stdout
    assert "not as planned" in result.stdout.splitlines()[-1]
    message, first, second = result.stderr.splitlines()
    assert message == f"babelray: error: {run.run_dir} is not as planned:"
    assert "events.jsonl (step), step 15: data_hash " in first
    assert "fedcba9876543210 found" in first
    assert "step 25" in second


def test_many_findings_are_cut_short(run: Recorded) -> None:
    for step in range(5, 65, 5):
        run.edit(step, data_hash=f"{step:016x}")
    lines = data_audit(run).stderr.splitlines()
    assert len(lines) == 12
    assert lines[-1].strip().startswith("and ")


@pytest.mark.parametrize("altered", [False, True])
def test_json_is_all_there_is_on_standard_output(run: Recorded, altered: bool) -> None:
    if altered:
        run.edit(25, data_hash="0123456789abcdef")
    result = data_audit(run, "--json")
    assert result.exit_code == int(altered)
    values: dict[str, Any] = json.loads(result.stdout)
    assert values["exact"] is not altered
    assert values["steps"] == run.steps
    assert [row["exact"] for row in values["epochs"]] == [not altered, True, True]


def test_a_run_that_is_not_there_is_status_2(run: Recorded) -> None:
    result = CliRunner().invoke(cli, ["data", "audit", "dmeo", "--runs", str(run.run_dir.parent)])
    assert result.exit_code == 2
    assert "demo" in result.stderr


def test_what_was_not_trained_on_is_told_in_few_words(run: Recorded) -> None:
    for step in (3, 4, 5, 9):
        run.log("skipped", step=step, reason="loss_spike")
    run.log("skipped", step=11, reason="loss_not_finite")
    run.log("rewound", step=24, to_step=20)
    lines = audit_table(audit(run.run_dir)).splitlines()[4:]
    pairs = [run.plan.num_pairs(step) for step in range(run.steps)]
    spiked, redone = sum(pairs[2:5]) + pairs[8], sum(pairs[20:24])
    assert lines[0] == f"skipped, loss_not_finite: 1 steps (11), {pairs[10]} pairs"
    assert lines[1] == f"skipped, loss_spike: 4 steps (3-5, 9), {spiked} pairs"
    assert lines[2].startswith("rewound after step 24 to the weights of step 20: ")
    assert f"{redone} pairs" in lines[2]
    assert f"{spiked + pairs[10] + redone} of them not trained on" in lines[3]

"""A run that was really trained, with skips, rewinds and a resume: what it decided, its audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_shards.shards import prepare
from tests.ranks import Job, run_ranks
from trainer.audit import audit
from trainer.config import RunConfig, parse_config
from trainer.run import read_events

STOP = 149  # in the middle of skips that end in a rewind

pytestmark = pytest.mark.timeout(600)


def make_config(root: Path, *, max_steps: int) -> RunConfig:
    """It hardly learns, so its losses go up and down, and its guard minds the smallest rise."""
    return parse_config(
        {
            "model": {
                "d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1,
                "decoder_layers": 1, "dropout": 0.0,
            },
            "data": {
                "corpus": "embedded", "embedded_pairs": 2000, "vocabulary_size": 300,
                "max_length": 64, "root": root, "lanes": 4, "tokens_per_step": 1024,
            },
            "trainer": {
                "max_steps": max_steps, "warmup_steps": 50, "peak_learning_rate": 1e-5,
                "log_every": 7, "validate_every": 1000, "checkpoint_every": 30,
                "metrics_port": 0, "threads": 1,
            },
            "recovery": {"spike_nats": 0.001, "max_skipped": 4, "max_rewinds": 1000},
        },
        where="test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run twice: undisturbed, and stopped among skips and resumed."""
    root = tmp_path_factory.mktemp("audited")
    config = make_config(root / "data", max_steps=160)
    part = make_config(root / "data", max_steps=STOP)
    prepare(config.data)
    whole, parts = root / "whole", root / "parts"
    for run_dir in (whole, parts):
        run_dir.mkdir()
        (run_dir / "config.json").write_text(config.to_json())
    jobs = [Job(config, whole), Job(part, parts), Job(config, parts, resume=True)]
    assert set(run_ranks(2, jobs)) == {"max_steps"}
    return whole, parts


def decisions(run_dir: Path) -> list[dict[str, Any]]:
    kinds = {"skipped", "rewound"}
    found = [event for event in read_events(run_dir) if event["event"] in kinds]
    return [{name: event[name] for name in event if name != "time"} for event in found]


def test_a_resumed_run_skips_and_rewinds_as_an_undisturbed_one(runs: tuple[Path, Path]) -> None:
    whole, parts = map(decisions, runs)
    assert parts == whole
    skipped = [event["step"] for event in whole if event["event"] == "skipped"]
    assert 100 < min(skipped) < STOP < max(skipped)
    assert "rewound" in {event["event"] for event in whole}


def test_it_is_exact_and_all_that_was_not_trained_on_is_known(runs: tuple[Path, Path]) -> None:
    for run_dir in runs:
        result = audit(run_dir)
        assert result.findings() == []
        assert result.steps == 160
        assert [row.pairs for row in result.epochs[:3]] == [2000, 2000, 2000]
        skipped = {event["step"] for event in decisions(run_dir) if event["event"] == "skipped"}
        assert {skip.step for skip in result.skipped} == skipped
        undone = {step for one in result.rewound for step in range(one.to_step + 1, one.step + 1)}
        apart = sum(skip.pairs for skip in result.skipped if skip.step not in undone)
        assert 0 < apart < result.pairs_untrained
        assert result.pairs_untrained <= apart + sum(one.pairs for one in result.rewound)


def test_what_was_changed_afterwards_is_found(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs[1], tmp_path / "run"))
    log = run_dir / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    altered = next(e for e in events if (e["event"], e["step"]) == ("step", 77))
    altered["data_hash"] = f"{int(altered['data_hash'], 16) ^ 1:016x}"
    events.remove(next(e for e in events if e["event"] == "skipped"))
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    result = audit(run_dir)
    [difference] = result.differences
    assert (difference.where, difference.step) == ("events.jsonl (step)", 77)
    # A skip was struck from the log, but the checkpoints have counted it.
    assert result.problems
    assert all("skipped, events.jsonl lists" in problem for problem in result.problems)

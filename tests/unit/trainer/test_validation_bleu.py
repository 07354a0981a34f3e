"""Scores of checkpoints while a run trains: which is the best, and how long ago that was."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from trainer.config import EvaluationConfig
from trainer.evaluate import evaluate
from trainer.validation_bleu import (
    BleuHistory,
    latest_bleu,
    score_checkpoint,
    search_digest,
    write_latest,
)


def scored(step: int, bleu: float, **values: Any) -> dict[str, Any]:
    event = {"event": "evaluated", "test_set": "valid", "checkpoint": str(step), "step": step}
    return {**event, "bleu": bleu, "search": "5ea6c4", **values}


def history_of(*events: dict[str, Any]) -> BleuHistory:
    return BleuHistory.of(events, search="5ea6c4")


def test_the_best_is_the_first_of_equals_and_what_came_since_is_stale():
    history = history_of(scored(10, 3.0), scored(20, 5.0), scored(30, 5.0), scored(40, 4.0))
    assert (history.last_step, history.best_step, history.best_bleu) == (40, 20, 5.0)
    assert history.stale == 2
    assert history.add(50, 5.1)
    assert (history.best_step, history.stale) == (50, 0)
    assert not history.add(60, 5.0)


def test_other_evaluations_do_not_count_and_of_one_step_the_later_does():
    history = history_of(
        {"event": "step", "step": 5},
        {name: value for name, value in scored(10, 9.0).items() if name != "search"},
        scored(15, 8.0, search="07e6"),
        scored(20, 4.0),
        scored(20, 2.0),
    )
    assert (history.last_step, history.best_step, history.best_bleu) == (20, 20, 2.0)
    assert history_of() == BleuHistory()


def test_a_run_that_goes_on_elsewhere_knows_its_best():
    note = {"step": 2000, "bleu": 27.0, "search": "5ea6c4"}
    history = history_of()
    history.recall(note, search="5ea6c4")
    assert not history.add(3000, 20.0)
    assert (history.best_step, history.best_bleu, history.stale) == (2000, 27.0, 1)
    for other in ({}, {"step": 5, "valid_nll": 1.5}, {**note, "search": "07e6"}):
        history = history_of(scored(10, 3.0))
        history.recall(other, search="5ea6c4")
        assert history.best_step == 10


def test_scores_of_another_search_are_not_comparable():
    one = search_digest(EvaluationConfig())
    assert search_digest(EvaluationConfig(batch_tokens=7)) == one
    assert search_digest(EvaluationConfig(beam=8)) != one


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "runs" / "demo")


def test_the_score_is_that_of_the_evaluation(run_dir):
    values = score_checkpoint(run_dir, 120, threads=1)
    assert math.isnan(latest_bleu(run_dir))
    write_latest(run_dir, values)
    assert latest_bleu(run_dir) == values["bleu"]
    result = evaluate(run_dir, checkpoint="120", test_set="valid")
    assert values["bleu"] == result.bleu > 10
    assert values["signature"] == result.signature


def test_a_checkpoint_that_is_gone_is_named(run_dir):
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        score_checkpoint(run_dir, 7, threads=1)

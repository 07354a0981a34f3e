"""Scoring beside the training: what follows from a score, and that nothing of it stops a run.

Ray is replaced by an object that has the results ready; tests/integration/test_cluster.py has the
real one.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cluster.validation_bleu
from cluster.validation_bleu import Scorer
from tests.runs import make_config
from trainer.checkpoint import Checkpoints
from trainer.config import RecoveryConfig, RunConfig
from trainer.storage import StorageError


class FakeRay:
    """Tasks are over at once, with ``results[step]``: a BLEU, or the error that they raised."""

    def __init__(self, results: dict[int, float | BaseException]) -> None:
        self.results, self.started = results, []
        self.exceptions = types.SimpleNamespace(RayError=_TaskError)

    def remote(self, **options: Any) -> Callable[..., Any]:
        assert options["num_cpus"] == 0

        def decorate(function: Callable[..., Any]) -> Any:
            return types.SimpleNamespace(remote=lambda run_dir, step: self._start(step))

        return decorate

    def _start(self, step: int) -> int:
        self.started.append(step)
        return step

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references, []

    def get(self, step: int) -> dict[str, Any]:
        found = self.results[step]
        if isinstance(found, BaseException):
            raise _TaskError(found)
        return {
            "test_set": "valid", "checkpoint": str(step), "step": step, "bleu": found,
            "chrf": 2 * found, "signature": "tok:13a", "seconds": 0.1,
        }  # fmt: skip


class _TaskError(Exception):
    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Scene:
    """A run's folder with checkpoints that hold nothing, and what was said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = folder / "runs" / "demo"
        self.run_dir.mkdir(parents=True)
        self.checkpoints = Checkpoints.of(self.run_dir, RecoveryConfig())
        self.said: list[str] = []
        self._folder, self._monkeypatch = folder, monkeypatch

    def scorer(self, results: dict[int, float | BaseException], **trainer: Any) -> Scorer:
        self.ray = FakeRay(results)
        self._monkeypatch.setitem(__import__("sys").modules, "ray", self.ray)
        config = make_config(self._folder).model_dump()
        config["trainer"] |= {"bleu_every": 10, "best_by": "bleu", **trainer}
        return Scorer(RunConfig.model_validate(config), self.run_dir, self.said.append)

    def checkpoint(self, scorer: Scorer, step: int) -> None:
        scorer.hear({"event": "checkpoint", "step": step})
        scorer.poll()  # starts
        scorer.poll()  # takes in

    def note(self, name: str) -> Any:
        file = self.run_dir / name
        return json.loads(file.read_text()) if file.exists() else None

    def scored(self) -> list[tuple[int, bool]]:
        lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        return [(event["step"], event["best"]) for event in events]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_the_best_is_noted_and_what_is_worse_is_not(scene: Scene) -> None:
    scorer = scene.scorer({10: 5.0, 20: 4.0, 30: 6.0}, patience=2)
    for step, best in ((10, 10), (15, 10), (20, 10)):
        scene.checkpoint(scorer, step)
        assert scene.note("best.json")["step"] == best
    assert scene.ray.started == [10, 20], "15 is not due"
    assert scene.note("pinned.json") is None
    assert not (scene.run_dir / "early_stop").exists()
    scene.checkpoint(scorer, 30)
    assert scene.note("best.json")["step"] == 30
    assert scene.scored() == [(10, True), (20, False), (30, True)]


def test_patience_counts_scores_over_a_resume(scene: Scene) -> None:
    first = scene.scorer({10: 5.0, 20: 4.0})
    scene.checkpoint(first, 10)
    scene.checkpoint(first, 20)
    again = scene.scorer({30: 4.5}, patience=2)
    again.poll()
    assert not (scene.run_dir / "early_stop").exists()
    scene.checkpoint(again, 30)
    assert (scene.run_dir / "early_stop").exists()
    again.finish(lambda: False)
    assert not (scene.run_dir / "early_stop").exists()


def test_the_best_of_a_run_that_went_on_elsewhere_stays(scene: Scene) -> None:
    first = scene.scorer({10: 27.0})
    scene.checkpoint(first, 10)
    (scene.run_dir / "events.jsonl").unlink()
    scene.checkpoint(scene.scorer({20: 20.0}), 20)
    assert scene.note("best.json")["step"] == 10
    other = scene.scorer({30: 1.0})
    assert other._history.best_step == 10


def test_a_best_that_cannot_be_noted_yet_stays_pinned(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.validation_bleu, "_RETRY_S", 0.0)
    failures = [StorageError("no answer"), StorageError("no answer")]
    set_best = Checkpoints.set_best

    def failing(self: Checkpoints, step: int, **measures: Any) -> None:
        if failures:
            raise failures.pop()
        set_best(self, step, **measures)

    monkeypatch.setattr(Checkpoints, "set_best", failing)
    scorer = scene.scorer({10: 5.0, 20: 9.0})
    scene.checkpoint(scorer, 10)
    assert scene.scored() == [(10, True)], "the score is not lost"
    assert (scene.note("best.json"), scene.note("pinned.json")) == (None, {"step": 10})
    scorer.hear({"event": "checkpoint", "step": 20})
    scorer.poll()
    assert scene.ray.started == [10], "the pin is still needed"
    scorer.poll()
    assert scene.note("best.json")["step"] == 10
    scorer.poll()
    assert scene.note("best.json")["step"] == 20
    assert scene.said == []


@pytest.mark.parametrize("error", [MemoryError(), ValueError("first\nthe last line")])
def test_a_task_that_fails_is_told_of_once_and_the_next_goes_on(
    scene: Scene, error: BaseException
) -> None:
    scorer = scene.scorer({10: error, 20: 3.0})
    scene.checkpoint(scorer, 10)
    scorer.poll()
    [line] = scene.said
    assert line.endswith(("MemoryError", ": the last line"))
    assert scene.note("pinned.json") is None
    scene.checkpoint(scorer, 20)
    assert scene.note("best.json")["step"] == 20


def test_a_full_disk_ends_neither_the_run_nor_the_scoring(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    scorer = scene.scorer({10: 5.0, 20: 6.0})
    with monkeypatch.context() as patch:
        patch.setattr(cluster.validation_bleu, "write_latest", full)
        scene.checkpoint(scorer, 10)
    assert any("No space left" in line for line in scene.said)
    scene.checkpoint(scorer, 20)
    assert scene.note("best.json")["step"] == 20


def test_the_last_checkpoint_is_scored_at_the_end_unless_interrupted(scene: Scene) -> None:
    scorer = scene.scorer({15: 5.0})
    scorer.hear({"event": "checkpoint", "step": 15})
    scorer.finish(lambda: True)
    assert scene.ray.started == []
    scorer.finish(lambda: False)
    assert scene.scored() == [(15, True)]
    assert any("last checkpoint" in line for line in scene.said)

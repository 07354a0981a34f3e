from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from data_shards.errors import UserError
from data_shards.vocabulary import Vocabulary
from tests.runs import pairs
from trainer.config import EvaluationConfig
from trainer.ensemble import load_ensemble
from trainer.translate import Translator

LINES = [source for source, _ in pairs(8, seed=9)]


def test_others_are_runs_checkpoints_or_both(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "second")
    models = load_ensemble(
        trained_run,
        "last",
        ["@60", "second", "second@120", str(trained_run), "second@average:2"],
        runs=tmp_path,
    )
    assert [model.step for model in models] == [180, 60, 180, 120, 180, 180]
    assert models[-1].steps == (120, 180)


def test_a_model_beside_itself_translates_alike_and_another_otherwise(trained_run):
    evaluation = EvaluationConfig(max_extra_length=10)
    models = load_ensemble(trained_run, "last", ["@last", "@60"], runs=trained_run.parent)
    one, twice, mixed = (
        Translator(chosen, evaluation).translate(LINES)
        for chosen in (models[:1], models[:2], [models[0], models[2]])
    )
    assert [found[0].ids for found in one] == [found[0].ids for found in twice]
    for single, double in zip(one, twice, strict=True):
        assert single[0].score == pytest.approx(double[0].score, rel=1e-4)
    assert [found[0].score for found in one] != [found[0].score for found in mixed]


def test_missing_members_are_told(trained_run):
    with pytest.raises(UserError, match="no such run"):
        load_ensemble(trained_run, "last", ["absent"], runs=trained_run.parent)
    with pytest.raises(UserError, match="no checkpoint of step 61"):
        load_ensemble(trained_run, "last", ["@61"], runs=trained_run.parent)


def test_another_vocabulary_is_refused_and_both_are_named(trained_run, tmp_path):
    models = load_ensemble(trained_run, "last", ["@60"], runs=trained_run.parent)
    path = models[0].vocabulary.path
    copied = shutil.copy(path, tmp_path / "same.model")
    evaluation = EvaluationConfig()
    Translator([models[0], replace(models[1], vocabulary=Vocabulary.load(copied))], evaluation)
    other = models[1].vocabulary
    changed = tmp_path / "other.model"
    # A further field that no reader knows: another file of the same pieces will do here.
    changed.write_bytes(path.read_bytes() + b"\xfa\x07\x01x")
    other = Vocabulary.load(changed)
    with pytest.raises(UserError, match="different vocabularies") as caught:
        Translator([models[0], replace(models[1], vocabulary=other)], evaluation)
    assert str(path) in str(caught.value)
    assert str(changed) in str(caught.value)

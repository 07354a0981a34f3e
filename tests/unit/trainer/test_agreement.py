from __future__ import annotations

import pytest

from tests.runs import pairs
from trainer.agreement import Agreement, Difference, comparable, compare, score
from trainer.export import export
from trainer.run import load_model
from trainer.translate import Translator

pytest.importorskip("ctranslate2")

LINES = [source for source, _ in pairs(200, seed=7)]


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    return export(trained_run, tmp_path_factory.mktemp("exports") / "out", format="ctranslate2")


@pytest.mark.parametrize("beam", [1, 4])
def test_ctranslate2_finds_what_we_find(exported, beam):
    evaluation = exported.loaded.config.evaluation.model_copy(update={"beam": beam})
    agreement = compare(exported.loaded, exported.folder, [*LINES, " "], evaluation)
    assert agreement.num_lines == len(LINES)
    assert agreement.faults == []
    assert agreement.num_same >= len(LINES) - 1


def test_another_models_export_is_told(exported, trained_run):
    other = load_model(trained_run, "60")
    agreement = compare(other, exported.folder, LINES[:20], other.config.evaluation)
    assert agreement.faults
    first = agreement.faults[0]
    assert first.source == LINES[first.line - 1]
    assert first.ours != first.theirs
    assert agreement.num_same == 20 - len(agreement.differences)


def test_a_score_by_one_pass_is_that_of_the_search(exported):
    settings = comparable(exported.loaded.config.evaluation)
    translator = Translator([exported.loaded], settings)
    for line, [found] in zip(LINES[:5], translator.translate(LINES[:5]), strict=True):
        source = translator.encode(line)
        assert score(exported.loaded, source, found.ids, 1.0) == pytest.approx(
            found.score, abs=1e-5
        )


def test_equal_scores_are_a_tie():
    tie = Difference(1, "a", "b", "c", our_score=-1.0, their_score=-1.00005)
    fault = Difference(2, "a", "b", "c", our_score=-1.0, their_score=-1.001)
    agreement = Agreement(5, [tie, fault])
    assert tie.is_tie
    assert agreement.faults == [fault]
    assert agreement.num_same == 3

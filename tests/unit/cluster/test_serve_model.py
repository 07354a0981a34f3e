"""Requests of different kinds in one batch, each answered as if it were alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serve_app import Attention
from cluster.serve_model import Engine, Job, padded_tokens
from tests.cross_only import cross_only
from tests.runs import make_run
from trainer.config import EvaluationConfig
from trainer.run import LoadedModel, load_model

EVALUATION = EvaluationConfig(beam=3, max_extra_length=10, batch_tokens=64)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(make_run(tmp_path_factory.mktemp("served"), steps=(60,)), "last")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, EVALUATION, max_num_best=3)


def job(*lengths: int) -> Job:
    return Job(tuple("x" for _ in lengths), tuple([5] * n for n in lengths), 1)


def test_padding_counts() -> None:
    assert padded_tokens([job(3), job(5, 1)], 100) == 15
    assert padded_tokens([job(0)], 100) == 0


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=9))
def test_a_job_alone_always_fits_and_several_never_pretend_to(lengths: list[list[int]]) -> None:
    jobs = [job(*each) for each in lengths]
    assert padded_tokens(jobs[:1], 40) <= 40
    assert len(jobs) == 1 or padded_tokens(jobs, 40) >= sum(map(sum, lengths))


@pytest.mark.parametrize("search", ["beam", "sample"])
def test_a_batch_answers_each_as_if_alone(search: str, loaded: LoadedModel) -> None:
    evaluation = EVALUATION.model_copy(update={"search": search})
    engine = Engine(loaded, evaluation, max_num_best=3)
    jobs = [
        engine.job(["red dog sees two"], 1),
        engine.job(["old house", "", "three green tree eats"], 3),
        engine.job([""], 2),
        engine.job(["cat"], 2),
    ]
    together = engine.translate(jobs)
    assert [[len(line) for line in lines] for lines in together] == [[1], [3, 1, 3], [1], [2]]
    for one, found in zip(jobs, together, strict=True):
        alone = engine.translate([one])[0]
        assert [[t.text for t in line] for line in alone] == [
            [t.text for t in line] for line in found
        ]


def test_lines_are_described(engine: Engine, loaded: LoadedModel) -> None:
    long = "red " * 60
    asked = engine.job(["red dog", "", "你好", long], 1)
    lines = engine.described(asked, engine.translate([asked])[0])
    assert [line.cut for line in lines] == [False, False, False, True]
    assert "".join(lines[0].source_pieces).replace("▁", " ").split() == ["red", "dog"]
    assert lines[1].alternatives[0].text == ""
    assert lines[2].unknown_pieces == 1
    assert len(lines[3].source_pieces) == loaded.config.model.max_positions - 1


def test_attention_of_the_first_line_with_text(engine: Engine) -> None:
    asked = engine.job(["", "red dog"], 1)
    translations = engine.translate([asked])[0]
    maps = engine.attention(asked, translations)
    assert isinstance(maps, Attention)
    assert len(maps.cross) == 2
    assert len(maps.cross[0]) == 4
    assert maps.outputs[-1] == "</s>"
    for row in maps.cross[1][3]:
        assert len(row) == len(maps.source)
        assert sum(row) == pytest.approx(1, abs=0.01)


def test_of_a_model_without_self_attention_there_is_cross_attention(loaded: LoadedModel) -> None:
    engine = Engine(cross_only(loaded), EVALUATION, max_num_best=1)
    asked = engine.job(["red dog"], 1)
    maps = engine.attention(asked, engine.translate([asked])[0])
    assert isinstance(maps, Attention)
    assert (len(maps.cross), len(maps.cross[0])) == (1, 1)
    assert maps.encoder is None
    assert maps.decoder is None


def test_no_attention_for_nothing(engine: Engine) -> None:
    asked = engine.job([""], 1)
    assert "empty" in str(engine.attention(asked, engine.translate([asked])[0]))


def test_no_map_that_nobody_could_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.serve_model.MAX_ATTENTION_PIECES", 4)
    asked = engine.job(["red dog sees two cat"], 1)
    assert "more than 4 pieces" in str(engine.attention(asked, engine.translate([asked])[0]))

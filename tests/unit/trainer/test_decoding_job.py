"""Batches, whoever decodes them and however often that is interrupted."""

from __future__ import annotations

import errno
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from data_shards.errors import RunFailedError, UserError
from data_shards.manifest import Manifest
from data_shards.shards import prepare
from model.build import build
from tests.runs import make_config, write_checkpoint
from trainer.config import EvaluationConfig
from trainer.decoding_job import System, decode_here, translate_all
from trainer.evaluate import evaluate, find_test_sets
from trainer.run import evaluation_dir


@pytest.fixture
def run_dir(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "runs" / "demo")


def make_system(run_dir, checkpoint="last", ensemble=(), **values) -> System:
    settings = {"max_extra_length": 10, "batch_tokens": 24, **values}
    evaluation = EvaluationConfig.model_validate(settings)
    return System(run_dir, checkpoint, evaluation, ensemble, run_dir.parent)


class Work:
    """Translates, and remembers what was said and which batches were decoded."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.said, self.decoded = run_dir, [], []
        self.stop_after: int | None = None

    def __call__(self, *systems: System, names=("test",)):
        translated = translate_all(
            [(system, "") for system in systems],
            find_test_sets(self.run_dir, names),
            evaluation_dir(self.run_dir),
            decode=self._decode,
            say=self.said.append,
        )
        return list(translated)

    def _decode(self, systems, batches):
        with closing(decode_here(systems, batches)) as results:
            for decoded in islice(results, self.stop_after):
                self.decoded.append((decoded.job, decoded.number))
                yield decoded
        if self.stop_after is not None:
            raise KeyboardInterrupt


@pytest.fixture
def work(run_dir):
    return Work(run_dir)


def test_order_and_grouping_of_batches_change_nothing(run_dir, work):
    system = make_system(run_dir)
    (whole,) = work(system)
    assert len(set(whole.hypotheses)) > 20

    def backwards(systems, batches):
        yield from decode_here(systems, list(reversed(batches)))

    (other,) = translate_all(
        [(system, "")],
        find_test_sets(run_dir, ["test"]),
        run_dir / "elsewhere",
        decode=backwards,
        say=work.said.append,
    )
    assert other.hypotheses == whole.hypotheses


@pytest.mark.parametrize("batch_tokens", [1, 7, 50, 100_000])
def test_no_batch_size_changes_a_hypothesis(run_dir, work, batch_tokens):
    (expected,) = work(make_system(run_dir, batch_tokens=24))
    (found,) = work(make_system(run_dir, batch_tokens=batch_tokens))
    assert found.hypotheses == expected.hypotheses


@pytest.mark.parametrize("settings", [{}, {"search": "sample", "seed": 5}], ids=["beam", "sample"])
def test_an_interrupted_evaluation_goes_on_where_it_was(run_dir, work, settings):
    system = make_system(run_dir, **settings)
    (expected,) = work(system)
    expected.partial.remove()
    num_batches = len(work.decoded)
    assert num_batches > 5

    work.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        work(system)
    work.decoded.clear()
    work.stop_after = None
    (found,) = work(system)
    assert len(work.decoded) == num_batches - 3
    assert any(f"going on after an interruption, 3 of {num_batches}" in line for line in work.said)
    assert found.hypotheses == expected.hypotheses
    assert found.seconds > 0


@pytest.mark.parametrize(
    "change", [{"beam": 2}, {"length_penalty": 1.0}, {"batch_tokens": 25}, {"checkpoint": "60"}]
)
def test_a_part_of_other_settings_is_not_used(run_dir, work, change):
    work.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        work(make_system(run_dir))
    work.stop_after = None
    # Under the same name: a checkpoint called "last" may be another one by now.
    if "checkpoint" in change:
        shutil.rmtree(run_dir / "checkpoints" / "step-00000180")
        shutil.rmtree(run_dir / "checkpoints" / "step-00000120")
        change = {}
    (found,) = work(make_system(run_dir, **change))
    assert any("it is not used" in line for line in work.said)
    (fresh,) = Work(run_dir)(make_system(run_dir, **change))
    assert found.hypotheses == fresh.hypotheses


def test_several_systems_and_test_sets_in_one_go(run_dir, work):
    systems = [make_system(run_dir, "60"), make_system(run_dir, "180")]
    found = work(*systems, names=("test", "valid"))
    assert [(item.label, item.test_set.name) for item in found] == [
        ("60", "test"), ("60", "valid"), ("180", "test"), ("180", "valid"),
    ]  # fmt: skip
    assert [job for job, _ in work.decoded] == sorted(job for job, _ in work.decoded)
    (alone,) = Work(run_dir)(systems[1])
    assert found[2].hypotheses == alone.hypotheses != found[0].hypotheses


def test_a_run_that_trains_on_meanwhile(run_dir, work):
    newest, elsewhere = run_dir / "checkpoints" / "step-00000180", run_dir / "newer"
    newest.rename(elsewhere)
    (expected,) = work(make_system(run_dir, "last"))
    expected.partial.remove()
    assert expected.step == 120

    def meanwhile(systems, batches):
        elsewhere.rename(newest)
        yield from decode_here(systems, batches)

    work._decode = meanwhile
    (found,) = work(make_system(run_dir, "last"))
    assert (found.step, found.hypotheses) == (120, expected.hypotheses)

    newest.rename(elsewhere)
    with pytest.raises(RunFailedError, match="average:2 is another one now"):
        work(make_system(run_dir, "average:2"))


def test_an_ensemble(run_dir, work):
    (found,) = work(make_system(run_dir, "180", ("@120", "demo@average:2")))
    assert found.label == "180+120+demo-average-2"
    (alone,) = work(make_system(run_dir, "180"))
    assert found.digest != alone.digest


def stranger(folder: Path) -> Path:
    """A run whose vocabulary is another one."""
    folder.mkdir()
    config = make_config(folder)
    data = config.data.model_copy(update={"vocabulary_size": 80})
    config = config.model_copy(update={"data": data})
    manifest = Manifest.load(prepare(config.data))
    run_dir = folder / "runs" / "stranger"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.to_json())
    weights = build(config.model, manifest.vocabulary_size).state_dict()
    write_checkpoint(run_dir, 5, weights, data=manifest.sha256)
    return run_dir


def test_an_ensemble_with_another_vocabulary(run_dir, work, tmp_path):
    other = stranger(tmp_path / "other")
    with pytest.raises(UserError, match=r"different vocabularies .*vocabulary\.model"):
        work(make_system(run_dir, ensemble=(str(other),)))
    assert not list(evaluation_dir(run_dir).glob("*")), "nothing was begun"


def test_a_checkpoint_of_another_vocabulary(run_dir, work, tmp_path):
    other = stranger(tmp_path / "other")
    shutil.copytree(
        other / "checkpoints" / "step-00000005", run_dir / "checkpoints" / "step-00000190"
    )
    with pytest.raises(UserError, match="step-00000190 was trained on another corpus"):
        work(make_system(run_dir, "last"))


def test_sentences_that_are_cut_are_told(run_dir, tmp_path):
    source, reference = tmp_path / "long.en", tmp_path / "long.de"
    source.write_text("one dog\n" + "red house " * 40 + "\n")
    reference.write_text("eins Hund\nx\n")
    said: list[str] = []
    translated = translate_all(
        [(make_system(run_dir), "")],
        find_test_sets(run_dir, [], source=source, reference=reference),
        tmp_path,
        decode=decode_here,
        say=said.append,
    )
    assert len(list(translated)) == 1
    assert any(
        "1 sentences are longer than the 23 pieces" in s and s.endswith("line 2") for s in said
    )


def test_an_empty_line_has_an_empty_translation(run_dir, tmp_path):
    source, reference = tmp_path / "gap.en", tmp_path / "gap.de"
    source.write_text("one dog\n\n   \nred cat\n")
    reference.write_text("a\nb\nc\nd\n")
    result = evaluate(run_dir, source=source, reference=reference)
    lines = (result.file.parent / result.hypotheses).read_text().split("\n")
    assert lines[1] == lines[2] == ""
    assert lines[0]
    assert lines[3]


def test_two_evaluations_of_the_same_at_once(run_dir, work):
    system = make_system(run_dir)

    def while_decoding(systems, batches):
        with pytest.raises(UserError, match="another process is making this evaluation"):
            Work(run_dir)(system)
        yield from decode_here(systems, batches)

    work._decode = while_decoding
    assert len(work(system)) == 1


def test_parts_of_several_settings_wait_side_by_side(run_dir, work):
    work.stop_after = 2
    for beam in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            work(make_system(run_dir, beam=beam))
    work.stop_after = None
    for beam in (2, 3):
        work.said.clear()
        work(make_system(run_dir, beam=beam))
        assert any("going on after an interruption, 2 of" in line for line in work.said)


def test_more_than_may_be_open_is_said_plainly(run_dir, work, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("trainer.partial.os.open", refuse)
    with pytest.raises(UserError, match=r"^1 evaluations in one go .*ulimit -n"):
        work(make_system(run_dir))

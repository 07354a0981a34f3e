from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sacrebleu
import torch

from data_shards.errors import UserError
from tests.runs import pairs, write_lines
from trainer import exhibits_evaluation
from trainer.decoding_job import System, decode_here
from trainer.evaluate import (
    Result,
    evaluate,
    evaluate_systems,
    find_test_sets,
    override,
    read_results,
)
from trainer.frequency import COUNTS_NAME
from trainer.partial import PartialResult
from trainer.run import read_config, read_events


@pytest.fixture
def run_dir(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "runs" / "demo")


@pytest.fixture
def files(tmp_path):
    chosen = pairs(12, seed=5)
    return (
        write_lines(tmp_path / "newstest.en", [source for source, _ in chosen]),
        write_lines(tmp_path / "newstest.de", [target for _, target in chosen]),
    )


def test_scores_are_sacrebleus_own_on_the_files_written(run_dir):
    result = evaluate(run_dir, checkpoint="last")
    hypotheses = (result.file.parent / result.hypotheses).read_text().splitlines()
    references = Path(read_config(run_dir).data.test_target).read_text().splitlines()
    assert len(hypotheses) == len(references) == 30
    bleu = sacrebleu.corpus_bleu(hypotheses, [references])
    assert result.bleu == pytest.approx(bleu.score, abs=1e-9)
    assert result.bleu > 0
    assert result.chrf == pytest.approx(
        sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-9
    )
    assert "tok:13a" in result.signature
    assert "case:mixed" in result.signature
    assert result.chrf_signature.startswith("nrefs:1|case:mixed")


def test_the_result_file_and_the_event_say_all_that_comparison_needs(run_dir):
    result = evaluate(run_dir, checkpoint="average:2", test_set="valid", beam=2, length_penalty=1.0)
    assert result.file == run_dir / "evaluation" / "valid-average-2.json"
    values = json.loads(result.file.read_text())
    assert values["checkpoint"] == "average-2"
    assert values["averaged_steps"] == [120, 180]
    assert values["step"] == 180
    assert (values["beam"], values["length_penalty"], values["max_extra_length"]) == (2, 1.0, 10)
    assert values["num_sentences"] == 20
    assert values["sentences_per_second"] > 0
    assert values["signature"] == result.signature
    event = read_events(run_dir)[-1]
    assert event["event"] == "evaluated"
    assert (event["test_set"], event["checkpoint"], event["step"]) == ("valid", "average-2", 180)
    assert (event["bleu"], event["signature"]) == (result.bleu, result.signature)
    assert sorted(path.name for path in result.file.parent.iterdir()) == [
        "metrics.prom", "valid-average-2.hypotheses.txt", "valid-average-2.json",
    ]  # fmt: skip
    assert Result.read(result.file) == result


def test_batch_size_changes_neither_order_nor_score(run_dir):
    def hypotheses(**settings):
        result = evaluate(run_dir, checkpoint="last", **settings)
        return (result.file.parent / result.hypotheses).read_text()

    assert hypotheses(batch_tokens=1) == hypotheses(batch_tokens=10_000)


def test_every_metric_and_where_it_is_weak(run_dir):
    result = evaluate(run_dir, checkpoint="last")
    hypotheses = (result.file.parent / result.hypotheses).read_text().splitlines()
    references = Path(read_config(run_dir).data.test_target).read_text().splitlines()
    assert result.ter == pytest.approx(sacrebleu.corpus_ter(hypotheses, [references]).score)
    assert result.paper_bleu == pytest.approx(
        sacrebleu.corpus_bleu(
            hypotheses, [references], tokenize="none", smooth_method="none", force=True
        ).score
    ), "words without any punctuation: the tokens are the words"
    assert sum(row["num_sentences"] for row in result.by_length) == 30
    words = sum(len(line.split()) for line in references)
    assert sum(row["num_reference"] for row in result.by_frequency) == words
    assert "training pairs" in result.frequency_note
    assert len(result.worst) == 10
    chrf = [row["chrf"] for row in result.worst]
    assert chrf == sorted(chrf)


def test_an_evaluation_of_an_earlier_version_is_read(run_dir):
    result = evaluate(run_dir, checkpoint="last")
    old = {
        "test_set", "checkpoint", "step", "averaged_steps", "num_sentences", "bleu", "signature",
        "bleu_detail", "chrf", "chrf_signature", "beam", "length_penalty", "max_extra_length",
        "batch_tokens", "seconds", "sentences_per_second", "hypotheses", "source", "reference",
        "time",
    }  # fmt: skip
    values = {key: value for key, value in result.to_json().items() if key in old}
    result.file.write_text(json.dumps(values))
    found = Result.read(result.file)
    assert (found.bleu, found.ter, found.comparison) == (result.bleu, None, None)
    assert [item.bleu for item in read_results(run_dir)] == [result.bleu]
    assert exhibits_evaluation.by_frequency(found) is None
    assert exhibits_evaluation.comparisons([found]) == []


def test_a_corpus_whose_shards_are_gone_still_gives_scores(run_dir, tmp_path):
    config = read_config(run_dir)
    copy = shutil.copytree(config.data.folder(), tmp_path / "corpus")
    shutil.rmtree(copy / "shards")
    (copy / COUNTS_NAME).unlink(missing_ok=True)
    data = config.data.model_copy(update={"dir": copy})
    (run_dir / "config.json").write_text(config.model_copy(update={"data": data}).to_json())
    result = evaluate(run_dir)
    assert result.bleu > 0
    assert result.by_frequency == []
    assert "train-000000.tar" in result.frequency_note


@pytest.fixture(scope="module")
def compared(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "runs" / "demo"
    run_dir = shutil.copytree(trained_run, folder)
    evaluation = override(read_config(run_dir).evaluation)
    own, *others = (System(run_dir, name, evaluation) for name in ("180", "60", "last"))
    (found,) = evaluate_systems(
        [own], find_test_sets(run_dir, ["test"]), decode=decode_here, compared=others
    )
    return found.result


class TestComparison:
    def test_is_stored_with_the_result(self, run_dir, compared):
        rows = {(row["system"], row["metric"]): row for row in compared.comparison["rows"]}
        assert set(rows) == {
            (system, metric)
            for system in ("demo 180", "demo 60")
            for metric in ("bleu", "chrf", "ter")
        }
        assert compared.comparison["baseline"] == "demo 180"
        assert rows["demo 60", "bleu"]["score"] == pytest.approx(
            evaluate(run_dir, checkpoint="60").bleu
        )
        assert rows["demo 60", "bleu"]["difference"] < 0
        assert Result.read(compared.file) == compared

    def test_leaves_only_translations_of_the_others(self, compared):
        assert sorted(path.name for path in compared.file.parent.iterdir()) == [
            "metrics.prom", "test-180.hypotheses.txt", "test-180.json",
            "test-demo@60.hypotheses.txt", "test-demo@last.hypotheses.txt",
        ]  # fmt: skip

    def test_is_shown(self, compared):
        (shown,) = exhibits_evaluation.comparisons([compared])
        assert shown["baseline"] == "demo 180"
        assert {row["metric"] for row in shown["rows"]} == {"BLEU", "chrF", "TER"}
        assert "12345" in dict(shown["signatures"])["BLEU"]


def test_exhibits_of_a_result(run_dir):
    result = evaluate(run_dir)
    (row,) = exhibits_evaluation.results([result])
    assert (row["bleu"], row["ter"], row["paper_bleu"]) == (
        result.bleu, result.ter, result.paper_bleu,
    )  # fmt: skip
    assert [name for name, _ in exhibits_evaluation.signatures([result, result])] == [
        "BLEU", "TER", "chrF", "paper BLEU",
    ]  # fmt: skip
    assert exhibits_evaluation.by_length(result)[0]["words"] == "0-9"
    seen = exhibits_evaluation.by_frequency(result)
    assert seen["rows"][-1]["recall"] == pytest.approx(
        seen["rows"][-1]["matched"] / seen["rows"][-1]["reference"]
    )
    assert len(exhibits_evaluation.worst(result)) == 10
    assert exhibits_evaluation.worst(None) == exhibits_evaluation.by_length(None) == []


def test_systems_of_other_languages_are_not_compared(run_dir, tmp_path):
    config = read_config(run_dir)
    copy = shutil.copytree(config.data.folder(), tmp_path / "corpus")
    file = copy / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_language": "fr"}))
    other = shutil.copytree(run_dir, run_dir.parent / "french")
    data = config.data.model_copy(update={"dir": copy})
    (other / "config.json").write_text(config.model_copy(update={"data": data}).to_json())
    systems = [System(folder, "last", config.evaluation) for folder in (run_dir, other)]
    with pytest.raises(UserError, match=r"french translates en-fr and demo en-de"):
        evaluate_systems(
            systems[:1],
            find_test_sets(run_dir, ["test"]),
            decode=decode_here,
            compared=systems[1:],
        )


def test_the_users_own_files(run_dir, files):
    source, reference = files
    result = evaluate(run_dir, source=source, reference=reference)
    assert result.test_set == "newstest.en"
    assert result.file.name == "newstest.en-best.json"
    assert result.num_sentences == 12
    assert (result.source, result.reference) == (str(source), str(reference))


def test_threads_are_set_for_the_decoding_alone(run_dir, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    evaluate(run_dir, threads=1)
    assert seen == [1, before]


class TestMistakes:
    def test_texts_of_different_length(self, run_dir, files):
        source, reference = files
        reference.write_text("eins\n")
        with pytest.raises(UserError, match=r"not parallel: .*\.en has 12 lines, .*\.de has 1$"):
            evaluate(run_dir, source=source, reference=reference)

    def test_a_missing_file(self, run_dir, files):
        with pytest.raises(UserError, match=r"file not found: .*absent"):
            evaluate(run_dir, source=files[0], reference=files[0].with_name("absent"))

    def test_a_file_without_its_partner(self, run_dir, files):
        with pytest.raises(UserError, match="both a source and a reference"):
            evaluate(run_dir, source=files[0])

    def test_an_empty_file(self, run_dir, tmp_path):
        empty = write_lines(tmp_path / "empty", [])
        with pytest.raises(UserError, match="nothing to evaluate"):
            evaluate(run_dir, source=empty, reference=empty)

    def test_no_checkpoint_yet(self, run_dir):
        shutil.rmtree(run_dir / "checkpoints")
        with pytest.raises(UserError, match="no checkpoint yet"):
            evaluate(run_dir)

    def test_a_setting_out_of_range(self, run_dir):
        with pytest.raises(UserError, match=r"beam: .*greater than or equal to 1"):
            evaluate(run_dir, beam=0)

    def test_an_unknown_test_set(self, run_dir):
        with pytest.raises(UserError, match="unknown test set 'train'"):
            evaluate(run_dir, test_set="train")

    def test_a_failed_evaluation_leaves_no_result(self, run_dir):
        with pytest.raises(UserError):
            evaluate(run_dir, checkpoint="7")
        assert not (run_dir / "evaluation").exists()


class TestNames:
    def twin(self, files, folder):
        """Files of the same names that hold something else."""
        folder.mkdir()
        chosen = pairs(7, seed=6)
        return tuple(
            write_lines(folder / file.name, [pair[side] for pair in chosen])
            for side, file in enumerate(files)
        )

    def test_files_of_one_name_keep_their_own_results(self, run_dir, files, tmp_path):
        twin = self.twin(files, tmp_path / "b")
        first = evaluate(run_dir, source=files[0], reference=files[1])
        for _ in range(2):
            other = evaluate(run_dir, source=twin[0], reference=twin[1])
            assert other.file.name.startswith("newstest.en-")
            assert other.test_set == other.file.name.removesuffix("-best.json")
        assert other.file != first.file
        again = evaluate(run_dir, source=files[0], reference=files[1])
        assert again.file == first.file
        found = {(item.source, item.num_sentences) for item in read_results(run_dir)}
        assert found == {(str(files[0]), 12), (str(twin[0]), 7)}
        hypotheses = first.file.parent / first.hypotheses
        assert len(hypotheses.read_text().splitlines()) == 12

    @pytest.mark.parametrize("name", ["test", "wmt14-full"])
    def test_a_file_named_as_a_test_set(self, run_dir, files, name):
        source = files[0].rename(files[0].with_name(name))
        result = evaluate(run_dir, source=source, reference=files[1])
        assert result.file.name.startswith(f"{name}-")
        assert result.file.name != f"{name}-best.json"
        assert result.test_set != name

    def test_a_result_of_another_search_is_not_lost_silently(self, run_dir):
        said = []
        config = read_config(run_dir).evaluation
        test_sets = find_test_sets(run_dir, ["test"])
        for beam in (2, 2, 3):
            system = System(run_dir, "last", override(config, beam=beam))
            evaluate_systems([system], test_sets, decode=decode_here, say=said.append)
        replaced = [line for line in said if "is replaced" in line]
        assert len(replaced) == 1
        assert replaced[0].startswith("test-last.json: the earlier result (beam 2, BLEU ")


class TestRunsOfOneName:
    def test_are_numbered_and_each_compared_once(self, run_dir, tmp_path):
        other = shutil.copytree(run_dir, tmp_path / "elsewhere" / "demo")
        link = tmp_path / "link"
        link.symlink_to(other)
        config = read_config(run_dir).evaluation
        folders = (other, link, other, run_dir)
        compared = [System(folder, "60", config) for folder in folders]
        (found,) = evaluate_systems(
            [System(run_dir, "180", override(config, beam=2))],
            find_test_sets(run_dir, ["test"]),
            decode=decode_here,
            compared=compared,
        )
        systems = found.result.comparison["systems"]
        assert [item["system"] for item in systems] == ["demo 180", "demo-2 60", "demo 60"]
        assert [item["run"] for item in systems] == [str(run_dir), str(other), str(run_dir)]
        assert [item["checkpoint"] for item in systems] == ["180", "60", "60"]
        assert [item["step"] for item in systems] == [180, 60, 60]
        assert [item["settings"]["beam"] for item in systems] == [2, config.beam, config.beam]
        assert not list(found.result.file.parent.glob("*.partial.jsonl"))

    def test_one_compared_with_itself_has_no_table(self, run_dir):
        said = []
        config = read_config(run_dir).evaluation
        own, same = (System(run_dir, name, config) for name in ("180", "last"))
        (found,) = evaluate_systems(
            [own],
            find_test_sets(run_dir, ["test"]),
            decode=decode_here,
            compared=[same],
            say=said.append,
        )
        assert found.result.comparison is None
        assert "test, checkpoint 180: demo last is the very same system" in said


def test_results_are_written_as_soon_as_they_are_there(run_dir):
    """And after an interruption nothing is translated again."""
    config = read_config(run_dir).evaluation
    systems = [System(run_dir, name, config) for name in ("60", "180")]
    test_sets = find_test_sets(run_dir, ["test"])
    decoded = []

    def interrupted(systems, batches):
        for batch in decode_here(systems, batches):
            if batch.job == 1:
                raise KeyboardInterrupt
            yield batch

    def counted(systems, batches):
        for batch in decode_here(systems, batches):
            decoded.append(batch.job)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        evaluate_systems(systems, test_sets, decode=interrupted)
    assert [item.checkpoint for item in read_results(run_dir)] == ["60"]
    found = evaluate_systems(systems, test_sets, decode=counted)
    assert [item.result.checkpoint for item in found] == ["60", "180"]
    assert set(decoded) == {1}


def test_the_partial_is_removed_while_nobody_else_can_have_it(run_dir, monkeypatch):
    system = System(run_dir, "last", read_config(run_dir).evaluation)
    refused = []

    def remove(partial):
        with pytest.raises(UserError, match="another process") as caught:
            PartialResult(partial.file, "other")
        refused.append(caught)

    monkeypatch.setattr(PartialResult, "remove", remove)
    evaluate_systems([system], find_test_sets(run_dir, ["test"]), decode=decode_here)
    assert len(refused) == 1


def test_what_nobody_goes_on_with_is_removed(run_dir):
    config = read_config(run_dir).evaluation
    test_sets = find_test_sets(run_dir, ["test"])

    def interrupted(systems, batches):
        yield next(decode_here(systems, batches))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_systems(
            [System(run_dir, "60", override(config, batch_tokens=24))],
            test_sets,
            decode=interrupted,
        )
    evaluate_systems([System(run_dir, "180", config)], test_sets, decode=decode_here)
    folder = run_dir / "evaluation"
    assert len(list(folder.glob("*.partial.jsonl"))) == 1, "of another checkpoint"
    evaluate_systems([System(run_dir, "60", config)], test_sets, decode=decode_here)
    assert not list(folder.glob("*.partial.jsonl"))

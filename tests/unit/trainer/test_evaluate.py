from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sacrebleu
import torch

from data_shards.errors import UserError
from tests.runs import pairs, write_lines
from trainer.evaluate import evaluate
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
    leftovers = [path for path in result.file.parent.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_batch_size_changes_neither_order_nor_score(run_dir):
    def hypotheses(**settings):
        result = evaluate(run_dir, checkpoint="last", **settings)
        return (result.file.parent / result.hypotheses).read_text()

    assert hypotheses(batch_tokens=1) == hypotheses(batch_tokens=10_000)


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

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_shards.errors import UserError
from model.build import build
from model.config import ModelConfig
from tests.runs import pairs
from trainer import export as export_module
from trainer import export_ctranslate2
from trainer.agreement import score
from trainer.export import export, load_exported
from trainer.run import load_model
from trainer.translate import Translator

ctranslate2 = pytest.importorskip("ctranslate2")

REPOSITORY = Path(__file__).resolve().parents[3]
LINES = [source for source, _ in pairs(40, seed=5)]


@pytest.fixture
def run_dir(trained_run, tmp_path):
    """A copy with its corpus, in a place that the test may empty."""
    shutil.copytree(trained_run.parents[1] / "data", tmp_path / "home" / "data")
    copy = shutil.copytree(trained_run, tmp_path / "home" / "runs" / "demo")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "home" / "data")
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_model(trained_run)


def of_shape(loaded, **values):
    """A random model of another shape with the vocabulary of ``loaded``."""
    torch.manual_seed(2)
    shape = loaded.config.model.model_copy(update=values)
    model = build(shape, loaded.vocabulary.size).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias zero, no gain one
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config = loaded.config.model_copy(update={"model": shape})
    return dataclasses.replace(loaded, model=model, config=config)


def ctranslate2_score(folder, loaded, source, target):
    """CTranslate2's log-probability of a translation, EOS included, and ours."""
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    [source_ids], [target_ids] = (loaded.vocabulary.encode([text]) for text in (source, target))
    pieces = [loaded.vocabulary.pieces(ids) for ids in (source_ids, target_ids)]
    theirs = sum(translator.score_batch([pieces[0]], [pieces[1]])[0].log_probs)
    return theirs, score(loaded, [*source_ids, 2], target_ids, exponent=0.0)


def program_of(folder):
    """The Python lines of the export's own page."""
    [program] = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(program.splitlines()) == 5
    return program


def run_program(folder, sentence):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program_of(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        input=f"{sentence}\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removeprefix("Sentence: ").removesuffix("\n")


class TestCTranslate2:
    @pytest.mark.parametrize("norm", ["pre", "post"])
    @pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_the_model_is_the_same_function(
        self, loaded, tmp_path, norm, positions, tie_embeddings
    ):
        other = of_shape(
            loaded,
            norm=norm,
            positions=positions,
            tie_embeddings=tie_embeddings,
            encoder_layers=3,
            decoder_layers=2,
        )
        export_ctranslate2.write(other, tmp_path, "float32")
        theirs, ours = ctranslate2_score(tmp_path, other, "one old dog sees two", "Baum alt sieht")
        assert ours < -20  # random weights: nothing is certain
        assert theirs == pytest.approx(ours, abs=1e-4)

    @pytest.mark.parametrize(
        ("quantization", "tolerance"), [("float16", 0.1), ("bfloat16", 0.5), ("int8", 0.5)]
    )
    def test_quantized_it_is_smaller_and_nearly_the_same(
        self, loaded, tmp_path, quantization, tolerance
    ):
        before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
        sizes = {}
        for kind in ("float32", quantization):
            folder = tmp_path / kind
            folder.mkdir()
            export_ctranslate2.write(loaded, folder, kind)
            sizes[kind] = (folder / "model.bin").stat().st_size
        theirs, ours = ctranslate2_score(folder, loaded, "one old dog", "Hund alt eins")
        assert theirs == pytest.approx(ours, abs=tolerance)
        assert theirs != ours
        assert sizes[quantization] < 0.7 * sizes["float32"]
        for name, weight in loaded.model.state_dict().items():
            assert torch.equal(weight, before[name])

    def test_the_longest_inputs_and_outputs_have_positions(self, loaded, tmp_path):
        """The model was given 24 positions; sinusoids know no end."""
        export_ctranslate2.write(loaded, tmp_path, "float32")
        translator = ctranslate2.Translator(str(tmp_path), intra_threads=1)
        pieces = loaded.vocabulary.pieces([5] * 2000)
        found = translator.translate_batch([pieces], min_decoding_length=256)
        assert len(found[0].hypotheses[0]) == 256

    def test_options_keep_within_learned_positions(self, loaded, tmp_path):
        other = of_shape(loaded, positions="learned")
        export_ctranslate2.write(other, tmp_path, "float32")
        translator = ctranslate2.Translator(str(tmp_path), intra_threads=1)
        options = export_ctranslate2.search_options(other.config)
        pieces = loaded.vocabulary.pieces([5] * 100)
        found = translator.translate_batch([pieces], **options, min_decoding_length=24)
        assert len(found[0].hypotheses[0]) == 24

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, {"beam_size": 4, "length_penalty": 1.0, "disable_unk": True}),
            (
                {"length_rule": "average", "length_penalty": 0.7, "unknown": "keep"},
                {"beam_size": 4, "length_penalty": 0.7},
            ),
            (
                {"length_penalty": 0.0, "search": "greedy"},
                {"beam_size": 1, "length_penalty": 0.0, "disable_unk": True},
            ),
        ],
    )
    def test_the_runs_own_search_as_ctranslate2_has_it(self, loaded, settings, expected):
        evaluation = loaded.config.evaluation.model_copy(update=settings)
        config = loaded.config.model_copy(update={"evaluation": evaluation})
        assert export_ctranslate2.search_options(config) == expected

    def test_five_lines_translate(self, run_dir, loaded, tmp_path):
        export(run_dir, tmp_path / "out", format="ctranslate2")
        shutil.rmtree(tmp_path / "home")
        evaluation = loaded.config.evaluation.model_copy(
            update={"length_rule": "average", "length_penalty": 1.0}
        )
        [[ours]] = Translator([loaded], evaluation).translate([LINES[0]])
        assert run_program(tmp_path / "out", LINES[0]) == ours.text

    @pytest.mark.parametrize(
        ("setting", "shown"),
        [
            ({"kind": "lstm"}, "model.kind=lstm"),
            ({"attention": "additive"}, "model.attention=additive"),
            ({"local_radius": 0}, "model.local_radius=0"),
            ({"d_k": 7}, "model.d_k=7"),
            ({"d_v": 7}, "model.d_v=7"),
        ],
    )
    def test_a_model_that_ctranslate2_lacks_is_told(self, setting, shown):
        plain = {"d_model": 32, "num_heads": 4, "d_ff": 48}
        export_ctranslate2.check(ModelConfig(**plain, d_k=8, d_v=8))
        if "kind" in setting:
            plain = {"d_model": 32}
        with pytest.raises(UserError, match=f"no model with {shown}: give --format safetensors"):
            export_ctranslate2.check(ModelConfig(**plain, **setting))

    def test_without_the_package_the_mend_is_told(self, run_dir, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ctranslate2", None)
        with pytest.raises(UserError, match=r"pip install '\.\[ctranslate2\]'"):
            export(run_dir, tmp_path / "out", format="ctranslate2")
        assert not (tmp_path / "out").exists()
        export(run_dir, tmp_path / "out", format="safetensors")


class TestSafetensors:
    def test_it_comes_back_whole_without_run_and_corpus(self, run_dir, tmp_path):
        before = load_model(run_dir, "average")
        expected = Translator([before], before.config.evaluation).translate(LINES)
        export(run_dir, tmp_path / "out", format="safetensors", checkpoint="average")
        shutil.rmtree(tmp_path / "home")
        after = load_exported(tmp_path / "out")
        assert (after.label, after.step, after.steps) == ("average", 180, (60, 120, 180))
        assert after.config.model == before.config.model
        assert after.config.evaluation == before.config.evaluation
        assert after.manifest.source_language == before.manifest.source_language
        assert after.manifest.sha256 == before.manifest.sha256
        assert Translator([after], after.config.evaluation).translate(LINES) == expected

    def test_five_lines_translate(self, run_dir, loaded, tmp_path):
        export(run_dir, tmp_path / "out", format="safetensors")
        shutil.rmtree(tmp_path / "home")
        [[ours]] = Translator([loaded], loaded.config.evaluation).translate([LINES[0]])
        assert run_program(tmp_path / "out", LINES[0]) == ours.text

    def test_other_folders_and_damaged_weights_are_told(self, run_dir, tmp_path):
        with pytest.raises(UserError, match="no safetensors export"):
            load_exported(tmp_path / "nowhere")
        export(run_dir, tmp_path / "other", format="ctranslate2")
        with pytest.raises(UserError, match="no safetensors export"):
            load_exported(tmp_path / "other")
        export(run_dir, tmp_path / "out", format="safetensors")
        weights = tmp_path / "out" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        with pytest.raises(UserError, match=r"model\.safetensors cannot be loaded"):
            load_exported(tmp_path / "out")

    def test_it_is_float32_only(self, run_dir, tmp_path):
        with pytest.raises(UserError, match="int8: safetensors are written as float32"):
            export(run_dir, tmp_path / "out", format="safetensors", quantization="int8")


class TestFolder:
    @pytest.mark.parametrize("format", ["ctranslate2", "safetensors"])
    def test_the_documentation_shows_the_same_lines(self, run_dir, tmp_path, format):
        export(run_dir, tmp_path / "out", format=format)
        documentation = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
        shown = re.findall(r"```python\n(.*?)\n```", documentation, re.DOTALL)
        program = ast.dump(ast.parse(program_of(tmp_path / "out")))
        assert program in [ast.dump(ast.parse(block)) for block in shown]

    def test_it_tells_what_it_is_and_no_place_of_this_machine(self, run_dir, tmp_path):
        config = json.loads((run_dir / "config.json").read_text())
        config["data"]["shards_url"] = f"https://place-of-shards{tmp_path}"
        (run_dir / "config.json").write_text(json.dumps(config))
        evaluations = run_dir / "evaluation"
        evaluations.mkdir()
        kept = {
            "test_set": "test", "checkpoint": "last", "step": 180, "bleu": 12.345,
            "signature": "sig|one", "chrf": 34.5, "chrf_signature": "sig|two",
            "source": str(tmp_path),
        }  # fmt: skip
        for name, values in (
            ("a", kept),
            ("b", {**kept, "test_set": "valid", "checkpoint": "best"}),
            ("c", {**kept, "test_set": "valid", "step": 120}),
        ):
            (evaluations / f"{name}.json").write_text(json.dumps(values))
        for format in ("ctranslate2", "safetensors"):
            folder = tmp_path / format
            export(run_dir, folder, format=format, checkpoint="last")
            card = json.loads((folder / "export.json").read_text())
            assert (card["run"], card["checkpoint"], card["step"]) == ("demo", "last", 180)
            assert card["num_pairs"] == load_model(run_dir).manifest.num_pairs
            [score] = card["scores"]
            assert (score["test_set"], score["bleu"], score["signature"]) == (
                "test", 12.345, "sig|one",
            )  # fmt: skip
            page = (folder / "README.md").read_text()
            assert "- test: BLEU 12.35 (`sig|one`), chrF 34.50 (`sig|two`)" in page
            assert "the user's own files" in page
            for file in folder.iterdir():
                assert str(tmp_path).encode() not in file.read_bytes(), file
                assert str(tmp_path.parent).encode() not in file.read_bytes(), file

    def test_an_export_is_replaced_only_if_told(self, run_dir, tmp_path):
        output = tmp_path / "deep" / "out"
        export(run_dir, output, format="ctranslate2")
        before = {file.name: file.read_bytes() for file in output.iterdir()}
        with pytest.raises(UserError, match="--overwrite"):
            export(run_dir, output, format="safetensors")
        assert {file.name: file.read_bytes() for file in output.iterdir()} == before
        done = export(run_dir, output, format="safetensors", overwrite=True)
        assert not (output / "model.bin").exists()
        assert done.num_bytes == sum(file.stat().st_size for file in output.iterdir())
        assert [path.name for path in output.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "the run"])
    def test_nothing_else_is_ever_replaced(self, run_dir, tmp_path, kind):
        output = tmp_path / "out"
        if kind == "folder":
            output.mkdir()
            (output / "export.json").write_text('{"made_by": "someone"}')
        elif kind == "empty folder":
            output.mkdir()
        elif kind == "file":
            output.write_text("precious")
        else:
            output = run_dir
        with pytest.raises(UserError, match="not an export"):
            export(run_dir, output, format="safetensors", overwrite=True)
        assert output.exists()
        assert load_model(run_dir).step == 180

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_what_fails_on_the_way_leaves_what_was_there(
        self, run_dir, tmp_path, monkeypatch, error
    ):
        output = tmp_path / "out"
        export(run_dir, output, format="safetensors")
        before = {file.name: file.read_bytes() for file in output.iterdir()}

        def fail(*arguments: object) -> str:
            raise error

        monkeypatch.setattr(export_module, "readme", fail)
        expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
        for folder in (output, tmp_path / "new"):
            with pytest.raises(expected, match=r"No space left|^$"):
                export(run_dir, folder, format="ctranslate2", overwrite=True)
        assert {file.name: file.read_bytes() for file in output.iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]

    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    @pytest.mark.parametrize("moved", ["out", "draft"])
    @pytest.mark.parametrize("is_done", [False, True])
    def test_an_export_is_there_wherever_replacing_it_breaks_off(
        self, run_dir, tmp_path, monkeypatch, error, moved, is_done
    ):
        output = tmp_path / "out"
        export(run_dir, output, format="safetensors")
        rename = Path.rename

        def fail(path, target):
            if path.name == "out" if moved == "out" else path.suffix == ".partial":
                if is_done:
                    rename(path, target)
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            export(run_dir, output, format="ctranslate2", overwrite=True)
        is_replaced = (moved, is_done) == ("draft", True)
        assert (output / "model.bin").exists() is is_replaced
        assert (output / "model.safetensors").exists() is not is_replaced
        assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import cluster.cli
from cluster.cli import cli
from tests.cross_only import cross_only
from tests.runs import make_run
from trainer import run as trainer_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("seen"), steps=(20,))


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "demo"))


def attention(run_dir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["attention", str(run_dir), *arguments])


def test_it_loads_where_clicks_types_are_not_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type("ParamType", (click.ParamType,), {"__class_getitem__": None})
    monkeypatch.setattr(click, "ParamType", plain)
    file = Path(cluster.cli.__file__).parent / "commands" / "attention.py"
    command = runpy.run_path(str(file))["attention"]
    assert [parameter.name for parameter in command.params][:2] == ["run", "sentence"]


def test_an_image_in_the_runs_folder(run_dir: Path) -> None:
    result = attention(run_dir, "one red dog")
    assert result.exit_code == 0, result.output
    file = run_dir / "attention" / "cross-layer-1-head-mean.png"
    assert result.stdout == f"{file}\n"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        ("cross", ["Haus", "</s>"], ["red", "dog", "</s>"]),
        ("encoder", ["red", "dog", "</s>"], ["red", "dog", "</s>"]),
        ("decoder", ["Haus", "</s>"], ["<s>", "Haus"]),
    ],
)
def test_a_given_translation(
    run_dir: Path, tmp_path: Path, kind: str, rows: list[str], columns: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn: list[tuple[list[str], list[str], int]] = []
    monkeypatch.setattr(
        "trainer.heatmaps.write_image",
        lambda file, panels, rows, columns, **_: drawn.append((rows, columns, len(panels))),
    )
    arguments = ("--target", "Haus", "--kind", kind, "--layer", "1", "--head", "all")
    result = attention(run_dir, "red dog", *arguments, "--output", str(tmp_path / "a.svg"))
    assert result.exit_code == 0, result.output
    [(found_rows, found_columns, number)] = drawn
    assert number == 4
    for found, expected in ((found_rows, rows), (found_columns, columns)):
        whole = (
            "".join(found).replace("\u2581", " ").replace("<s>", "<s> ").replace("</s>", " </s>")
        )
        assert whole.split() == expected


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["red", "--layer", "3"], "the decoder has layers 1 to 2"),
        (["red", "--kind", "encoder", "--layer", "2"], "the encoder has layers 1 to 1"),
        (["red", "--head", "5"], "a layer has heads 1 to 4"),
        (["red", "--head", "best"], "neither a number nor all or mean"),
        (["red", "--layer", "-1"], "neither a number nor all"),
        ([" "], "the sentence is empty"),
        (["red", "--output", "a.gif"], "ends in .png, .svg, .pdf"),
        (["red", "--checkpoint", "7"], "no checkpoint of step 7"),
    ],
)
def test_wrong_input_is_told_and_nothing_written(
    run_dir: Path, arguments: list[str], part: str
) -> None:
    result = attention(run_dir, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run_dir / "attention").exists()


def test_a_model_without_self_attention(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = trainer_run.load_model
    monkeypatch.setattr("trainer.run.load_model", lambda *args, **kw: cross_only(load(*args, **kw)))
    for kind in ("encoder", "decoder"):
        result = attention(run_dir, "red dog", "--kind", kind)
        assert result.exit_code == 2
        assert result.stderr == (
            f"babelray: error: --kind {kind}: this model has no self-attention, only --kind cross\n"
        )
    result = attention(run_dir, "red dog")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("cross-layer-1-head-mean.png\n")

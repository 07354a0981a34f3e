"""``babelray export``: what it prints and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli import cli
from tests.runs import make_run
from trainer import agreement

pytest.importorskip("ctranslate2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"), steps=(100,))


def export(run_dir: Path, *arguments: object) -> Result:
    every = ["export", run_dir.name, "--runs", run_dir.parent, *arguments]
    return CliRunner().invoke(cli, [str(argument) for argument in every])


def test_the_folder_is_the_result(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = export(run_dir, "--format", "ctranslate2", "--output", output, "--verify", 30)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert "step 100, float32" in result.stderr
    assert "30 of 30 sentences are translated alike" in result.stderr
    assert (output / "model.bin").is_file()


def test_what_does_not_agree_fails_at_float32_alone(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = agreement.Difference(7, "a b", "c d", "e f", our_score=-1.0, their_score=-2.0)
    wrong = agreement.Agreement(30, [found])
    monkeypatch.setattr(agreement, "compare", lambda *arguments: wrong)
    for quantization, status in (("float32", 1), ("int8", 0)):
        output = tmp_path / quantization
        arguments = ("--format", "ctranslate2", "--output", output, "--verify", 30)
        result = export(run_dir, *arguments, "--quantization", quantization)
        assert result.exit_code == status
        assert "29 of 30" in result.stderr
        for part in ("difference in line 7: a b", "-1.000000  c d", "-2.000000  e f"):
            assert part in result.stderr
        assert ("do not use" in result.stderr) == (status == 1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--format", "onnx"], "'onnx' is not one of"),
        (["--format", "safetensors", "--verify", "3"], "give --format ctranslate2"),
        (["--format", "safetensors", "--quantization", "int8"], "written as float32"),
        (["--format", "safetensors", "--checkpoint", "7"], "no checkpoint of step 7"),
        ([], "Missing option '--format'"),
    ],
)
def test_wrong_input_is_told(
    run_dir: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    result = export(run_dir, *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []

"""What a command tells a person to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster import train
from cluster.cli import cli
from cluster.failures import failures_path
from cluster.hints import runs_flag
from data_shards import shards


def test_the_folder_of_runs_is_named_unless_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_flag(Path("runs")) == ""
    assert runs_flag(Path("./runs")) == ""
    assert runs_flag(tmp_path / "runs") == ""
    assert runs_flag(Path("other")) == " --runs other"
    assert shlex.split(runs_flag(Path("/my runs"))) == ["--runs", "/my runs"]


def test_a_failure_says_how_to_go_on_with_its_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    failures_path(run_dir).parent.mkdir(parents=True)
    said = str(train._failed(ValueError("no"), "demo", run_dir))
    assert said.endswith(f"babelray train --name demo --resume --runs {tmp_path}")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (None, "next: babelray evaluate demo --runs {runs}"),
        (2, "stopped at step 9; go on: babelray train --name demo --resume --runs {runs}"),
    ],
)
def test_train_says_what_comes_next_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, said: str
) -> None:
    def start(*arguments: object, **named: object) -> train.Outcome:
        return train.Outcome(tmp_path / "demo", 9, "stopped", None, 1.0, number)

    monkeypatch.setattr(train, "start", start)
    monkeypatch.setattr(shards, "prepare", lambda *arguments, **named: None)
    (tmp_path / "empty.yaml").write_text("{}")
    arguments = ["train", "--config", tmp_path / "empty.yaml", "--name", "demo", "--runs", tmp_path]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert said.format(runs=tmp_path) in result.stderr.splitlines()

"""What a command tells a person to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cluster.failures import failures_path
from cluster.hints import runs_flag
from cluster.train import _failed


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
    said = str(_failed(ValueError("no"), "demo", run_dir))
    assert said.endswith(f"babelray train --name demo --resume --runs {tmp_path}")

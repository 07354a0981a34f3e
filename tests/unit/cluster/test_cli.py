"""The command line: help, wrong input, exit statuses. What Ray does is in tests/integration."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

import cluster.train
import data_shards.shards
from cluster.cli import cli
from data_shards.config import DataConfig
from data_shards.errors import DataError, RunFailedError
from data_shards.manifest import Manifest

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = str(REPOSITORY / "configs" / "tiny.yaml")


def babelray(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)


def refused(result: Result, *parts: str) -> None:
    """Exit status 2 and one message on stderr that holds ``parts``; no traceback, no result."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def config_file(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> Path:
    """A small model on the corpus that the tests share."""
    file = tmp_path / "toy.yaml"
    data = prepared[0].model_dump(mode="json")
    file.write_text(yaml.safe_dump({"model": {"preset": "tiny"}, "data": data}))
    return file


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The arguments of each call of ``start``, which is not made."""
    calls: list[dict[str, Any]] = []

    def start(config: Any, name: str, **kwargs: Any) -> cluster.train.Outcome:
        calls.append({"config": config, "name": name, **kwargs})
        return cluster.train.Outcome(tmp_path / name, 5, "max_steps", 1.5, 2.0)

    monkeypatch.setattr(cluster.train, "start", start)
    return calls


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
    return found


@pytest.mark.parametrize("command", [(), *commands(cli)], ids=" ".join)
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = babelray(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    if command not in {(), ("data",)}:
        assert "Example" in result.stdout
        assert f"babelray {' '.join(command)} " in result.stdout


def test_help_needs_nothing_heavy() -> None:
    program = (
        "import sys, cluster.cli\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'pydantic', 'numpy', 'webdataset'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_a_wrong_configuration_costs_no_heavy_import() -> None:
    program = (
        "import sys, cluster.cli\n"
        "try: cluster.cli.cli(['train', '--config', sys.argv[1], '--set', 'model.x=1'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'webdataset', 'sentencepiece'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, TINY], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "unknown key model.x" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "trainer.max_step=3"], ["unknown key", "did you mean trainer.max_steps?"]),
        (["--set", "trainer.max_steps=0"], ["trainer.max_steps", "given: 0"]),
        (["--set", "data.lanes=many"], ["data.lanes", "many"]),
        (["--set", "model.d_model"], ["section.key=value"]),
        (["--workers", "0"], ["--workers", "'0'", "at least 1"]),
        (["--workers", "0:2"], ["--workers", "'0:2'", "at least 1"]),
        (["--workers", "two"], ["--workers", "'two'", "such as 1:4"]),
        (["--workers", "a:b"], ["--workers", "'a:b'", "such as 1:4"]),
        (["--workers", "1:2:3"], ["--workers", "such as 1:4"]),
        (["--workers", "-1"], ["--workers", "such as 1:4"]),
        (["--workers", "2:"], ["--workers", "such as 1:4"]),
        (["--workers", "4:1"], ["--workers", "the least comes first: 1:4"]),
        (["--workers", "5"], ["--workers 5", "data.lanes 4", "fewer workers"]),
        (["--workers", "1:9", "--set", "data.lanes=8"], ["--workers 1:9", "data.lanes 8"]),
        (["--name", "a/b"], ["run name 'a/b'"]),
        (["--dashboard-port", "70000"], ["--dashboard-port"]),
        (["--resume"], ["--name RUN"]),
        (["--resume", "--overwrite"], ["give one of"]),
        (["--resume", "--name", "nowhere"], ["no run 'nowhere'"]),
        (["--set", "model.num_heads=5"], ["d_model 128 is not divisible", "num_heads 5"]),
        (["--nonsense"], ["No such option", "--nonsense"]),
        (["surplus"], ["unexpected extra argument"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_train_refuses(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    refused(babelray("train", "--config", TINY, "--runs", runs, *arguments), *parts)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "not found"),
        ("- a list", "mapping"),
        ("a: [", "not YAML"),
        ("modelx: {}", "unknown key modelx"),
        ("data: {corpus: 7}", "data.corpus"),
    ],
)
def test_train_refuses_a_file(text: str | None, part: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    refused(babelray("train", "--config", file), "mine.yaml", part)


def test_train_without_a_configuration() -> None:
    refused(babelray("train"), "--config configs/tiny.yaml")


def test_train_refuses_a_port_in_use_and_leaves_the_name_free(
    config_file: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for _ in range(2):
            refused(
                babelray(
                    "train", "--config", config_file, "--runs", tmp_path / "runs",
                    "--name", "x", "--dashboard-port", port,
                ),
                f"--dashboard-port {port}",
                "give another port",
            )  # fmt: skip


def test_train_hands_over_what_was_asked(
    config_file: Path, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    result = babelray(
        "train", "--config", config_file, "--name", "x", "--runs", tmp_path, "--workers", 2,
        "--set", "trainer.max_steps=7", "--set", "model.dropout=0.25", "--mirror", "/somewhere",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'x'}: finished (max_steps)\n"
    (call,) = started
    assert (call["name"], call["workers"], call["runs"]) == ("x", 2, tmp_path)
    assert call["config"].trainer.max_steps == 7
    assert call["config"].model.dropout == 0.25
    assert call["config"].data.mirror == "/somewhere"


@pytest.mark.parametrize(("given", "workers"), [("1:4", (1, 4)), ("3:3", (3, 3)), ("4", 4)])
def test_train_takes_bounds_for_the_workers(
    given: str, workers: object, config_file: Path, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    arguments = ["--name", "x", "--runs", tmp_path, "--workers", given, "--set", "data.lanes=4"]
    result = babelray("train", "--config", config_file, *arguments)
    assert result.exit_code == 0, result.output
    assert [call["workers"] for call in started] == [workers]


def test_train_prints_json_for_scripts(
    config_file: Path, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    result = babelray("train", "--config", config_file, "--runs", tmp_path, "--json")
    values = json.loads(result.stdout)
    assert values["run"].startswith("toy-20")
    assert values["reason"] == "max_steps"


def test_train_prepares_a_corpus_that_is_not_there(
    config_file: Path, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    root = tmp_path / "fresh"
    result = babelray(
        "train", "--config", config_file, "--runs", tmp_path, "--set", f"data.root={root}"
    )
    assert result.exit_code == 0, result.output
    (folder,) = root.glob("*/manifest.json")
    assert started[0]["config"].data.folder() == folder.parent


def test_a_stopped_run_exits_as_by_the_signal(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = cluster.train.Outcome(tmp_path, 5, "stopped", None, 2.0, signal=signal.SIGTERM)
    monkeypatch.setattr(cluster.train, "start", lambda *_, **__: outcome)
    result = babelray("train", "--config", config_file, "--name", "x", "--runs", tmp_path)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "babelray train --name x --resume" in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RunFailedError("the loss is nan"), 1, "babelray: error: the loss is nan"),
        (DataError("no shard"), 2, "babelray: error: no shard"),
        (PermissionError(13, "Permission denied", "/data"), 2, "/data: Permission denied"),
        (KeyboardInterrupt(), 130, "babelray: interrupted"),
    ],
)
def test_errors_become_a_message_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cluster.train, "start", fail)
    result = babelray("train", "--config", config_file, "--runs", tmp_path)
    assert result.exit_code == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_keeps_its_traceback(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cluster.train, "start", fail)
    result = babelray("train", "--config", config_file, "--runs", tmp_path)
    assert isinstance(result.exception, ZeroDivisionError)


def test_data_prepare_prints_the_folder(
    config_file: Path, prepared: tuple[DataConfig, Manifest]
) -> None:
    folder = prepared[1].folder
    result = babelray("data", "prepare", "--config", config_file)
    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    result = babelray("data", "prepare", "--config", config_file, "--json")
    assert json.loads(result.stdout) == {"folder": str(folder)}


def test_data_prepare_interrupted(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_shards.shards, "prepare", interrupt)
    assert babelray("data", "prepare", "--config", config_file).exit_code == 130


def test_data_verify(prepared: tuple[DataConfig, Manifest], tmp_path: Path) -> None:
    folder = prepared[1].folder
    assert babelray("data", "verify", folder).exit_code == 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = sorted((copy / "shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(babelray("data", "verify", copy), shard.name)
    refused(babelray("data", "verify", tmp_path / "nowhere"), "nowhere")
    refused(
        babelray("data", "verify", folder, "--shards-url", "x"), "--shards-url: give an address"
    )


def test_data_stats(prepared: tuple[DataConfig, Manifest]) -> None:
    _, manifest = prepared
    result = babelray("data", "stats", manifest.folder)
    assert result.exit_code == 0
    assert "2,800" in result.stdout
    result = babelray("data", "stats", manifest.folder, "--json")
    assert json.loads(result.stdout)["num_pairs"] == manifest.num_pairs


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["evaluate", "nowhere"], "no run 'nowhere'"),
        (["evaluate", "x", "--source", "a"], "both --source and --reference"),
        (
            ["evaluate", "x", "--source", "a", "--reference", "b", "--test-set", "valid"],
            "not both",
        ),
        (["evaluate"], "Missing argument 'RUN'"),
        (["translate", "nowhere"], "no run 'nowhere'"),
        (["translate", "x", "--input", "/no/such/file"], "/no/such/file"),
        (["report", "nowhere"], "no run 'nowhere'"),
        (["nonsense"], "No such command"),
    ],
)
def test_other_commands_refuse(arguments: list[str], part: str, tmp_path: Path) -> None:
    runs = [] if arguments == ["nonsense"] else ["--runs", tmp_path]
    refused(babelray(*arguments, *runs, input=""), part)


def test_only_the_search_can_be_set_for_a_run_that_exists(
    config_file: Path, tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    run = tmp_path / "x"
    babelray("train", "--config", config_file, "--name", "x", "--runs", tmp_path)
    cluster.train.write_config(started[0]["config"], run)
    for command in ("evaluate", "translate"):
        result = babelray(command, run, "--set", "model.d_model=64", input="")
        refused(result, "only evaluation.")
        result = babelray(command, run, "--set", "evaluation.beam=0", input="")
        refused(result, "evaluation.beam")

"""Every mistake and every damage that a user can meet, through the command as a user calls it.

Each gives one message that names the place and the mend, the right exit status and no traceback,
and leaves what was there before as it was.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "tiny.yaml"


def babelray(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check(
    done: subprocess.CompletedProcess[str], *parts: object, status: int = 2, lines: int = 12
) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    # click's own usage errors begin with "Usage:"; all others with the program's name.
    assert done.stderr.count("babelray: error:") + done.stderr.count("Error: ") == 1, said
    assert len(done.stderr.splitlines()) <= lines, said
    for part in parts:
        assert str(part) in said


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def own_files(source: Path, target: Path, root: Path, **settings: object) -> list[str]:
    values = {
        "corpus": "files",
        "source": source,
        "target": target,
        "root": root,
        "max_length": 64,
        "heldout_pairs": 20,
        "vocabulary_size": 160,
        **settings,
    }
    return [part for key, value in values.items() for part in ("--set", f"data.{key}={value}")]


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("trainer.max_step=3", ["unknown key trainer.max_step", "did you mean trainer.max_steps"]),
        ("trainer.seed=-1", ["trainer.seed", "greater than or equal to 0", "-1"]),
        ("data.corpus=wmt99", ["wmt99", "multi30k", "embedded"]),
    ],
    ids=["unknown key", "value out of range", "unknown corpus"],
)
def test_a_wrong_setting(setting: str, parts: list[str], tmp_path: Path) -> None:
    done = babelray("train", "--config", CONFIG, "--set", setting, cwd=tmp_path)
    check(done, *parts)
    assert list(tmp_path.rglob("*.tar")) == []


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    check(babelray("train", "--config", "no.yaml", cwd=tmp_path), "no.yaml", "not found")


def test_a_text_that_is_not_there(tmp_path: Path) -> None:
    arguments = own_files(tmp_path / "no.en", tmp_path / "no.de", tmp_path / "data")
    check(babelray("data", "prepare", *arguments, cwd=tmp_path), tmp_path / "no.en")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").glob("[!.]*"))


def test_texts_of_different_length(toy_text: tuple[Path, Path], tmp_path: Path) -> None:
    source, target = toy_text
    short = tmp_path / "short.de"
    short.write_text("".join(target.read_text().splitlines(keepends=True)[:-3]))
    done = babelray("data", "prepare", *own_files(source, short, tmp_path / "data"), cwd=tmp_path)
    check(done, source, short, "3,000", "2,997")
    assert list((tmp_path / "data").glob("[!.]*")) == []


def test_a_corpus_that_is_not_text(toy_text: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = toy_text
    binary = tmp_path / "picture.de"
    binary.write_bytes(bytes(range(256)) * 200)
    done = babelray("data", "prepare", *own_files(source, binary, tmp_path / "data"), cwd=tmp_path)
    check(done, binary, "text")


def test_a_vocabulary_larger_than_the_corpus_allows(
    toy_text: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = own_files(*toy_text, tmp_path / "data", vocabulary_size=30000)
    check(babelray("data", "prepare", *arguments, cwd=tmp_path), "data.vocabulary_size", "30000")


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_shard_is_named_by_verify(
    damage: str, toy_text: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = own_files(*toy_text, tmp_path / "data")
    done = babelray("data", "prepare", *arguments, cwd=tmp_path)
    folder = Path(done.stdout.strip())
    assert done.returncode == 0
    assert babelray("data", "verify", folder, cwd=tmp_path).returncode == 0
    [shard] = folder.rglob("*.tar")
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        shard.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    before = contents(folder)
    check(babelray("data", "verify", folder, cwd=tmp_path), shard.name)
    assert contents(folder) == before


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A run's folder as an earlier run left it."""
    from trainer.config import load_config

    run = tmp_path / "runs" / "first"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "COMMIT").write_text("x")
    (run / "config.json").write_text(load_config(CONFIG).to_json())
    return run


def test_a_run_name_that_is_taken(taken: Path, tmp_path: Path) -> None:
    before = contents(taken)
    done = babelray("train", "--config", CONFIG, "--name", "first", cwd=tmp_path)
    check(done, "first", "exists already", "--resume", "another --name")
    assert contents(taken) == before


def test_resuming_with_another_model(taken: Path, tmp_path: Path) -> None:
    before = contents(taken)
    done = babelray("train", "--name", "first", "--resume", "--set", "model.d_ff=512", cwd=tmp_path)
    check(done, "model.d_ff", "256", "512")
    assert contents(taken) == before


def test_resuming_a_run_that_is_not_there(taken: Path, tmp_path: Path) -> None:
    done = babelray("train", "--name", "frist", "--resume", cwd=tmp_path)
    check(done, "no run 'frist'", "did you mean first?")


@pytest.mark.parametrize("kind", ["dashboard", "metrics"])
def test_a_port_in_use(kind: str, toy_text: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = own_files(*toy_text, tmp_path / "data")
    assert babelray("data", "prepare", *arguments, cwd=tmp_path).returncode == 0
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        option = (
            ["--dashboard-port", port]
            if kind == "dashboard"
            else ["--set", f"trainer.metrics_port={port}"]
        )
        done = babelray(
            "train", "--config", CONFIG, *arguments, "--name", "run", *option, cwd=tmp_path
        )
    check(done, port, "in use")
    # Nothing began: the name is still free.
    assert not (tmp_path / "runs" / "run" / "config.json").exists()


def test_evaluating_a_run_without_checkpoint(taken: Path, tmp_path: Path) -> None:
    shutil.rmtree(taken / "checkpoints")
    check(babelray("evaluate", "first", cwd=tmp_path), "checkpoint")


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    done = babelray("trian", cwd=tmp_path)
    assert done.returncode == 2
    assert "No such command" in done.stderr


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from cluster.cli import main\n"
        "sys.argv = ['babelray', 'train', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n"
        "    print([m for m in ('torch', 'ray', 'deepspeed', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "--workers" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"

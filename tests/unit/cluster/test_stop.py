"""``babelray stop`` of a run on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import cli
from cluster.naming import claim, is_claimed
from trainer.config import STOP_FILE

# Stands for the command that trains: holds the run until the second signal.
_DRIVER = """
import signal, sys, time
from pathlib import Path
from cluster.naming import claim
count = 0
def heard(number, frame):
    global count
    count += 1
signal.signal(signal.SIGTERM, heard)
with claim(Path(sys.argv[1])):
    print("ready", flush=True)
    while count < 2:
        time.sleep(0.02)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_asks_and_waits_until_it_has_ended(run_dir: Path) -> None:
    claimed, removed = threading.Event(), threading.Event()

    def train() -> None:
        with claim(run_dir):
            claimed.set()
            stop_file = run_dir / STOP_FILE
            while not stop_file.exists():
                time.sleep(0.01)
            stop_file.unlink()  # as ranks that are just starting do: they are asked again
            removed.set()
            while not stop_file.exists():
                time.sleep(0.01)

    thread = threading.Thread(target=train)
    thread.start()
    assert claimed.wait(5)
    result = CliRunner().invoke(cli, ["stop", "one", "--runs", str(run_dir.parent)])
    thread.join()
    assert result.exit_code == 0, result.output
    assert removed.is_set()
    assert not (run_dir / STOP_FILE).exists()
    assert "asked one to save a checkpoint and stop" in result.stderr
    assert "go on: babelray resume one" in result.stderr


def test_refuses_a_run_that_nobody_trains(run_dir: Path) -> None:
    result = CliRunner().invoke(cli, ["stop", "one", "--runs", str(run_dir.parent)])
    assert result.exit_code == 2
    assert "the run one is not being trained" in result.stderr
    assert not (run_dir / STOP_FILE).exists()


def test_now_ends_the_command_itself(run_dir: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        (run_dir / "ray.json").write_text(
            json.dumps({"pid": driver.pid, "host": os.uname().nodename})
        )
        result = CliRunner().invoke(cli, ["stop", "one", "--now", "--runs", str(run_dir.parent)])
        assert result.exit_code == 0, result.output
        assert driver.wait(5) == 0
        assert not is_claimed(run_dir)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()


def test_now_does_not_reach_another_machine(run_dir: Path) -> None:
    (run_dir / "ray.json").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with claim(run_dir):
        result = CliRunner().invoke(cli, ["stop", "one", "--now", "--runs", str(run_dir.parent)])
    assert result.exit_code == 2
    assert "runs on elsewhere: give the command there" in result.stderr

"""``babelray doctor`` as it is typed; the probe is left out where it does not matter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from cluster.checks import Check
from cluster.commands.doctor import doctor
from cluster.doctor import limits, machine, remote, software
from data_shards.errors import UserError
from tests.workplace import REPOSITORY

if TYPE_CHECKING:
    from cluster.launch.target import Submission, Target
    from trainer.config import RunConfig


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class NoProbe:
        def __enter__(self) -> NoProbe:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def findings(self) -> tuple[list[dict[str, object]], None]:
            return [{"ray": {"version": "2.60.0"}}], None

    monkeypatch.setattr(software, "Probe", NoProbe)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(doctor, arguments)


def test_a_newcomer_reads_what_is_well() -> None:
    result = invoke("--set", "trainer.metrics_port=0", "--set", "data.embedded_pairs=1000")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "This machine"
    assert [line for line in lines if line and line[0] != " "][1:3] == ["Data", "Storage"]
    assert re.match(r"\d+ ok.*: nothing stands in a run's way$", lines[-1])
    assert all(len(line) < 160 for line in lines)


def test_a_failure_is_told_with_its_mend_and_by_the_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def checks(*_: object, **__: object) -> Iterator[Check]:
        yield Check("memory", "failure", "none", "buy some")

    monkeypatch.setattr(machine, "checks", checks)
    result = invoke()
    assert result.exit_code == 1
    assert "  failure  memory              none\n           -> buy some\n" in result.output
    assert "1 failure: mend what failed" in result.output
    result = invoke("--json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found[0] == {
        "section": "This machine", "name": "memory", "outcome": "failure", "found": "none",
        "mend": "buy some",
    }  # fmt: skip


def test_on_the_cluster_each_line_is_one_check_and_the_job_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = invoke("--on-cluster", "--json")
    assert result.exit_code == 0
    found = [remote.parse(line) for line in result.output.splitlines()]
    assert all(found)
    assert found[-1] is not None
    assert found[-1][1].outcome == "failure"


def test_options_of_the_cluster_alone_are_refused() -> None:
    result = invoke("--overlay", "gpu")
    assert result.exit_code == 2
    assert "--overlay is for --cluster" in result.output
    for option in ("--nodes", "--gpus", "--storage", "--component", "--link-gbits"):
        assert f"{option} is for --cluster" in invoke(option, "2").output


def test_the_folders_of_a_cluster_are_named_by_its_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    result = invoke("--cluster", "--runs", "elsewhere")
    assert result.exit_code == 2
    assert "--storage names" in result.output

    def submission(target: Target, config: RunConfig, text: str, **_: object) -> Submission:
        assert target.storage == "/mnt/shared"
        raise UserError("that is all")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "submission", submission)
        assert str(invoke("--cluster", "--storage", "/mnt/shared").exception) == "that is all"
    # From one of its machines the folders are looked at as they are here.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    quick = ("--set", "trainer.metrics_port=0", "--set", "data.embedded_pairs=1000")
    result = invoke("--cluster", "--storage", str(tmp_path / "shared"), *quick)
    assert f"{tmp_path}/shared/runs" in result.output
    assert f"{tmp_path}/shared/data" in result.output


# The storage's part of the command, at work for long when its largest file is written.
_SLOW = """
import time
from cluster.commands.doctor import doctor
from cluster.doctor import data, machine, software, storage

class NoProbe:
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None
    findings = lambda self: ([], None)

def put(*arguments):
    first(*arguments)
    print("written", flush=True)
    time.sleep(0.5)
    return 1.0

first, storage._timed_put, software.Probe = storage._timed_put, put, NoProbe
machine.checks = data.checks = lambda *_, **__: ()
doctor(["--runs", "runs"], standalone_mode=False)
"""


def test_whoever_ends_it_finds_nothing_left_behind(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", _SLOW],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert command.stdout is not None
    while (line := command.stdout.readline()) and line != "written\n":
        pass
    assert list(tmp_path.glob("runs/.doctor-*"))
    command.send_signal(signal.SIGTERM)
    command.communicate(timeout=20)
    assert command.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_options_of_kubernetes_are_refused_for_a_ray_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    result = invoke("--cluster", "--overlay", "gpu")
    assert isinstance(result.exception, UserError)
    assert "--overlay" in str(result.exception)


def test_a_cluster_that_only_takes_jobs_and_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    result = invoke("--cluster")
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == "The cluster from outside", (
        "this machine does not matter then"
    )
    assert "no Ray Jobs API answers" in result.output


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (8, "8 "), (999, "999 "), (1500, "1.50 k"), (16_800_000, "16.8 M"),
     (2.5e11, "250 G"), (3e16, "30000 T")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert limits.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12e-6, "12 us"), (0.0034, "3.4 ms"), (0.12, "120 ms"), (1.25, "1.2 s"), (600, "10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert limits.duration(seconds) == text


def test_what_was_begun_may_end_when_we_are_interrupted() -> None:
    done: list[bool] = []

    def work() -> None:
        time.sleep(0.4)
        done.append(True)

    main = threading.get_ident()
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        limits.limited(5, work)
    assert done == [True]


def test_what_fails_in_time_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        limits.limited(5, lambda: 1 / 0)
    assert limits.limited(5, lambda: 3) == 3

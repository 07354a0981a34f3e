"""What ``babelray train`` tells, on a terminal, in a file and to a log collector."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cluster.train
import data_shards.shards
from cluster.cli import cli
from cluster.console import JsonConsole, TextConsole, open_console
from cluster.console_live import LiveConsole, live_line
from cluster.progress import Narrator, News, Status
from cluster.time_left import Left

TRAINING = Status(
    doing="training",
    step=4500,
    max_steps=100_000,
    done=0.045,
    loss=3.21456,
    tokens_per_second=123_456.7,
    left=Left(7200.0, is_most=True),
)


def news(event: str, line: str | None = None, status: Status = TRAINING, **fields: Any) -> News:
    return News({"event": event, **fields}, line, "info", status)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_the_console_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_console("auto", Terminal()), LiveConsole)
    assert isinstance(open_console("auto", io.StringIO()), TextConsole)
    assert isinstance(open_console("text", Terminal()), TextConsole)
    assert isinstance(open_console("json", Terminal()), JsonConsole)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console("auto", Terminal()), TextConsole)


def test_a_file_gets_few_steps_and_every_notable_line() -> None:
    stream, now_s = io.StringIO(), [0.0]
    with TextConsole(stream, clock=lambda: now_s[0]) as console:
        console.say("training")
        for step in range(100):
            now_s[0] = step * 1.0
            console.tell(news("step", f"step {step}"))
            if step == 50:
                console.tell(news("validated", "validated"))
        console.tell(news("other", None))
        console.tell(news("finished", "finished"))
    assert stream.getvalue().splitlines() == [
        "training",
        "step 0",
        "step 30",
        "validated",
        "step 60",
        "step 90",
        "step 99",
        "finished",
    ]


def test_a_file_gets_the_last_step_of_a_run_that_is_cut_off() -> None:
    stream = io.StringIO()
    with TextConsole(stream) as console:
        console.tell(news("step", "step 1"))
        console.tell(news("step", "step 2"))
    assert stream.getvalue() == "step 1\nstep 2\n"


def test_json_holds_whole_events() -> None:
    stream = io.StringIO()
    with JsonConsole(stream) as console:
        console.say("before it has a name")
        console.name("demo")
        console.tell(
            news("step", "step     45  loss   3.2", step=45, mean_loss=3.2, time=1795393967.25)
        )
        console.tell(
            News(
                {"event": "worker_failed", "message": "gone", "final": True},
                None,
                "error",
                TRAINING,
            )
        )
        console.tell(news("save_started"))
        logging.getLogger("trainer.somewhere").warning("the disk is %s", "full")
    logging.getLogger("trainer.somewhere").debug("after")
    said, step, failed, unknown, logged = map(json.loads, stream.getvalue().splitlines())
    assert said["run"] is None
    assert said["message"] == "before it has a name"
    assert step == {
        "time": "2026-11-23T00:32:47.250Z",
        "level": "info",
        "run": "demo",
        "message": "step 45 loss 3.2",
        "event": "step",
        "step": 45,
        "mean_loss": 3.2,
        "seconds_left": 7200,
    }
    assert (failed["level"], failed["message"], failed["final"]) == ("error", "gone", True)
    assert unknown["message"] == "save started"
    assert (logged["level"], logged["message"]) == ("warning", "the disk is full")
    assert logged["logger"] == "trainer.somewhere"


@pytest.mark.parametrize(
    ("width", "bar", "text"),
    [
        (
            100,
            29,
            "  4%  step 4,500/100,000  loss 3.215  123,457 tok/s  at most 2 h left",
        ),
        (79, 8, "  4%  step 4,500/100,000  loss 3.215  123,457 tok/s  at most 2 h left"),
        (75, 12, "  4%  step 4,500  loss 3.215  123,457 tok/s  at most 2 h left"),
        (39, 0, "  4%  loss 3.215  at most 2 h left"),
        (22, 0, "  4%  at most 2 h left"),
        (10, 0, "  4%  at m"),
    ],
)
def test_the_live_line_fits_its_terminal(width: int, bar: int, text: str) -> None:
    assert live_line(TRAINING, width) == (bar, text)


def test_the_live_line_is_never_too_wide() -> None:
    for status in (
        TRAINING,
        Status(),
        Status(doing="training", step=1, loss=None, tokens_per_second=1.0),
        Status(doing="waiting for machines", step=123_456_789, done=1.0),
    ):
        for width in range(10, 201):
            bar, text = live_line(status, width, doing_s=1234.5)
            assert len(text) + (bar + 2 if bar else 0) <= width


def test_what_it_waits_for_is_said_instead_of_a_speed() -> None:
    text = live_line(Status(doing="restarting", step=45, done=0.5), 60, doing_s=12.3)[1]
    assert text == " 50%  step 45  restarting 12 s"


_ON_A_TERMINAL = """
import sys, time
from cluster.console import open_console
from cluster.progress import News, Status
from cluster.time_left import Left
status = Status("training", 45, 100, 0.45, 3.2, 1000.0, Left(600.0))
with open_console("auto") as console:
    console.begin()
    console.tell(News({"event": "step"}, "not a line of its own", "info", status))
    console.tell(News({"event": "validated"}, "validated [bold]as it is[/bold]", "info", status))
    print("from elsewhere", file=sys.stderr)
    if "wait" in sys.argv:
        time.sleep(60)
"""


def on_a_terminal(columns: int, *arguments: str, interrupt: bool = False, **env: str) -> bytes:
    """All that a process writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen(
        [sys.executable, "-c", _ON_A_TERMINAL, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**_plain_environment(), "TERM": "xterm-256color", **env},
        cwd=Path(__file__).parents[3],
    )
    os.close(theirs)
    deadline = threading.Timer(30, process.kill)
    deadline.start()
    written = b""
    try:
        while True:
            try:
                written += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if interrupt and b"from elsewhere" in written:
                interrupt = False
                process.send_signal(2)
    finally:
        deadline.cancel()
        process.wait()
        os.close(ours)
    return written


def _plain_environment() -> dict[str, str]:
    unwanted = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def test_a_terminal_gets_a_live_line_below_the_notable_ones() -> None:
    written = on_a_terminal(80).decode()
    assert "validated [bold]as it is[/bold]" in written
    assert "from elsewhere" in written
    assert "not a line of its own" not in written
    assert "45%  step 45/100  loss 3.200   1,000 tok/s  10 min left" in written
    assert written.endswith("\x1b[2K")  # the live line is wiped away at the end


def test_a_narrow_terminal_without_colour() -> None:
    written = on_a_terminal(40, NO_COLOR="1").decode()
    assert " 45%  step 45  loss 3.200  10 min left" in written
    assert "\x1b[3" not in written
    assert "\x1b[9" not in written


def test_an_interrupt_leaves_the_terminal_as_it_was() -> None:
    written = on_a_terminal(80, "wait", interrupt=True)
    assert b"KeyboardInterrupt" in written  # it did end by that
    live, _, after = written.rpartition(b"10 min left")
    assert b"\x1b[2K" in after.partition(b"Traceback")[0]
    assert live.count(b"\x1b[?25l") == 0  # the cursor was never hidden


def test_a_tracker_that_is_not_known_stops_the_command_before_anything_starts(
    tmp_path: Path,
) -> None:
    arguments = ["train", "--config", "configs/tiny.yaml", "--runs", str(tmp_path / "runs")]
    arguments += ["--set", "trainer.trackers=[nowhere]"]
    result = CliRunner().invoke(cli, [*arguments, "--name", "x"])
    assert result.exit_code == 2
    assert result.stderr.startswith("babelray: error: trainer.trackers: nowhere is not known here")
    result = CliRunner().invoke(
        cli, [*arguments, "--name", "x"], env={"BABELRAY_LOG_FORMAT": "json"}
    )
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["run"]) == ("error", "x")
    assert told["message"].startswith("trainer.trackers: nowhere")
    assert not list(tmp_path.iterdir())


def test_a_run_is_told_of_and_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(config: Any, name: str, *, tell: Any, **_: Any) -> cluster.train.Outcome:
        narrator = Narrator(config)
        for event in (
            {"event": "started", "step": 0, "world_size": 1},
            {"event": "step", "step": 1, "mean_loss": 3.0, "elapsed_s": 1.0},
            {"event": "finished", "step": 1, "reason": "max_steps"},
        ):
            tell(narrator.hear({**event, "time": 1000.0}))
        return cluster.train.Outcome(tmp_path / name, 1, "max_steps", 1.5, 2.0)

    monkeypatch.setattr(cluster.train, "start", start)
    monkeypatch.setattr(data_shards.shards, "prepare", lambda *_, **__: None)
    arguments = ["train", "--config", "configs/tiny.yaml", "--runs", str(tmp_path), "--name", "x"]
    arguments += ["--set", "trainer.trackers=tensorboard", "--log-format", "json", "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line.get("event") for line in told] == ["started", "step", "finished"]
    assert {line["run"] for line in told} == {"x"}
    assert json.loads(result.stdout)["step"] == 1
    (file,) = (tmp_path / "x" / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()

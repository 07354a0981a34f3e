"""Ranks that hang, as real processes: their exit status and what their log holds."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.watchdog import EXIT_HUNG, Watchdog

ROOT = Path(__file__).parents[3]

# A rank's log as the worker sets it up; the stacks go to the same file.
PRELUDE = """
import ctypes, logging, sys, threading, time
from trainer.watchdog import Watchdog
handler = logging.FileHandler(sys.argv[1])
logging.getLogger().addHandler(handler)
started = time.monotonic()
"""


@dataclass(frozen=True)
class Ended:
    status: int
    seconds: float
    log: str


def run(body: str, log: Path) -> Ended:
    """A process that runs ``body``; one that outlives 60 s fails the test."""
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(log)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    return Ended(process.returncode, time.monotonic() - began, log.read_text())


def test_a_rank_that_waits_for_ever_is_ended_and_says_where(tmp_path: Path) -> None:
    ended = run(
        """
        def all_reduce_that_never_returns():
            threading.Event().wait()

        def another_thread():
            time.sleep(1000)

        threading.Thread(target=another_thread).start()
        with Watchdog(0.5, lambda: "step 120, waiting in all_reduce", rank=3,
                      dump_to=handler.stream):
            all_reduce_that_never_returns()
        """,
        tmp_path / "rank-003.log",
    )
    assert ended.status == EXIT_HUNG
    message = ended.log.splitlines()[0]
    assert re.match(r"rank 3 hangs: no progress for [01] s;", message)
    assert "step 120, waiting in all_reduce" in message
    assert "recovery.hang_timeout_s (now 0.5)" in message
    # Of every thread, and after the message.
    assert "in all_reduce_that_never_returns" in ended.log
    assert "in another_thread" in ended.log


def test_a_rank_whose_native_call_keeps_the_gil_is_ended_too(tmp_path: Path) -> None:
    ended = run(
        """
        def native_call():
            ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, PyDLL does not let the GIL go

        with Watchdog(1.0, lambda: "unused", rank=0, dump_to=handler.stream):
            native_call()
        """,
        tmp_path / "log",
    )
    assert ended.status == 1
    assert ended.log.startswith("Timeout (0:00:01)!")
    assert "in native_call" in ended.log


def test_a_rank_that_hangs_with_the_log_s_lock_is_ended_too(tmp_path: Path) -> None:
    ended = run(
        """
        import trainer.watchdog
        trainer.watchdog._LAST_WORDS_S = 2.0

        def write_to_a_dead_file_system():
            with handler.lock:
                time.sleep(1000)

        with Watchdog(0.5, lambda: "unused", rank=0, dump_to=handler.stream):
            write_to_a_dead_file_system()
        """,
        tmp_path / "log",
    )
    assert ended.status == 1
    assert "in write_to_a_dead_file_system" in ended.log
    assert ended.seconds > 2.4  # it had its time for last words


def test_beats_and_pauses_keep_a_rank_alive(tmp_path: Path) -> None:
    ended = run(
        """
        with Watchdog(1.0, lambda: "beats went on for 1.5 s", rank=0) as watchdog:
            while time.monotonic() < started + 1.5:
                watchdog.beat()
                time.sleep(0.05)
            with watchdog.paused():
                time.sleep(1.5)
            watchdog._what = lambda: "a pause of 1.5 s was over"
            time.sleep(1000)
        """,
        tmp_path / "log",
    )
    assert ended.status == EXIT_HUNG
    assert "a pause of 1.5 s was over" in ended.log
    assert ended.seconds > 4.0


def test_a_process_that_leaves_in_time_is_not_ended_later(tmp_path: Path) -> None:
    ended = run(
        """
        for attempt in range(3):
            try:
                with Watchdog(0.5, lambda: "unused", rank=0):
                    raise ValueError
            except ValueError:
                pass
        time.sleep(1.5)
        logging.critical("alive, threads: %d", threading.active_count())
        """,
        tmp_path / "log",
    )
    assert ended.status == 0
    assert ended.log == "alive, threads: 1\n"


def test_what_cannot_be_told_does_not_keep_a_rank_from_ending(tmp_path: Path) -> None:
    ended = run(
        """
        with Watchdog(0.3, lambda: {}["phase"], rank=0, dump_to=handler.stream):
            time.sleep(1000)
        """,
        tmp_path / "log",
    )
    assert ended.status == EXIT_HUNG
    assert "cannot be told: KeyError('phase')" in ended.log
    assert "Thread 0x" in ended.log


def test_what_follows_a_hang_can_be_replaced(tmp_path: Path) -> None:
    hung = threading.Event()
    with (
        (tmp_path / "log").open("w+") as log,
        Watchdog(8.0, lambda: "asleep", rank=0, dump_to=log, on_hang=hung.set) as watchdog,
    ):
        watchdog._last_beat -= 8.0
        assert hung.wait(timeout=20)
        log.seek(0)
        assert "test_what_follows_a_hang_can_be_replaced" in log.read()


def test_a_dump_that_has_no_file_is_an_error_at_the_start() -> None:
    with pytest.raises(io.UnsupportedOperation), Watchdog(8.0, str, rank=0, dump_to=io.StringIO()):
        raise AssertionError("the body must not run")

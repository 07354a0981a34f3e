"""``babelray train`` as a user starts it: in a folder of its own, with a very small model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE_S = 150


@dataclass
class Command:
    """A running ``babelray``, alone in its process group, as a terminal would start it."""

    process: subprocess.Popen[str]
    output: Path

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """The condition's first true value; fails if the command ends or takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            assert self.process.poll() is None, self.text()
            time.sleep(0.1)
        raise AssertionError(f"waited {PATIENCE_S} s in vain:\n{self.text()}")

    def end(self) -> int:
        """Wait for the command's own end; its exit status."""
        return self.process.wait(timeout=PATIENCE_S)

    def text(self) -> str:
        return self.output.read_text()


@dataclass
class Commands:
    """Commands that are started in a test, each with its output in a file of ``folder``."""

    folder: Path
    started: list[Command] = field(default_factory=list)

    def start(self, words: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> Command:
        output = self.folder / f"output-{len(self.started)}.txt"
        with output.open("w") as stream:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(Command(process, output))
        return self.started[-1]

    def kill_left(self) -> None:
        """End what still runs, with all that it has started."""
        for command in self.started:
            if command.process.poll() is None:
                os.killpg(command.process.pid, signal.SIGKILL)
                command.process.wait()


@dataclass
class Workplace:
    """A folder with a small configuration, and the commands started there."""

    folder: Path
    commands: Commands

    def train(self, *arguments: object) -> Command:
        return self.commands.start(
            [sys.executable, "-m", "cluster.cli", "train", *map(str, arguments)],
            cwd=self.folder,
            environment={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "runs" / run / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["event"] == kind]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those still running a moment later; a zombie waits only for its parent to look."""
    _, left = psutil.wait_procs(processes, timeout=5)
    found = []
    for process in left:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


def worker_pid(workplace: Workplace, run: str, rank: int) -> int:
    log = workplace.folder / "runs" / run / "logs" / f"rank-{rank:03d}.log"
    return int(re.findall(r"process (\d+)", log.read_text())[-1])

"""A run under observation: start it, see where it stands, do something to it, measure."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.recorder import PACE_FILE, RECORDS, Options
from tests.chaos.workspace import CHECKPOINT_EVERY, NUM_STEPS, Workspace, descendants

PATIENCE_S = 120.0

# Late enough for a checkpoint to be there, early enough for much to be left.
_EARLIEST, _LATEST = 2 * CHECKPOINT_EVERY + 5, NUM_STEPS - 5 * CHECKPOINT_EVERY


class SceneError(Exception):
    """The run did not come to where the fault was to strike, or did not go on from there."""


@dataclass
class Scene:
    """One run, its command, and what was noted while it was disturbed.

    Attributes:
        name: of the run.
        workers: ``N`` or ``MIN:MAX``.
        launcher: put before every command, to run it on another host.
        environment: over the workspace's.
        moment: when the fault struck, Unix seconds.
        committed: newest checkpoint at that moment.
        problems: expectations that were not met.
    """

    workspace: Workspace
    name: str
    rng: random.Random
    workers: str = "2"
    options: Options = field(default_factory=lambda: Options(pace_s=0.0))
    recovery: dict[str, Any] = field(default_factory=dict)
    launcher: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    moment: float | None = None
    committed: int | None = None
    problems: list[str] = field(default_factory=list)
    _command: subprocess.Popen[bytes] | None = None

    # Where things are.

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.workspace.runs / self.name

    @property
    def output(self) -> Path:
        """What all commands of the run printed."""
        return self.workspace.folder / f"{self.name}.txt"

    @property
    def command(self) -> subprocess.Popen[bytes]:
        """The driver."""
        assert self._command is not None
        return self._command

    def checkpoints_dir(self) -> Path:
        """Where the run's checkpoints are published."""
        storage = self.recovery.get("storage")
        return (Path(storage) / self.name if storage else self.run_dir) / "checkpoints"

    # What is done.

    def start(self, *, resume: bool = False, workers: str | None = None) -> None:
        """Start the driver, anew or on the run that is there."""
        config = self.workspace.folder / f"{self.name}.yaml"
        if not resume:
            self.workspace.write_config(self.name, self.recovery)
        module = [sys.executable, "-m", "tests.chaos.driver", "--config", str(config)]
        arguments = ["--runs", str(self.workspace.runs), "--name", self.name]
        arguments += ["--workers", workers or self.workers]
        arguments += ["--options", json.dumps(asdict(self.options))]
        with self.output.open("ab") as stream:
            self._command = subprocess.Popen(
                [*self.launcher, *module, *arguments, *(["--resume"] if resume else [])],
                cwd=self.workspace.folder,
                env={**self.workspace.environment(), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(
        self, what: str, condition: Callable[[], Any], *, patience_s: float = PATIENCE_S
    ) -> Any:
        """The condition's first true value.

        Raises:
            SceneError: the driver ended, or it took too long.
        """
        deadline = time.monotonic() + patience_s
        while True:
            value = condition()
            if value:
                return value
            if self.command.poll() is not None:
                raise SceneError(f"the command ended ({self.command.returncode}) before {what}")
            if time.monotonic() > deadline:
                raise SceneError(f"waited {patience_s:.0f} s in vain for {what}")
            time.sleep(0.02)

    def reach(self, step: int) -> None:
        """Wait until a step was trained."""
        self.wait_for(f"step {step}", lambda: self.last_step() >= step)

    def some_moment(self, *, latest: int = _LATEST) -> int:
        """Wait for a random moment of the run, within a step too; returns the step."""
        step = self.rng.randint(_EARLIEST, latest)
        within = self.rng.random() * self.options.pace_s
        self.reach(step)
        time.sleep(within)
        return step

    def strike(self) -> None:
        """Note that the fault is caused now."""
        self.committed = max(self.checkpoints(), default=None)
        self.moment = time.time()

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal, as the fault."""
        self.strike()
        os.kill(pid, number)

    def set_pace(self, seconds: float) -> None:
        """Make steps take so long from now on, while something else is waited for."""
        (self.run_dir / PACE_FILE).write_text(str(seconds))

    def ended(self, *, expected: int = 0, patience_s: float = PATIENCE_S) -> None:
        """Wait for the driver's own end.

        Raises:
            SceneError: it went on, or ended with another status.
        """
        try:
            status = self.command.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise SceneError(
                f"the command still ran after {patience_s:.0f} s, at step {self.last_step()}"
            ) from None
        if status != expected:
            raise SceneError(f"the command ended with status {status}, not {expected}")

    def expect(self, condition: object, what: str) -> None:
        """Note ``what`` as a problem unless the condition holds."""
        if not condition:
            self.problems.append(what)

    # What is seen.

    def last_step(self) -> int:
        """Steps done when rank 0 last ended one; 0 before the first."""
        files = sorted((self.run_dir / RECORDS).glob("*-rank-0.jsonl"))
        for file in reversed(files):
            with file.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 8192))
                tail = stream.read()
            for line in reversed(tail.split(b"\n")):
                if line.startswith(b'{"kind": "update"') and line.endswith(b"}"):
                    return int(json.loads(line)["step"]) + 1
        return 0

    def rank_pid(self, rank: int) -> int:
        """The process of a rank, of the newest attempt."""
        log = self.run_dir / "logs" / f"rank-{rank:03d}.log"
        return int(re.findall(r"process (\d+)", log.read_text())[-1])

    def actor_pid(self, title: str) -> int:
        """A process of Ray whose title begins so; a random one of several."""
        found = [process.pid for process in descendants() if _title(process).startswith(title)]
        if not found:
            raise SceneError(f"there is no process {title}")
        return self.rng.choice(found)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The run's events of these kinds, as they were logged; nothing is left out."""
        file = self.run_dir / "events.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["event"] in kinds]

    def checkpoints(self) -> list[int]:
        """Steps of the committed checkpoints."""
        found = self.checkpoints_dir().glob("step-*/COMMIT")
        return sorted(int(file.parent.name.removeprefix("step-")) for file in found)

    def said(self) -> str:
        """What the commands printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def logs(self) -> str:
        """What the ranks logged so far."""
        files = sorted((self.run_dir / "logs").glob("rank-*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""

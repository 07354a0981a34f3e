"""The faults of one machine: what is done to a run, and what is expected of it.

Each is a function of a ``Stage`` that plays the run to its end. Registered by ``@fault`` under the
name that ``make chaos FAULTS=...`` takes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import hosts
from tests.chaos.history import read_notes
from tests.chaos.measure import Losses, Play
from tests.chaos.recorder import RECORDS, Options
from tests.chaos.scene import Scene
from tests.chaos.workspace import (
    CHECKPOINT_EVERY,
    PACE_S,
    Workspace,
    is_alive,
    small_disk,
)


@dataclass
class Stage:
    """What a fault is given: a place, chance, and a stack for what it must take down again."""

    workspace: Workspace
    name: str
    rng: random.Random
    stack: ExitStack
    scenes: list[Scene] = field(default_factory=list)

    def scene(self, *, nan_steps: Sequence[int] = (), **arguments: Any) -> Scene:
        """The run of this stage, not started yet."""
        options = Options(pace_s=PACE_S, nan_steps=tuple(nan_steps))
        scene = Scene(self.workspace, self.name, self.rng, options=options, **arguments)
        self.scenes.append(scene)
        return scene


@dataclass(frozen=True)
class Fault:
    """One line of the table.

    Attributes:
        lacking: tells what this machine lacks for it, or None.
    """

    name: str
    title: str
    play: Callable[[Stage], Play]
    lacking: Callable[[], str | None]


FAULTS: dict[str, Fault] = {}


def fault(
    title: str, *, lacking: Callable[[], str | None] = lambda: None
) -> Callable[[Callable[[Stage], Play]], Callable[[Stage], Play]]:
    """Register a function as a fault, under its own name with hyphens."""

    def register(play: Callable[[Stage], Play]) -> Callable[[Stage], Play]:
        name = play.__name__.replace("_", "-")
        FAULTS[name] = Fault(name, title, play, lacking)
        return play

    return register


def _struck(scene: Scene) -> tuple[float, ...]:
    assert scene.moment is not None
    return (scene.moment,)


@fault("kill -9 of a rank")
def rank_killed(stage: Stage) -> Play:
    """A rank's process dies, as by the kernel's out-of-memory killer."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    scene.kill(scene.rank_pid(stage.rng.randrange(2)))
    scene.ended()
    return Play(scene, _struck(scene))


@fault("kill -9 of a Ray worker")
def worker_killed(stage: Stage) -> Play:
    """Ray Train's own worker dies, which supervises a rank; the rank must not outlive it."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    scene.kill(scene.actor_pid("ray::RayTrainWorker"))
    scene.ended()
    return Play(scene, _struck(scene))


@fault("kill -9 of the Ray Train controller")
def controller_killed(stage: Stage) -> Play:
    """The actor that starts and restarts the workers dies, and all workers with it."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    scene.kill(scene.actor_pid("ray::TrainController"))
    scene.ended()
    return Play(scene, _struck(scene))


@fault("kill -9 of the driver, then --resume")
def driver_killed(stage: Stage) -> Play:
    """The command dies and takes its Ray with it; it is called again at once."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    ranks = [psutil.Process(scene.rank_pid(rank)) for rank in range(2)]
    scene.kill(scene.command.pid)
    scene.command.wait()
    scene.start(resume=True)
    left = [rank.pid for rank in psutil.wait_procs(ranks, timeout=5)[1]]
    scene.expect(not left, f"the ranks {left} outlived the driver by 5 s")
    scene.ended()
    return Play(scene, _struck(scene))


@fault("SIGTERM to the driver, then --resume")
def driver_stopped(stage: Stage) -> Play:
    """Asked to end: it saves first, so that nothing is redone."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    scene.kill(scene.command.pid, signal.SIGTERM)
    scene.ended(expected=128 + signal.SIGTERM)
    scene.start(resume=True)
    scene.ended()
    return Play(scene, _struck(scene), redone=0)


@fault("a rank hangs (SIGSTOP)")
def rank_hung(stage: Stage) -> Play:
    """A rank stands still without dying: seen by the others' watchdogs."""
    scene = stage.scene(recovery={"hang_timeout_s": 8.0})
    scene.start()
    scene.some_moment()
    stopped = psutil.Process(scene.rank_pid(stage.rng.randrange(2)))
    scene.kill(stopped.pid, signal.SIGSTOP)
    scene.ended()
    scene.expect(not is_alive(stopped), "the rank that hung is still there")
    scene.expect("all_reduce" in scene.logs(), "no stack of a waiting rank is in the logs")
    return Play(scene, _struck(scene))


@fault("the disk of the checkpoints is full, later freed", lacking=hosts.missing)
def disk_full(stage: Stage) -> Play:
    """Saves fail for a while; training goes on, and the next checkpoint is whole."""
    disk = small_disk(stage.workspace.folder / "disk", megabytes=16)
    storage = stage.stack.enter_context(disk)
    scene = stage.scene(recovery={"storage": str(storage), "save_attempts": 10})
    scene.start()
    scene.some_moment()
    scene.strike()
    ballast = storage / "ballast"
    _fill(ballast)
    scene.wait_for("a failed save", lambda: scene.events("save_failed"))
    last = scene.last_step()
    scene.reach(last + CHECKPOINT_EVERY // 2)
    ballast.unlink()
    freed = scene.last_step()
    scene.wait_for("a checkpoint again", lambda: max(scene.checkpoints(), default=0) > freed)
    scene.ended()
    [first, *_] = scene.events("save_failed")
    scene.expect("space" in first["error"], f"the failure does not say why: {first['error']}")
    return Play(scene, _struck(scene), restarts=False, redone=0)


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream, suppress(OSError):  # it is full
        while True:
            stream.write(b"\0" * 4096)


@fault("newest checkpoint cut short, driver killed, then --resume")
def checkpoint_truncated(stage: Stage) -> Play:
    """What a disk that lied about a write leaves: passed over by name, the one before is taken."""
    scene = stage.scene()
    scene.start()
    scene.some_moment()
    scene.kill(scene.command.pid)
    scene.command.wait()
    *_, before, newest = scene.checkpoints()
    folder = scene.checkpoints_dir() / f"step-{newest:08d}"
    damaged = stage.rng.choice(sorted(folder.glob("*.safetensors")))
    os.truncate(damaged, damaged.stat().st_size // 2)
    scene.committed = before
    scene.start(resume=True)
    scene.ended()
    resumed = scene.events("resumed")[-1]
    passed_over = str(resumed.get("passed_over"))
    scene.expect(resumed["step"] == before, f"resumed from {resumed['step']}, not {before}")
    scene.expect(damaged.name in passed_over, f"{damaged.name} is not named: {passed_over}")
    return Play(scene, _struck(scene), redone=2 * CHECKPOINT_EVERY)


@fault("NaN in one rank's loss")
def loss_nan(stage: Stage) -> Play:
    """One step's loss is not a number on one rank: no rank makes the update."""
    step = stage.rng.randint(60, 300)
    scene = stage.scene(nan_steps=[step])
    scene.start()
    scene.ended()
    skipped = [event["step"] for event in scene.events("skipped")]
    scene.expect(skipped == [step + 1], f"skipped steps {skipped}, not {step + 1}")
    return Play(scene, _untrained(scene), restarts=False, redone=0, losses=Losses.OWN)


@fault("NaN for three steps, then back to a checkpoint")
def loss_nan_streak(stage: Stage) -> Play:
    """It goes on: after ``recovery.max_skipped`` steps the weights are taken back."""
    step = stage.rng.randint(60, 300)
    scene = stage.scene(nan_steps=range(step, step + 3), recovery={"max_skipped": 3})
    scene.start()
    scene.ended()
    skipped = [event["step"] for event in scene.events("skipped")]
    rewound = [(event["to_step"], event["step"]) for event in scene.events("rewound")]
    scene.expect(skipped == [step + 1, step + 2, step + 3], f"skipped steps {skipped}")
    scene.expect(
        len(rewound) == 1 and step - 2 * CHECKPOINT_EVERY < rewound[0][0] <= step < rewound[0][1],
        f"went back (to, at) {rewound}",
    )
    return Play(scene, _untrained(scene), restarts=False, redone=0, losses=Losses.OWN)


def _untrained(scene: Scene) -> tuple[float, ...]:
    """When the last step ended that changed no weights."""
    updates = read_notes(scene.run_dir / RECORDS).updates
    return (max((u.time for u in updates if u.before == u.after), default=time.time()),)


@fault("stopped and resumed with 1, 3 and 2 workers")
def stopped_and_resized(stage: Stage) -> Play:
    """2, then 1, then 3, then 2 workers, each time by SIGTERM and ``--resume --workers``."""
    scene = stage.scene()
    scene.start()
    moments: list[float] = []
    for place, workers in enumerate(("1", "3", "2"), start=1):
        scene.reach(80 * place + stage.rng.randrange(60))
        scene.kill(scene.command.pid, signal.SIGTERM)
        moments += _struck(scene)
        scene.ended(expected=128 + signal.SIGTERM)
        scene.start(resume=True, workers=workers)
    scene.ended()
    sizes = [attempt.world_size for attempt in read_notes(scene.run_dir / RECORDS).attempts]
    scene.expect(sizes == [2, 1, 3, 2], f"ran with {sizes} workers")
    return Play(scene, tuple(moments), redone=0, losses=Losses.CLOSE)

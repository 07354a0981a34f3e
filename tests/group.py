"""A stand-in for a rank's training: counts steps, saves, and answers requests as the loop does.

Light enough that a group of workers starts in a second or two, so that tests of what starts, stops
and moves groups are about that alone.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from trainer.control import HELD_FILE, HOLD_FILE, Handover

STEP_S = 0.05
SAVE_EVERY = 20


def count_steps(config: dict[str, Any]) -> None:
    """Count from the last saved step until ``config["run_dir"]`` holds a file ``done``."""
    import ray
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    run_dir = Path(config["run_dir"])
    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0
    step = saved_step(run_dir)
    about = {
        "world_size": context.get_world_size(),
        "rank": context.get_world_rank(),
        "pid": os.getpid(),
        "node": ray.get_runtime_context().get_node_id(),
    }
    with (run_dir / f"rank-{context.get_world_rank()}.jsonl").open("a") as log:
        while not (run_dir / "done").exists():
            if get_train_context().preemption_context.preemption_info is not None:
                (run_dir / HOLD_FILE).touch()
            if (run_dir / HOLD_FILE).exists() and is_first:
                _save(run_dir, step)
                _write(run_dir / HELD_FILE, {"step": step})
            if (run_dir / HELD_FILE).exists():
                raise Handover(f"saved at step {step}")
            step += 1
            if is_first and step % SAVE_EVERY == 0:
                _save(run_dir, step)
            log.write(json.dumps({"step": step, "time": time.time(), **about}) + "\n")
            log.flush()
            time.sleep(STEP_S)


def saved_step(run_dir: Path) -> int:
    """The step that a group started now goes on from."""
    try:
        return int(json.loads((run_dir / "saved.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def _save(run_dir: Path, step: int) -> None:
    _write(run_dir / "saved.json", {"step": step})
    with (run_dir / "events.jsonl").open("a") as events:
        events.write(json.dumps({"event": "checkpoint", "step": step}) + "\n")


def _write(file: Path, value: object) -> None:
    draft = file.with_name(f".{file.name}-{os.getpid()}")
    draft.write_text(json.dumps(value))
    draft.replace(file)

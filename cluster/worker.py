"""What runs in each of Ray Train's workers, and what the controller does when one fails."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from cluster.failures import hopeless, summarize
from cluster.naming import logs_dir
from trainer.config import RunConfig

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Task:
    """All that a worker is given. ``train`` replaces the trainer's loop in tests."""

    config: RunConfig
    run_dir: Path
    threads: int
    commanded_at: float
    train: Callable[..., object] | None = None


def failures_path(run_dir: Path) -> Path:
    """One JSON object for each failure of the worker group."""
    return logs_dir(run_dir) / "failures.jsonl"


def work(task: Task) -> None:
    """Train as one rank of the group that Ray Train has set up around this process."""
    import ray.train
    import torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    handler = _log_to(logs_dir(task.run_dir) / f"rank-{rank:03d}.log")
    try:
        if not torch.cuda.is_available():
            # Else DeepSpeed probes every accelerator it knows and warns about each.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(task.threads)
        logger.info(
            "rank %d of %d, process %d, %d threads, %.1f s after the command",
            rank,
            world_size,
            os.getpid(),
            task.threads,
            time.time() - task.commanded_at,
        )
        train = task.train or _trainer_loop()
        train(
            task.config,
            task.run_dir,
            rank=rank,
            world_size=world_size,
            local_rank=_device_index(context.get_local_rank()),
            # A fresh run has no checkpoint to resume from; a group that was restarted has.
            resume=True,
        )
    except BaseException:
        logger.exception("rank %d failed", rank)
        raise
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _trainer_loop() -> Callable[..., object]:
    # Imports DeepSpeed, which takes seconds: only once the log is open.
    from trainer.loop import train

    return train


def _device_index(local_rank: int) -> int:
    """The worker's GPU among those that Ray lets it see: all of its node's group, or its own."""
    import torch

    return local_rank if local_rank < torch.cuda.device_count() else 0


class FailureCallback(UserCallback):  # type: ignore[misc]
    """Notes each failure of the group, and ends the run where a restart cannot help.

    Ray Train restarts the group after any exception. An exception raised here makes its controller
    give up instead, with that exception as the cause.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in the controller's process with the exceptions of one poll, by rank."""
        final = hopeless(worker_exceptions.values())
        record = {
            "event": "worker_failed",
            "ranks": sorted(worker_exceptions),
            "message": summarize(worker_exceptions),
            "final": final is not None,
            "time": round(time.time(), 3),
        }
        with failures_path(self._run_dir).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        if final is not None:
            raise final


def _log_to(file: Path) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    return handler

"""BLEU while a run trains: a Ray task for each checkpoint that is due, beside the training.

The driver hears of checkpoints from the run's log. It starts one task at a time, for the newest
checkpoint that is due: where scoring takes longer than the time between them, those between are
passed over, and training never waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_shards.errors import RunFailedError, UserError
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.control import EARLY_STOP_FILE
from trainer.events import EventLog
from trainer.run import events_path, read_events
from trainer.storage import StorageError
from trainer.validation_bleu import BleuHistory, score_checkpoint, write_latest

# More would not translate a validation set much sooner, and the machine has other work.
_MAX_THREADS = 8


class Scorer:
    """Scores a run's checkpoints, keeps the best one, and asks the run to stop when none improves.

    Args:
        config: ``trainer.bleu_every`` says which are due, ``best_by`` and ``patience`` what follows
            from the scores.
        run_dir: the run's folder.
        say: takes a line for the person who watches.
    """

    def __init__(self, config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> None:
        self._trainer, self._run_dir, self._say = config.trainer, run_dir, say
        self._checkpoints = Checkpoints.of(run_dir, config.recovery)
        self._history = BleuHistory.of(read_events(run_dir))
        self._newest = 0  # checkpoint heard of
        self._running: tuple[int, Any] | None = None  # its step, and the task

    def hear(self, event: dict[str, Any]) -> None:
        """Take notice of what the run logged."""
        if event.get("event") == "checkpoint":
            self._newest = max(self._newest, event["step"])

    def poll(self) -> None:
        """Take in a score that is there, start what is due; never waits."""
        self._collect(timeout_s=0)
        every = self._trainer.bleu_every
        if every is not None and self._newest // every > self._history.last_step // every:
            self._start()
        patience = self._trainer.patience
        if self._by_bleu and patience is not None and self._history.stale >= patience:
            (self._run_dir / EARLY_STOP_FILE).touch()

    def finish(self, is_interrupted: Callable[[], bool]) -> None:
        """After the training: score the last checkpoint, too, unless that is interrupted."""
        (self._run_dir / EARLY_STOP_FILE).unlink(missing_ok=True)
        while not is_interrupted():
            self._collect(timeout_s=0.2)
            if self._running is None:
                if self._newest <= self._history.last_step:
                    return
                self._start()

    @property
    def _by_bleu(self) -> bool:
        return self._trainer.best_by == "bleu"

    def _start(self) -> None:
        if self._running is not None:
            return
        import ray

        spare = int(ray.available_resources().get("CPU", 0))
        threads = max(1, min(_MAX_THREADS, spare))
        # Where the ranks have every core, it runs beside them at the lowest priority. The process
        # is not used again: another task's, or a rank's, would inherit that priority.
        task = ray.remote(num_cpus=threads if spare else 0, max_calls=1, max_retries=2)(_score)
        self._pin(self._newest)  # or retention might drop it before it is read
        self._running = self._newest, task.remote(self._run_dir, self._newest, threads)

    def _collect(self, *, timeout_s: float) -> None:
        if self._running is None:
            return
        import ray

        step, reference = self._running
        if not ray.wait([reference], timeout=timeout_s)[0]:
            return
        self._running = None
        # Whatever became of it, an older one is not wanted any more.
        self._history.last_step = max(self._history.last_step, step)
        try:
            values = ray.get(reference)
            self._take(step, values)
        except (ray.exceptions.RayError, RunFailedError, UserError) as error:
            reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
            self._say(f"step {step:>6}  BLEU could not be computed: {reason}")
        self._pin(None)

    def _pin(self, step: int | None) -> None:
        with suppress(StorageError):  # not scored, then, should retention come first
            self._checkpoints.pin(step)

    def _take(self, step: int, values: dict[str, Any]) -> None:
        improved = self._history.add(step, values["bleu"])
        if improved and self._by_bleu:
            self._checkpoints.set_best(step, bleu=values["bleu"])
        write_latest(self._run_dir, values)
        events = EventLog(events_path(self._run_dir))
        try:
            events.write("evaluated", **values, best=improved)
        finally:
            events.close()


def _score(run_dir: Path, step: int, threads: int) -> dict[str, Any]:
    """The task."""
    os.nice(19)
    return score_checkpoint(run_dir, step, threads=threads)

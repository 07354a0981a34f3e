"""BLEU while a run trains: a Ray task for each checkpoint that is due, beside the training.

The driver hears of checkpoints from the run's log. It starts one task at a time, for the newest
checkpoint that is due: where scoring takes longer than the time between them, those between are
passed over, and training never waits. Whatever goes wrong here is told, and training goes on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.session import num_cores
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.control import EARLY_STOP_FILE
from trainer.events import EventLog
from trainer.run import events_path, read_events
from trainer.storage import StorageError
from trainer.validation_bleu import BleuHistory, score_checkpoint, search_digest, write_latest

log = logging.getLogger(__name__)

# More would not translate a validation set much sooner, and the machine has other work.
_MAX_THREADS = 8
# Between two tries to note the best checkpoint where the storage fails.
_RETRY_S = 10.0


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
        self._search = search_digest(config.evaluation)
        self._checkpoints = Checkpoints.of(run_dir, config.recovery)
        self._history = BleuHistory.of(read_events(run_dir), search=self._search)
        if self._by_bleu:
            self._history.recall(self._checkpoints.best_note(), search=self._search)
        self._newest = 0  # checkpoint heard of
        self._running: tuple[int, Any] | None = None  # its step, and the task
        self._is_best_noted = True
        self._next_try_s = 0.0  # to note it

    def hear(self, event: dict[str, Any]) -> None:
        """Take notice of what the run logged."""
        if event.get("event") == "checkpoint":
            self._newest = max(self._newest, event["step"])

    def poll(self) -> None:
        """Take in a score that is there, start what is due; never waits, never raises."""
        try:
            self._collect(timeout_s=0)
            every = self._trainer.bleu_every
            if every is not None and self._newest // every > self._history.last_step // every:
                self._start()
            patience = self._trainer.patience
            if self._by_bleu and patience is not None and self._history.stale >= patience:
                (self._run_dir / EARLY_STOP_FILE).touch()
        except Exception as error:  # training matters more
            self._failed(self._newest, error)

    def finish(self, is_interrupted: Callable[[], bool]) -> None:
        """After the training: score the last checkpoint, too, unless that is interrupted."""
        try:
            (self._run_dir / EARLY_STOP_FILE).unlink(missing_ok=True)
            if self._running is not None or self._newest > self._history.last_step:
                self._say("computing BLEU of the last checkpoint; Ctrl-C leaves it out")
            while not is_interrupted():
                self._collect(timeout_s=0.2)
                if self._running is None:
                    if self._newest <= self._history.last_step:
                        return
                    self._start()
        except Exception as error:  # the training is done, and well
            self._failed(self._newest, error)

    @property
    def _by_bleu(self) -> bool:
        return self._trainer.best_by == "bleu"

    def _start(self) -> None:
        # The pin must stay on the best one until that is noted.
        if self._running is not None or not self._is_best_noted:
            return
        import ray

        # No resources are asked for, so that there is room for it at once and none is taken from
        # the ranks: it runs at the lowest priority. The process is not used again: another task's,
        # or a rank's, would inherit that priority.
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=2)(_score)
        self._pin(self._newest)  # or retention might drop it before it is read
        self._running = self._newest, task.remote(self._run_dir, self._newest)

    def _collect(self, *, timeout_s: float) -> None:
        if not self._is_best_noted:
            self._note_best()
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
        except ray.exceptions.RayError as error:
            self._failed(step, getattr(error, "cause", None) or error)
            self._pin(None)
            return
        self._take(step, values)

    def _take(self, step: int, values: dict[str, Any]) -> None:
        improved = self._history.add(step, values["bleu"])
        events = EventLog(events_path(self._run_dir))
        try:
            events.write("evaluated", **values, search=self._search, best=improved)
        finally:
            events.close()
        self._is_best_noted, self._next_try_s = not (improved and self._by_bleu), 0.0
        if self._is_best_noted:
            self._pin(None)
        else:
            self._note_best()
        write_latest(self._run_dir, values)

    def _note_best(self) -> None:
        """Write down which checkpoint is the best, then let go of it; tried again if it fails."""
        history = self._history
        if history.best_step is None or time.monotonic() < self._next_try_s:
            return
        try:
            self._checkpoints.set_best(
                history.best_step, bleu=history.best_bleu, search=self._search
            )
        except StorageError as error:
            log.warning("the best checkpoint cannot be noted yet: %s", error)
            self._next_try_s = time.monotonic() + _RETRY_S
            return
        self._is_best_noted = True
        self._pin(None)

    def _pin(self, step: int | None) -> None:
        try:
            self._checkpoints.pin(step)
        except StorageError as error:  # not scored, then, should retention come first
            log.warning("%s", error)

    def _failed(self, step: int, error: BaseException) -> None:
        log.warning("scoring step %d", step, exc_info=error)
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        self._say(f"step {step:>6}  BLEU could not be computed: {reason}")
        # Not again and again for the same one.
        self._history.last_step = max(self._history.last_step, step)


def _score(run_dir: Path, step: int) -> dict[str, Any]:
    """The task; on the cores that are idle, if there are any."""
    os.nice(19)
    idle = num_cores() - int(os.getloadavg()[0])
    return score_checkpoint(run_dir, step, threads=max(1, min(_MAX_THREADS, idle)))

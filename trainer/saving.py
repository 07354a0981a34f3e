"""When a run saves: on all ranks together, in the background, again after a failure.

Every rank has a ``Saver`` that works in the background. A save begins on all ranks at the same
step, so whether it may begin is decided from what all ranks share: each rank adds its ``flags`` to
a sum that the step makes anyway, and hears the sum.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from data_shards.errors import RunFailedError
from trainer.config import RecoveryConfig
from trainer.saver import Saved, Saver

log = logging.getLogger(__name__)

NUM_FLAGS = 5

_MAX_BACKOFF_S = 600.0
# How often ``save_now`` looks; what the run waits beyond the save itself.
_POLL_S = 0.01


class Saving:
    """Decides when a checkpoint is begun, and what a failure means.

    Args:
        saver: this rank's.
        config: how often a failing save is tried again.
        rank: this one; the first's clock decides when.
        hang_s: a save that takes longer is told of.
        beat: called where saving makes progress.
        sum_over_ranks: a collective sum of a few numbers.
        saved: called on rank 0 after a commit, with the seconds that training stood still for it.
        failed: called on rank 0 after a failure: step, what went wrong, seconds to the next try
            (None where the save has not ended).
    """

    def __init__(
        self,
        saver: Saver,
        config: RecoveryConfig,
        *,
        rank: int,
        hang_s: float,
        beat: Callable[[], None],
        sum_over_ranks: Callable[[list[float]], list[float]],
        saved: Callable[[Saved, float], None],
        failed: Callable[[int, str, float | None], None],
    ) -> None:
        self._saver, self._config, self._rank = saver, config, rank
        self._is_first, self._hang_s, self._beat = rank == 0, hang_s, beat
        self._sum = sum_over_ranks
        self._on_saved, self._on_failed = saved, failed
        # Alike on all ranks:
        self.wanted = False
        self._step = -1  # that the last save was begun at
        self._committed_step = -1
        self._failures = 0  # in a row
        self._is_dead = False  # the save in flight, since a rank failed
        self._may_begin = False
        # Of this rank:
        self._stall_s = self._waited_s = 0.0
        self._error: str | None = None
        self._not_before = 0.0
        self._late_after = math.inf  # when the save in flight will be told of

    def flags(self) -> list[float]:
        """This rank's part of the sum: busy, failed, committed, due, and which rank failed."""
        busy = self._saver.busy  # first: what ends after this look is told at the next one
        done = self._saver.finished()
        failed = committed = False
        if done is not None and not self._is_dead:
            failed, committed = done.error is not None, done.error is None and self._is_first
            if failed:
                self._error = done.error
                log.error("the checkpoint of step %d was not written: %s", done.step, done.error)
            elif committed:
                self._on_saved(done, self._stall_s)
        if done is not None:
            self._beat()
        now = time.monotonic()
        if self._is_first and busy and now >= self._late_after:
            self._late_after = math.inf
            why = f"it has not ended in {self._hang_s:.0f} s; does the storage answer?"
            self._on_failed(self._step, why, None)
        due = self._is_first and now >= self._not_before
        culprit = self._rank if failed else 0
        return [float(flag) for flag in (busy, failed, committed, due, culprit)]

    def hear(
        self, busy: float, failed: float, committed: float, due: float, culprit: float
    ) -> None:
        """The sum of all ranks' flags.

        Raises:
            RunFailedError: too many saves in a row have failed.
        """
        if committed:
            self._committed_step, self._failures = self._step, 0
        if failed:
            self._fail(f"rank {culprit:.0f}" if failed == 1 else "several ranks")
        self._may_begin = not busy and not failed and due > 0

    def _fail(self, culprit: str) -> None:
        self._saver.abandon()
        self._is_dead = True
        self._failures += 1
        self.wanted = True
        wait_s = min(_MAX_BACKOFF_S, self._config.save_backoff_s * 2 ** (self._failures - 1))
        self._not_before = time.monotonic() + wait_s
        why = self._error or f"{culprit} could not write its part (logs/ has why)"
        self._error = None
        if self._is_first:
            self._on_failed(self._step, why, wait_s)
        if self._failures >= self._config.save_attempts:
            raise RunFailedError(
                f"{self._failures} checkpoints in a row could not be written, so the run stops "
                f"rather than train on unsaved: {why}"
            )

    def begin_if_wanted(self, state: Callable[[], dict[str, Any]], step: int) -> bool:
        """Begin the save that is wanted, unless one is in flight or a retry is not due yet.

        Args:
            state: makes what ``state.json`` will hold; ``best_step`` in it may be None.
            step: the position.
        """
        if not (self.wanted and self._may_begin):
            return False
        self.wanted = self._is_dead = self._may_begin = False
        if step == self._committed_step:
            return False
        self._step = step
        self._late_after = time.monotonic() + self._hang_s
        self._beat()
        described = state()
        self._stall_s = self._waited_s + self._saver.begin(
            described, step=step, best=described["best_step"]
        )
        self._waited_s = 0.0
        return True

    def make_way(self) -> None:
        """Wait for the save in flight, if there is one, so that the next can begin at this step."""
        began = time.monotonic()
        self.settle()
        self._waited_s += time.monotonic() - began

    def save_now(self, state: Callable[[], dict[str, Any]], step: int) -> None:
        """Wait until this step's checkpoint is committed (a collective).

        Raises:
            RunFailedError: too many saves in a row have failed.
        """
        while self.settle() != step:
            self.wanted = True
            if not self.begin_if_wanted(state, step):
                self._beat()
                time.sleep(_POLL_S)  # until a retry is due

    def settle(self) -> int:
        """Wait until no save is in flight (a collective).

        Returns:
            The step of the newest checkpoint that this attempt has committed; -1 for none.
        """
        while True:
            busy, *others = self._sum(self.flags())
            self.hear(busy, *others)
            if not busy:
                return self._committed_step
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Abandon a save in flight."""
        self._saver.close()

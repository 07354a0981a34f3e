"""When a run saves, decided alike on all ranks, with savers that end as the test says."""

from __future__ import annotations

from typing import Any

import pytest

from data_shards.errors import RunFailedError
from trainer import saving
from trainer.config import RecoveryConfig
from trainer.saver import Saved
from trainer.saving import Saving


class FakeSaver:
    """Ends the save under way when the test says so."""

    def __init__(self) -> None:
        self.busy = False
        self.begun: list[int] = []
        self.abandoned = 0
        self._saved: Saved | None = None

    def begin(self, state: dict[str, Any], *, step: int, best: int | None) -> float:
        assert not self.busy
        assert state["step"] == step
        self.busy, self._saved = True, None
        self.begun.append(step)
        return 0.001

    def end(self, error: str | None = None) -> None:
        self.busy = False
        self._saved = Saved(step=self.begun[-1], bytes=10, seconds=1.0, error=error)

    def finished(self) -> Saved | None:
        saved, self._saved = self._saved, None
        return None if self.busy else saved

    def abandon(self) -> None:
        self.abandoned += 1
        if self.busy:
            self.end("abandoned")

    def close(self) -> None:
        self.abandon()


class Group:
    """Two ranks that share their flags at every step, as the loop does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **recovery: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saving.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(saving.time, "sleep", lambda seconds: self.pass_time())
        self.savers = [FakeSaver(), FakeSaver()]
        self.saved: list[tuple[int, float]] = []
        self.failed: list[tuple[int, str, float]] = []
        config = RecoveryConfig(save_backoff_s=10, **recovery)
        self.ranks = [
            Saving(
                saver,  # type: ignore[arg-type]
                config,
                rank=rank,
                hang_s=100.0,
                beat=lambda: None,
                sum_over_ranks=self.sum,
                saved=lambda saved, stall_s: self.saved.append((saved.step, stall_s)),
                failed=lambda *what: self.failed.append(what),
            )
            for rank, saver in enumerate(self.savers)
        ]
        self.step = 0

    def pass_time(self) -> None:
        self.now += 1.0

    def sum(self, numbers: list[float]) -> list[float]:
        raise AssertionError("only for a rank alone")

    def advance(self, *, wanted: bool = False) -> None:
        """One training step of both ranks."""
        self.step += 1
        self.now += 1.0
        flags = [rank.flags() for rank in self.ranks]
        totals = [sum(column) for column in zip(*flags, strict=True)]
        errors = []
        for rank in self.ranks:
            try:
                rank.hear(*totals)
            except RunFailedError as error:
                errors.append(error)
        if errors:
            assert len(errors) == 2, "both ranks must give up together"
            raise errors[0]
        for rank in self.ranks:
            rank.wanted |= wanted
            rank.begin_if_wanted(lambda: {"step": self.step, "best_step": None}, self.step)

    def begun(self) -> list[int]:
        assert self.savers[0].begun == self.savers[1].begun
        return self.savers[0].begun


def test_a_save_begins_at_once_and_is_told_when_rank_0_has_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch)
    group.advance(wanted=True)
    assert group.begun() == [1]
    group.savers[1].end()
    group.advance()
    assert group.saved == []
    group.savers[0].end()
    group.advance()
    assert group.saved == [(1, 0.001)]
    assert group.begun() == [1]


def test_a_save_that_is_due_while_one_is_in_flight_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch)
    group.advance(wanted=True)
    group.advance(wanted=True)
    group.savers[0].end()  # but rank 1 is still busy
    group.advance()
    assert group.begun() == [1]
    group.savers[1].end()
    group.advance()
    assert group.begun() == [1, 4]


def test_a_failure_on_one_rank_is_told_and_tried_again_with_growing_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch)
    group.advance(wanted=True)
    group.savers[0].end("no space left on device")
    group.advance()
    assert group.failed == [(1, "no space left on device", 10.0)]
    assert group.savers[1].abandoned == 1  # and what it says of it is not a second failure
    for _ in range(9):
        group.advance()
    assert group.begun() == [1]
    group.advance()
    assert group.begun() == [1, 12]
    group.savers[1].end("disk")
    group.advance()
    assert group.failed[1][1].startswith("rank 1 could not write its part")
    assert group.failed[1][2] == 20.0
    for _ in range(25):
        group.advance()
    assert len(group.begun()) == 3
    for saver in group.savers:
        saver.end()
    group.advance()
    assert [step for step, _ in group.saved] == group.begun()[2:]
    # A success forgives what was before.
    group.advance(wanted=True)
    group.savers[0].end("again")
    group.advance()
    assert group.failed[-1][2] == 10.0


def test_too_many_failures_in_a_row_end_the_run_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch, save_attempts=2)
    group.advance(wanted=True)
    group.savers[0].end("no space left on device")
    group.advance()
    while len(group.begun()) == 1:
        group.advance()
    group.savers[0].end("no space left on device")
    with pytest.raises(RunFailedError, match=r"2 checkpoints in a row.*no space left"):
        group.advance()


class Alone(FakeSaver):
    """Ends by itself: with the errors given, one a save, then well; some looks after its begin."""

    def __init__(self, *errors: str) -> None:
        super().__init__()
        self.errors = list(errors)
        self.looks = 0

    def finished(self) -> Saved | None:
        if self.busy:
            self.looks += 1
            if self.looks % 3 == 0:
                self.end(self.errors.pop(0) if self.errors else None)
        return super().finished()


def test_save_now_waits_for_the_commit_and_through_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group(monkeypatch)
    saver, saved = Alone("disk", "disk"), []
    rank = Saving(
        saver,  # type: ignore[arg-type]
        RecoveryConfig(save_backoff_s=5),
        rank=0,
        hang_s=100.0,
        beat=lambda: None,
        sum_over_ranks=lambda numbers: numbers,
        saved=lambda done, stall_s: saved.append(done.step),
        failed=lambda *what: group.failed.append(what),
    )
    began = group.now
    rank.save_now(lambda: {"step": 7, "best_step": None}, 7)
    assert (saver.begun, saved) == ([7, 7, 7], [7])
    assert group.now - began > 15  # both waits
    rank.save_now(lambda: {"step": 7, "best_step": None}, 7)
    assert saver.begun == [7, 7, 7]  # it is there already
    rank.save_now(lambda: {"step": 8, "best_step": None}, 8)
    assert saved == [7, 8]


def test_a_save_that_does_not_end_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch)
    group.advance(wanted=True)
    for _ in range(99):
        group.advance()
    assert group.failed == []
    for _ in range(50):
        group.advance(wanted=True)
    [(step, why, retry_s)] = group.failed
    assert (step, retry_s) == (1, None)
    assert "has not ended in 100 s" in why
    assert group.begun() == [1]

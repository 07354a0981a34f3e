"""The door between a supervisor and the rank server in the command's own process."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

import pytest

from cluster import local_ranks
from cluster.failures import RankDiedError
from cluster.local_ranks import LocalRanks, run_rank
from cluster.ranks import Place


class Server:
    """In place of the one that starts processes, which has tests of its own."""

    def __init__(self, **_: Any) -> None:
        self.is_lost: bool | None = None

    def run(self, task: bytes, place: Place, environment: dict[str, str], pid: int) -> object:
        if task == b"dies":
            raise RankDiedError(place.rank, 4711, -9)
        return task, place, environment, pid

    def close(self, *, is_lost: bool) -> None:
        self.is_lost = is_lost


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalRanks]:
    monkeypatch.setattr(local_ranks, "RankServer", Server)
    with LocalRanks(warm=False, output=tmp_path / "out", metrics=None) as made:
        yield made


def test_a_supervisor_gets_what_its_rank_returns_or_raises(ranks: LocalRanks) -> None:
    place = Place(1, 2, 1)
    assert run_rank(ranks.door, b"task", place, {"A": "b"}) == (
        (b"task", place, {"A": "b"}, os.getpid())
    )
    with pytest.raises(RankDiedError) as caught:
        run_rank(ranks.door, b"dies", place, {})
    assert (caught.value.rank, caught.value.exit_code) == (1, -9)


def test_nobody_else_gets_in(ranks: LocalRanks) -> None:
    address, _ = ranks.door
    assert Path(address).parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(AuthenticationError):
        run_rank((address, b"guessed"), b"task", Place(0, 1, 0), {})
    assert run_rank(ranks.door, b"task", Place(0, 1, 0), {}), "and the door still opens"


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_run_that_did_not_end_well_is_told_as_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_lost: bool
) -> None:
    monkeypatch.setattr(local_ranks, "RankServer", Server)
    with LocalRanks(warm=False, output=tmp_path / "out", metrics=None) as ranks:
        ranks.is_lost = is_lost
    assert ranks._server.is_lost is is_lost  # type: ignore[attr-defined]
    assert not Path(ranks.door[0]).parent.exists()


def test_a_command_that_is_refused_before_it_trains_is_not_told_as_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_ranks, "RankServer", Server)
    with LocalRanks(warm=False, output=tmp_path / "out", metrics=None) as ranks:
        pass
    assert ranks._server.is_lost is False  # type: ignore[attr-defined]


def test_a_door_that_cannot_open_neither_spins_nor_holds_the_end_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_ranks, "RankServer", Server)
    made = LocalRanks(warm=False, output=tmp_path / "out", metrics=None)

    def accept() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(made._listener, "accept", accept)
        began = time.monotonic()
        with made:
            time.sleep(0.25)
    assert time.monotonic() - began < 2
    assert 1 <= sum("did not get through" in line for line in caplog.messages) <= 4


def test_what_a_killed_command_left_is_removed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_ranks, "RankServer", Server)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = 2**22 + 1  # more than any process has
    left, held, other = (
        tmp_path / f"babelray-ranks-{name}" for name in (f"{gone}-a", f"{gone}-b", "c")
    )
    for folder in (left, held, other):
        folder.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with (
        LocalRanks(warm=False, output=tmp_path / "out", metrics=None) as one,
        LocalRanks(warm=False, output=tmp_path / "out", metrics=None) as two,
    ):
        assert run_rank(one.door, b"task", Place(0, 1, 0), {}), "its folder is still there"
        assert run_rank(two.door, b"task", Place(0, 1, 0), {})
        assert [folder.exists() for folder in (left, held, other)] == [False, True, True]
    os.close(lock)

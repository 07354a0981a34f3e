"""Saving: in the background, by every rank, whole or not there whatever fails in between."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.saves import KINDS, SHAPES, FakeEngine, Group, assert_holds, open_storage, watched
from trainer.checkpoint import COMMIT, MANIFEST, Checkpoints
from trainer.parts import WEIGHT


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return open_storage(tmp_path / "run", tmp_path / "cache")


def files(checkpoints: Checkpoints, step: int) -> list[str]:
    return checkpoints.storage.names(checkpoints.folder(step))


class Killed(BaseException):
    """Nothing catches it, as nothing outlives a SIGKILL."""


class Death:
    """Kills everything in this process that touches the disk, from the k-th operation on.

    A write dies in its middle: half of the bytes arrive.
    """

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self._lock = threading.Lock()

    def __call__(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "open" and not arguments[1] & os.O_CREAT:
            return
        with self._lock:
            self.count += 1
            if self.count < self.at:
                return
            if operation == "write" and self.count == self.at:
                descriptor, data = arguments
                os.pwrite(descriptor, bytes(data[: len(data) // 2]), os.fstat(descriptor).st_size)
        raise Killed

    def has_come(self) -> bool:
        return self.count >= self.at


@contextmanager
def no_traces_of_dead_threads() -> Iterator[None]:
    before, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = before


def wait_dead(group: Group, failed: Callable[[], bool]) -> None:
    """Until no thread is left; once one has failed, the others wait for it no longer."""
    while any(saver.busy for saver in group.savers):
        if failed():
            for saver in group.savers:
                saver.abandon()
        time.sleep(0.001)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_was_saved_can_be_read(world_size: int, remote: bool, tmp_path: Path) -> None:
    where = f"memory://{tmp_path.name}{world_size}/run" if remote else tmp_path / "run"
    checkpoints = open_storage(where, tmp_path / "cache")
    group = Group(checkpoints, world_size)
    saved = group.save(12, best=12)
    assert checkpoints.committed() == [12]
    assert checkpoints.problems(12) == []
    assert_holds(checkpoints, 12, group.engines[0])
    # Nothing is there but what the manifest lists, and its commit.
    manifest = checkpoints.manifest(12)
    assert files(checkpoints, 12) == sorted([*manifest["files"], MANIFEST, COMMIT])
    optimizer = [name for name in manifest["files"] if name.startswith("optimizer-0a0b0c0d")]
    assert len(optimizer) == world_size
    assert saved[0].bytes == sum(entry["bytes"] for entry in manifest["files"].values())
    with checkpoints.open(12) as reader:
        assert reader.state["step"] == 12
        assert reader.state["world_size"] == world_size
        assert reader.state["optimizer"] == group.engines[0].scalars()
    weights = load_file(checkpoints.weights(12))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
    whole = group.engines[0].whole(WEIGHT)
    assert all(torch.equal(weights[name].reshape(-1), whole[name]) for name in SHAPES)
    assert checkpoints.best() == 12


def test_a_staging_folder_elsewhere_is_left_empty(tmp_path: Path) -> None:
    checkpoints = open_storage(tmp_path / "run", tmp_path / "cache")
    Group(checkpoints, 2, staging=tmp_path / "fast").save(3)
    assert checkpoints.problems(3) == []
    assert [path for path in (tmp_path / "fast").rglob("*") if path.is_file()] == []
    assert not (tmp_path / "run" / "checkpoints" / ".staging").exists()


def test_training_goes_on_at_once_and_changes_nothing_that_is_saved(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, expected = Group(checkpoints, 2), FakeEngine()
    go_on = threading.Event()
    with watched(monkeypatch, lambda *_: go_on.wait(10)):
        group.begin(1)
        assert all(saver.busy and saver.finished() is None for saver in group.savers)
        for engine in group.engines:
            for kind in KINDS:
                engine.flat[kind].zero_()  # the next update
        go_on.set()
        group.wait()
    assert_holds(checkpoints, 1, expected)
    # The save is told once; the next one takes the same memory.
    assert [saver.finished() for saver in group.savers] == [None, None]
    before = [buffer.data_ptr() for buffer in group.savers[0]._buffers.values()]
    group.save(2)
    assert [buffer.data_ptr() for buffer in group.savers[0]._buffers.values()] == before
    assert_holds(checkpoints, 2, group.engines[0])


def test_at_the_commit_all_the_rest_is_on_the_disk(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a disk holds what was synced: contents by file, names by folder."""
    group = Group(checkpoints, 2)
    names: dict[int, str] = {}  # descriptor -> path
    unsynced: set[str] = set()
    at_commit: list[set[str]] = []
    lock = threading.Lock()

    def watch(operation: str, arguments: tuple[Any, ...]) -> None:
        with lock:
            if operation == "write":
                unsynced.add(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            elif operation == "fsync":
                unsynced.discard(os.readlink(f"/proc/self/fd/{arguments[0]}"))
            elif operation == "replace":
                source, target = map(str, arguments)
                assert source not in unsynced, f"{source} gets its name before it is synced"
                if target.endswith(COMMIT):
                    at_commit.append(set(unsynced))
                unsynced.add(str(Path(target).parent))
                names.clear()

    with watched(monkeypatch, watch):
        group.save(4)
    assert at_commit == [set()]
    assert unsynced == set()


@pytest.mark.parametrize("world_size", [1, 2])
def test_death_at_any_moment_leaves_a_whole_checkpoint(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call of a save, in turn, is the last one of all ranks.

    With two ranks every third: their threads interleave, so that k is another moment each time.
    """
    outcomes = []
    for at in range(1, 1000, 1 if world_size == 1 else 3):
        run = tmp_path / f"{at}"
        checkpoints = open_storage(run, tmp_path / "cache")
        group = Group(checkpoints, world_size, keep=1)
        group.save(1)
        death = Death(at)
        with no_traces_of_dead_threads(), watched(monkeypatch, death):
            group.engines[0].flat[WEIGHT][0] = 77.0
            group.begin(2, best=2)
            wait_dead(group, death.has_come)
        if death.count < at:
            break
        step, passed_over = checkpoints.find_trusted()
        assert step in (1, 2)
        assert passed_over == {}
        assert all(checkpoints.problems(each) == [] for each in checkpoints.committed())
        outcomes.append(step)
        # The next attempt clears up and saves again.
        group = Group(checkpoints, world_size, token="11111111", keep=1)
        group.engines[0].flat[WEIGHT][0] = 77.0
        everything = [path for path in run.rglob("*") if path.is_file()]
        assert [path for path in everything if "0a0b0c0d.2" in path.name and step == 1] == []
        group.save(2)
        group.save(3, best=3)
        assert checkpoints.committed() == [3]
        assert_holds(checkpoints, 3, group.engines[0])
        left = {path.name for path in run.rglob("*") if path.is_file()}
        assert left == {*files(checkpoints, 3), "attempt.json", "best.json"}
    assert len(outcomes) > 20
    assert set(outcomes) == {1, 2}


def test_writing_a_step_anew_never_leaves_less_than_there_was(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume went back and came again to a step whose checkpoint is good: it stays as it is."""
    Group(checkpoints, 2).save(5)
    before = {name: os.stat(checkpoints.local(5, name)).st_ino for name in files(checkpoints, 5)}
    for at in range(1, 1000):
        death = Death(at)
        group = Group(checkpoints, 2, token=f"{at:08d}")
        with no_traces_of_dead_threads(), watched(monkeypatch, death):
            group.begin(5)
            wait_dead(group, death.has_come)
        assert checkpoints.problems(5) == []
        if death.count < at:
            break
    assert at > 20
    group = Group(checkpoints, 2, token="99999999")
    [first, _] = group.save(5)
    assert first.bytes == sum(e["bytes"] for e in checkpoints.manifest(5)["files"].values())
    assert before == {
        name: os.stat(checkpoints.local(5, name)).st_ino for name in files(checkpoints, 5)
    }


@pytest.mark.parametrize("why", ["damaged", "of another history"])
def test_a_step_is_written_anew_if_what_is_there_is(
    why: str, checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    Group(checkpoints, 2).save(5, data_hash="ff" if why != "damaged" else None)
    if why == "damaged":
        file = checkpoints.local(5, "model.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
    group = Group(checkpoints, 3, token="11111111", seed=2)
    group.save(5)
    assert "step-00000005 is written anew: " in caplog.text
    assert ("bytes" if why == "damaged" else "its data_hash is another") in caplog.text
    assert checkpoints.problems(5) == []
    assert_holds(checkpoints, 5, group.engines[0])
    assert not [name for name in files(checkpoints, 5) if "0a0b0c0d" in name]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_is_told_and_the_next_save_goes_well(
    failing: int, operation: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(checkpoints, 2)
    group.save(1)

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name != operation or (name == "open" and not arguments[1] & os.O_CREAT):
            return
        where = arguments[0]
        where = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)
        if f"-0000{failing}-of-" in where:
            raise OSError(errno.ENOSPC, "No space left on device", where)

    with watched(monkeypatch, fail):
        group.begin(2)
        wait_dead(group, lambda: not group.savers[failing].busy)
        first, second = group.wait()
    failed, other = (first, second) if failing == 0 else (second, first)
    assert failed.error is not None
    for part in ("step 2", "cannot write", "-of-00002", "No space left", "free some space"):
        assert part in failed.error
    if failing == 1:
        assert other.error is not None
        assert "another rank" in other.error
    assert checkpoints.committed() == [1]
    staging = checkpoints.staging(None)
    assert list(staging.iterdir()) == []
    group.save(2)
    assert checkpoints.committed() == [1, 2]
    assert len(files(checkpoints, 2)) == 6


def test_a_commit_that_fails_does_not_count(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name was given, but that the disk holds it could not be made sure."""
    group = Group(checkpoints, 1)
    group.save(1)
    renamed = []

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "replace" and str(arguments[1]).endswith(COMMIT):
            renamed.append(arguments[1])
        if name == "fsync" and len(renamed) == 1:
            renamed.append("failed")
            raise OSError(errno.EIO, "Input/output error")

    with watched(monkeypatch, fail):
        group.begin(2)
        [saved] = group.wait()
    assert saved.error is not None
    assert "Input/output error" in saved.error
    assert checkpoints.committed() == [1]
    assert files(checkpoints, 2) == []


def test_what_fails_after_the_commit_is_only_told(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group(checkpoints, 1, keep=1)
    group.save(1)

    def fail(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "unlink" and str(arguments[0]).endswith(COMMIT):
            raise OSError(errno.EROFS, "Read-only file system")

    with watched(monkeypatch, fail):
        group.save(2)
    assert "step 2 is committed, but: cannot remove" in caplog.text
    assert checkpoints.committed() == [1, 2]
    group.save(3)
    assert checkpoints.committed() == [3]


def test_a_save_that_is_given_up_is_not_committed(checkpoints: Checkpoints) -> None:
    """Rank 1 never begins: rank 0 waits until it is told."""
    group = Group(checkpoints, 2)
    group.savers, absent = group.savers[:1], group.savers[1]
    group.begin(1)
    group.savers[0]._thread.join(0.2)  # type: ignore[union-attr]
    assert group.savers[0].busy
    group.savers[0].abandon()
    [saved] = group.wait()
    assert saved.error is not None
    assert "given up: another rank" in saved.error
    assert files(checkpoints, 1) == []
    group.savers = [*group.savers, absent]
    absent._num_saves += 1  # as if it had begun the first, too
    group.save(2)
    assert checkpoints.committed() == [2]


def test_what_a_failed_save_left_is_never_taken_for_the_next(checkpoints: Checkpoints) -> None:
    group = Group(checkpoints, 2)
    group.begin(1)
    group.savers[0].close()
    first, _ = group.wait()
    if first.error is None:  # it was quicker
        checkpoints.drop(1)
    for engine in group.engines:
        engine.flat[WEIGHT].add_(1.0)
    group.save(1)
    assert_holds(checkpoints, 1, group.engines[0])


def test_an_attempt_that_is_over_can_neither_commit_nor_clear_up(checkpoints: Checkpoints) -> None:
    """Its ranks were cut off by a network, say, and do not know."""
    old = Group(checkpoints, 1)
    old.save(1)
    new = Group(checkpoints, 2, token="11111111")
    new.savers[1].begin({}, step=2, best=None)  # publishes its part
    while new.savers[1].busy:
        pass
    before = files(checkpoints, 2)
    old.begin(2)
    [saved] = old.wait()
    assert saved.error is not None
    assert "a newer attempt of this run has begun" in saved.error
    assert files(checkpoints, 2) == before
    new.savers = new.savers[:1]
    new.begin(2)
    assert new.wait()[0].error is None


def test_a_newer_attempt_that_begins_during_a_save_wins(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Group(checkpoints, 1)

    def supersede(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "replace" and str(arguments[1]).endswith(MANIFEST):
            checkpoints.storage.write("checkpoints/attempt.json", b'{"token": "11111111"}')

    with watched(monkeypatch, supersede):
        old.begin(1)
        [saved] = old.wait()
    assert saved.error is not None
    assert "a newer attempt" in saved.error
    assert checkpoints.committed() == []


def test_weights_that_were_damaged_on_their_way_are_not_committed(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get a new sha256 in model.safetensors: nobody could see it later."""
    group = Group(checkpoints, 2)

    def damage(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "replace" and "weights-" in str(arguments[1]):
            content = bytearray(Path(arguments[0]).read_bytes())
            content[-1] ^= 1
            Path(arguments[0]).write_bytes(content)

    with watched(monkeypatch, damage):
        group.begin(1)
        first, _ = group.wait()
    assert first.error is not None
    assert "differs from what was written" in first.error
    assert checkpoints.committed() == []


@pytest.mark.parametrize("lacking", [0, 1, -1])
def test_fragments_that_do_not_make_up_the_model_are_not_committed(
    lacking: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    fragments = FakeEngine().fragments()
    del fragments[lacking]
    monkeypatch.setattr(FakeEngine, "fragments", lambda _: fragments)
    group = Group(checkpoints, 1)
    group.begin(1)
    [saved] = group.wait()
    assert saved.error is not None
    assert "the ranks hold" in saved.error
    assert checkpoints.committed() == []


def test_the_best_is_noted_and_kept_and_older_ones_go(checkpoints: Checkpoints) -> None:
    group = Group(checkpoints, 1, keep=2)
    for step in (1, 2, 3, 4, 5):
        group.save(step, best=2 if step >= 2 else None)
    assert checkpoints.committed() == [2, 4, 5]
    assert json.loads(checkpoints.storage.read("best.json")) == {"step": 2, "valid_nll": 1.5}


def test_a_best_whose_save_failed_does_not_replace_the_one_before(
    checkpoints: Checkpoints,
) -> None:
    group = Group(checkpoints, 1, keep=1)
    group.save(1, best=1)
    group.save(3, best=2)  # 2 was the best, but could not be saved
    assert checkpoints.best() == 1
    assert checkpoints.committed() == [1, 3]

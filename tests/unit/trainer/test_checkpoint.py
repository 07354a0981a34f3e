"""Checkpoints: which there are, which can be trusted, which stay, and what they hold."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.errors import RunFailedError, UserError
from data_shards.plan import PLAN_FORMAT, Plan
from tests.saves import FakeEngine, Group, assert_holds, open_storage
from trainer.checkpoint import COMMIT, MANIFEST, STATE, Checkpoints, check_settings
from trainer.config import RecoveryConfig
from trainer.parts import MOMENTS, WEIGHTS
from trainer.storage import StorageError


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Steps 1 and 2, saved by two ranks."""
    checkpoints = open_storage(tmp_path / "run", tmp_path / "cache")
    group = Group(checkpoints, 2)
    for step in (1, 2):
        group.save(step)
    return checkpoints


def damage(checkpoints: Checkpoints, step: int, name: str, how: str) -> Path:
    file = checkpoints.local(step, name)
    content = file.read_bytes()
    if how == "remove":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    return file


OPTIMIZER = "optimizer-0a0b0c0d.2-00001-of-00002.safetensors"


@pytest.mark.parametrize("name", [OPTIMIZER, WEIGHTS, STATE, MANIFEST, COMMIT])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(
    name: str, how: str, saved: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    file = damage(saved, 2, name, how)
    step, passed_over = saved.find_trusted()
    assert step == 1
    if (name, how) == (COMMIT, "remove"):
        assert passed_over == {}  # it was never there
        return
    [problem] = passed_over[2]
    if name in (MANIFEST, COMMIT) and how != "remove":
        assert problem == f"{file.with_name(MANIFEST)} differs from what was committed"
    else:
        what = {"flip": "differs from what was written", "truncate": " bytes, "}
        assert str(file) in problem
        assert what.get(how, "is missing") in problem
    assert f"passed over checkpoint {file.parent}: {problem}" in caplog.text


def test_the_one_before_may_be_asked_for(saved: Checkpoints) -> None:
    assert saved.find_trusted(before=1) == (1, {})
    assert saved.find_trusted(before=0) == (None, {})


def test_if_none_can_be_trusted_it_says_so_and_touches_nothing(saved: Checkpoints) -> None:
    files = [damage(saved, step, STATE, "truncate") for step in (1, 2)]
    with pytest.raises(RunFailedError, match="no checkpoint of this run can be trusted") as error:
        saved.find_trusted()
    assert all(str(file) in str(error.value) for file in files)
    assert saved.committed() == [1, 2]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert open_storage(tmp_path, tmp_path / "cache").find_trusted() == (None, {})


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_file_that_the_disk_cannot_give_is_passed_over(
    call: str, saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Path, call)

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == WEIGHTS and "step-00000002" in str(self):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, call, fail)
    step, passed_over = saved.find_trusted()
    assert step == 1
    assert f"step-00000002/{WEIGHTS}" in passed_over[2][0]
    assert "Input/output error" in passed_over[2][0]


def test_every_problem_is_told(saved: Checkpoints) -> None:
    damage(saved, 2, WEIGHTS, "flip")
    damage(saved, 2, OPTIMIZER, "remove")
    assert len(saved.problems(2)) == 2
    assert len(saved.problems(2, hashes=False)) == 1
    assert saved.problems(2, only=[STATE]) == []
    assert "holds no other" in saved.problems(2, only=["other"])[0]


def test_retention_keeps_the_newest_and_the_best(saved: Checkpoints) -> None:
    group = Group(saved, 1, keep=9)
    for step in (3, 4, 5):
        group.save(step)
    saved.retain(keep=2, best=1)
    assert saved.committed() == [1, 4, 5]
    saved.set_best(1, valid_nll=0.5)
    saved.retain(keep=1, best=None)
    assert saved.committed() == [1, 5]


def test_retention_keeps_what_somebody_works_with(saved: Checkpoints) -> None:
    saved.pin(1)
    saved.retain(keep=1, best=None)
    assert saved.committed() == [1, 2]
    saved.pin(None)
    saved.retain(keep=1, best=None)
    assert saved.committed() == [2]


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_retention_keeps_the_newest_that_verifies(how: str, saved: Checkpoints) -> None:
    """With the newest damaged, the last good one is the one before, whatever ``keep`` says."""
    damage(saved, 2, WEIGHTS, how)
    saved.retain(keep=1, best=None)
    assert saved.committed() == [1, 2]
    damage(saved, 1, WEIGHTS, how)
    saved.retain(keep=1, best=None)
    assert saved.committed() == [1, 2]  # nothing verifies: nothing goes


def test_an_unreadable_best_does_not_hold_retention_up(saved: Checkpoints) -> None:
    saved.storage.write("best.json", b"{")
    with pytest.raises(StorageError, match=r"best\.json cannot be read"):
        saved.best()
    saved.retain(keep=1, best=None)
    assert saved.committed() == [2]
    Group(saved, 1, token="11111111").save(3, best=3)
    assert saved.best() == 3


def test_what_dead_saves_left_is_cleared_and_nothing_else(saved: Checkpoints) -> None:
    storage = saved.storage
    for name in (
        "step-00000002/weights-deadbeef.7-00001-of-00002.safetensors",
        "step-00000003/optimizer-deadbeef.8-00000-of-00002.safetensors",
        "step-00000004/optimizer-11111111.1-00000-of-00002.safetensors",
        "step-00000004/.model.safetensors.0123456789ab",
        "notes/mine",
    ):
        storage.write(f"checkpoints/{name}", b"")
    storage.write(".best.json.0123456789ab", b"")
    before = storage.names("checkpoints/step-00000001")
    saved.clean("11111111")
    assert storage.names("checkpoints") == [
        ".staging", "attempt.json", "notes", "step-00000001", "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert storage.names("checkpoints/step-00000001") == before
    assert storage.names("checkpoints/step-00000004") == [
        "optimizer-11111111.1-00000-of-00002.safetensors"
    ]
    assert storage.names("") == ["checkpoints"]
    assert (saved.problems(1), saved.problems(2)) == ([], [])


def test_a_damaged_checkpoint_is_left_for_a_rescue(saved: Checkpoints) -> None:
    damage(saved, 2, MANIFEST, "flip")
    before = saved.storage.names(saved.folder(2))
    saved.begin_attempt("11111111")
    assert saved.storage.names(saved.folder(2)) == before


def test_all_of_them_can_be_cleared_away(saved: Checkpoints) -> None:
    saved.set_best(1, valid_nll=0.5)
    saved.storage.write("mine", b"")
    saved.clear()
    assert saved.storage.names("") == ["mine"]
    assert (saved.committed(), saved.best()) == ([], None)


def test_only_the_newest_attempt_is_one(saved: Checkpoints) -> None:
    saved.begin_attempt("11111111")
    assert (saved.is_attempt("0a0b0c0d"), saved.is_attempt("11111111")) == (False, True)
    saved.storage.write("checkpoints/attempt.json", b"[")
    assert not saved.is_attempt("11111111")


def test_a_rank_reads_only_the_parts_it_needs(saved: Checkpoints) -> None:
    """Another number of ranks reads ranges that cross the parts of those that wrote."""
    engine = FakeEngine()
    names = list(engine.shapes())
    saved.local(2, OPTIMIZER.replace("00001-of", "00000-of")).unlink()
    with saved.open(2) as reader:
        whole = engine.whole(MOMENTS[0])[names[-1]]
        assert torch.equal(reader.read(MOMENTS[0], names[-1], 0, 1), whole)
        with pytest.raises(RunFailedError, match=r"cannot read .*step-00000002: .*No such file"):
            reader.read(MOMENTS[0], names[0], 0, 1)


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
@pytest.mark.parametrize(
    ("name", "start", "length"), [("absent", 0, 1), ("embedding", 30, 6), ("scale", 0, 2)]
)
def test_what_it_does_not_hold_is_told(
    kind: str, name: str, start: int, length: int, saved: Checkpoints
) -> None:
    with (
        saved.open(2) as reader,
        pytest.raises(RunFailedError, match=rf"step-00000002 holds no {kind} of {name}"),
    ):
        reader.read(kind, name, start, length)


def test_a_run_finds_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "runs" / "demo"
    own = Checkpoints.of(run, RecoveryConfig())
    assert own.where(7) == f"{run}/checkpoints/step-00000007"
    assert own.staging(None) == run / "checkpoints" / ".staging"
    other = Checkpoints.of(run, RecoveryConfig(storage="/mnt/all/"))
    assert other.where(7) == "/mnt/all/demo/checkpoints/step-00000007"
    remote = Checkpoints.of(run, RecoveryConfig(storage="memory://bucket/runs"))
    assert remote.where(7) == "memory://bucket/runs/demo/checkpoints/step-00000007"
    assert remote.staging(None).is_relative_to(tmp_path / "cache" / "babelray")
    # Two runs that share a staging folder do not meet.
    assert len({each.staging(tmp_path) for each in (own, other, remote)}) == 3


def test_a_remote_checkpoint_is_fetched_once_and_copies_of_old_ones_go(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    checkpoints = open_storage(f"memory://{tmp_path.name}/run", cache)
    group = Group(checkpoints, 1, keep=1)
    group.save(1)
    assert checkpoints.find_trusted() == (1, {})
    copy = checkpoints.weights(1)
    # A copy that went bad is fetched again: the storage is not to blame.
    copy.write_bytes(b"0" * copy.stat().st_size)
    assert checkpoints.problems(1) == []
    assert_holds(checkpoints, 1, group.engines[0])
    group.save(2)
    assert checkpoints.find_trusted() == (2, {})
    assert not copy.exists()
    assert checkpoints.weights(2).is_relative_to(cache)


def test_damage_in_a_remote_storage_is_named(tmp_path: Path) -> None:
    checkpoints = open_storage(f"memory://{tmp_path.name}/run", tmp_path / "cache")
    group = Group(checkpoints, 1)
    group.save(1)
    group.save(2)
    name = f"{checkpoints.folder(2)}/{WEIGHTS}"
    content = bytearray(checkpoints.storage.read(name))
    content[-1] ^= 1
    checkpoints.storage.write(name, bytes(content))
    step, passed_over = checkpoints.find_trusted()
    assert step == 1
    assert passed_over[2] == [
        f"{checkpoints.where(2)}/{WEIGHTS} differs from what was written (sha256)"
    ]
    with pytest.raises(StorageError, match="differs from what was written"):
        checkpoints.weights(2)
    # A storage that does not answer says nothing about what lies in it.
    checkpoints.storage._fs.cat_file = _refuse  # type: ignore[attr-defined]
    try:
        with pytest.raises(StorageError, match="denied"):
            checkpoints.find_trusted()
    finally:
        del checkpoints.storage._fs.cat_file  # type: ignore[attr-defined]


def _refuse(path: str) -> bytes:
    raise PermissionError(f"denied: {path}")


def test_another_configuration_is_refused_with_both_values() -> None:
    where = "s3://bucket/run/checkpoints/step-00000001"
    with pytest.raises(UserError, match=r"step-00000001 .*: model\.d_ff was 64, is 128") as error:
        check_settings(where, {"model.d_ff": 64}, {"model.d_ff": 128})
    assert "under another name" in str(error.value)
    check_settings(where, {"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(UserError, match="gradient_dtype was 'fp32', is 'bf16'"):
        check_settings(where, {"gradient_dtype": "fp32"}, {"gradient_dtype": "bf16"})
    check_settings(where, {"precision": "fp32"}, {"precision": "fp32", "gradient_dtype": "bf16"})


def test_a_run_of_another_plan_format_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batches of the same corpus, under the same settings, would be others."""

    def digest() -> str:
        lengths = np.array([[3, 4], [5, 2]])
        return Plan(lengths, [2], lanes=1, tokens_per_step=25, window_pairs=9, seed=3).digest

    now = digest()
    monkeypatch.setattr("data_shards.plan.PLAN_FORMAT", PLAN_FORMAT - 1)
    then = digest()
    settings = {"data": "1234", "data.lanes": 1}
    with pytest.raises(
        UserError, match=rf"step-00000001 .*another version .*plan was '{then}', is '{now}'"
    ) as error:
        check_settings("step-00000001", {**settings, "plan": then}, {**settings, "plan": now})
    assert "Resume with the version that began the run" in str(error.value)


def test_a_manifest_lists_sizes_hashes_and_fragments(saved: Checkpoints) -> None:
    manifest = json.loads(saved.local(2, MANIFEST).read_text())
    assert manifest["step"] == 2
    assert set(manifest["files"][STATE]) == {"bytes", "sha256"}
    covered: dict[str, int] = {}
    for entry in manifest["files"].values():
        for name, _, length in entry.get("fragments", ()):
            covered[name] = covered.get(name, 0) + length
    assert covered == {name: len(flat) for name, flat in FakeEngine().whole("weight").items()}

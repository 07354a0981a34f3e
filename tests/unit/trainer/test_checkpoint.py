"""Checkpoints on disk: what counts, what is trusted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch

from data_shards.errors import RunFailedError, UserError
from trainer import checkpoint
from trainer.checkpoint import TrainState
from trainer.engine import Engine


class FakeEngine:
    """Writes one file as DeepSpeed would; the real one is tested with real ranks."""

    def __init__(self, value: float) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "part.pt").write_bytes(b"state" * 100)

    def full_weights(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.full((3, 2), self.value)}


def save(run_dir: Path, step: int, *, keep: int = 3, best: int | None = None) -> Path:
    state = TrainState(step=step, best_step=best, best_nll=None if best is None else 1.5)
    engine = cast(Engine, FakeEngine(float(step)))
    size = checkpoint.save(
        engine, run_dir, state, rank=0, world_size=1, keep=keep, settings={"zero_stage": 1}
    )
    folder = checkpoint.checkpoint_folder(run_dir, step)
    assert size > 500
    return folder


def test_the_state_survives_its_json() -> None:
    state = TrainState(step=7, elapsed_s=1.5, data_hash=2**64 - 3, best_nll=2.0, best_step=6)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_what_was_saved_is_committed_and_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert checkpoint.committed(tmp_path) == [(12, folder)]
    assert checkpoint.problems(folder) == []
    assert checkpoint.find_trusted(tmp_path) == folder
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    assert sorted(files) == ["engine/part.pt", "model.safetensors", "state.json"]


def test_without_a_commit_it_does_not_count(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / checkpoint.COMMIT).unlink()
    assert checkpoint.find_trusted(tmp_path) == older
    # The next save at that step clears away what the interrupted one left.
    (newer / "engine" / "left-over").write_text("")
    save(tmp_path, 2)
    assert not (newer / "engine" / "left-over").exists()


@pytest.mark.parametrize("name", ["engine/part.pt", "model.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    file = newer / name
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        file.unlink()
    assert str(file) in checkpoint.problems(newer)[0]
    assert checkpoint.find_trusted(tmp_path) == older
    assert "passed over checkpoint step-00000002" in caplog.text


def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = folder / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 2'))
    assert "differs from what was committed" in checkpoint.problems(folder)[0]


def test_if_none_can_be_trusted_it_says_so_and_touches_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / checkpoint.STATE).unlink()
    with pytest.raises(RunFailedError, match="no checkpoint of this run can be trusted"):
        checkpoint.find_trusted(tmp_path)
    assert (folder / checkpoint.WEIGHTS).exists()


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.find_trusted(tmp_path) is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2, best=2 if step >= 2 else None)
    assert [step for step, _ in checkpoint.committed(tmp_path)] == [2, 4, 5]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": 2, "valid_nll": 1.5}


def test_another_configuration_is_refused_with_both_values(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.d_ff was 64, is 128") as error:
        checkpoint.check_settings(tmp_path, {"model.d_ff": 64}, {"model.d_ff": 128})
    assert "under another name" in str(error.value)
    checkpoint.check_settings(tmp_path, {"a": 1, "b": 2}, {"a": 1})


def test_an_atomic_write_leaves_no_draft(tmp_path: Path) -> None:
    checkpoint.write_atomically(tmp_path / "file", "one")
    checkpoint.write_atomically(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``checkpoints/step-00001000``::

    engine/              DeepSpeed's parts, written by every rank
    model.safetensors    the full weights in float32, by rank 0
    state.json           where the run stands: all of TrainState
    manifest.json        size and sha256 of every file above
    COMMIT               written last; a folder without it does not count

There is no random state in it: dropout is seeded by (seed, step, lane), so the step is enough.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors.torch import save_file

from data_shards.blocks import sync_path
from data_shards.errors import RunFailedError, UserError
from data_shards.manifest import file_sha256
from trainer.engine import Engine

log = logging.getLogger(__name__)

COMMIT = "COMMIT"
ENGINE = "engine"
WEIGHTS = "model.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Where a run stands between two updates; with the weights, all that a resume needs."""

    step: int = 0  # updates made
    elapsed_s: float = 0.0  # training time over all attempts
    data_hash: int = 0  # rolling hash of the pair ids consumed, modulo 2**64
    target_tokens: int = 0  # trained on since the beginning
    source_tokens: int = 0
    best_nll: float | None = None  # of the validation set, nats a target token
    best_step: int | None = None
    stale_validations: int = 0  # validations since the best one

    def to_json(self) -> dict[str, Any]:
        """Plain values; the hash as text, since JSON numbers lose 64-bit integers."""
        return {**asdict(self), "data_hash": f"{self.data_hash:016x}"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of ``to_json``."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        known["data_hash"] = int(known["data_hash"], 16)
        return cls(**known)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` updates lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def committed(run_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoints whose commit was written, oldest first."""
    found = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and (folder / COMMIT).is_file():
            found.append((int(number), folder))
    return found


def save(
    engine: Engine,
    run_dir: Path,
    state: TrainState,
    *,
    rank: int,
    world_size: int,
    keep: int,
    settings: dict[str, Any],
) -> int:
    """Write and commit a checkpoint (a collective), then drop what retention no longer keeps.

    Args:
        settings: what a resume must find unchanged (see ``check_settings``).

    Returns:
        The checkpoint's size in bytes on rank 0, 0 elsewhere.
    """
    folder = checkpoint_folder(run_dir, state.step)
    if rank == 0:
        # What an interrupted save, or a run that went another way from here, left behind.
        (folder / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _barrier()
    engine.save(folder / ENGINE)
    weights = engine.full_weights()
    _barrier()  # every rank's part is there
    size = 0
    if rank == 0:
        save_file(weights, str(folder / WEIGHTS))
        description = {**state.to_json(), "world_size": world_size, "settings": settings}
        (folder / STATE).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
        size = _commit(folder, state.step)
        if state.best_step == state.step:
            best = {"step": state.step, "valid_nll": state.best_nll}
            write_atomically(run_dir / "best.json", json.dumps(best) + "\n")
        _retain(run_dir, keep=keep, best_step=state.best_step)
    _barrier()
    return size


def _commit(folder: Path, step: int) -> int:
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync_path(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=2) + "\n")
    write_atomically(folder / COMMIT, f"{file_sha256(folder / MANIFEST)}\n")
    return sum(entry["bytes"] for entry in files.values())


def problems(folder: Path) -> list[str]:
    """What is wrong with a committed checkpoint's files; empty if it can be trusted."""
    try:
        commit = (folder / COMMIT).read_text().strip()
        if file_sha256(folder / MANIFEST) != commit:
            return [f"{folder / MANIFEST} differs from what was committed"]
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder}: unreadable commit or manifest ({error})"]
    found = []
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            found.append(
                f"{file} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            )
        elif file_sha256(file) != expected["sha256"]:
            found.append(f"{file} differs from what was written (sha256)")
    return found


def find_trusted(run_dir: Path) -> Path | None:
    """The newest checkpoint that is committed and verifies; says which it passes over and why.

    Raises:
        RunFailedError: there are committed checkpoints, but none of them verifies.
    """
    candidates = committed(run_dir)
    passed_over = []
    for _, folder in reversed(candidates):
        found = problems(folder)
        if not found:
            return folder
        passed_over += found
        log.warning("passed over checkpoint %s: %s", folder.name, "; ".join(found))
    if candidates:
        raise RunFailedError(
            "no checkpoint of this run can be trusted: " + "; ".join(passed_over) + ". Restore "
            f"one from a backup, or start anew under another name ({run_dir} was left as it is)"
        )
    return None


def load(engine: Engine, folder: Path, *, world_size: int, settings: dict[str, Any]) -> TrainState:
    """Load a checkpoint into the engine (a collective) and return where the run stands.

    Raises:
        UserError: it was written under settings that a resume must not change.
    """
    description = json.loads((folder / STATE).read_text())
    check_settings(folder, description["settings"], settings)
    written_by = description["world_size"]
    if written_by != world_size and description["settings"]["zero_stage"] > 0:
        raise UserError(
            f"checkpoint {folder.name} was written by {written_by} workers under ZeRO stage "
            f"{description['settings']['zero_stage']}, which {world_size} cannot read: resume with "
            f"--workers {written_by}"
        )
    engine.load(folder / ENGINE)
    return TrainState.from_json(description)


def check_settings(folder: Path, written: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on under another model, data or precision.

    Raises:
        UserError: names each setting that differs, with both values.
    """
    different = [
        f"{name} was {written.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if written.get(name) != value
    ]
    if different:
        raise UserError(
            f"checkpoint {folder.name} belongs to another configuration: {'; '.join(different)}. "
            "Resume with the run's own settings, or start a run under another name"
        )


def _retain(run_dir: Path, *, keep: int, best_step: int | None) -> None:
    everything = committed(run_dir)
    newest = {step for step, _ in everything[-keep:]}
    for step, folder in everything:
        if step not in newest and step != best_step:
            # The commit goes first: a half-deleted folder must not look like a checkpoint.
            (folder / COMMIT).unlink()
            shutil.rmtree(folder)


def write_atomically(file: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()

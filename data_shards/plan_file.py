"""A large corpus' plan, kept beside its manifest and mapped into memory by all ranks.

Finding where 36 million pairs are cut takes seconds; opening what was found takes milliseconds. A
file is named after all that its plan follows from, holds a checksum of its whole content, and is
made and put in place by one process at a time. One that is stale, damaged or of another version is
never used: the plan is made again. Where the folder cannot be written to, each rank makes its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.config import DataConfig
from data_shards.manifest import Manifest
from data_shards.plan import PLAN_FORMAT, Batches, Plan, Tables

log = logging.getLogger(__name__)

FOLDER = "plans"
# Plans of smaller corpora are made in less than a second.
FEWEST_PAIRS = 1_000_000
# Files kept in a folder, the last used; a plan of another seed or other lanes is another file.
_MOST_FILES = 8
# Bump when the layout of the file changes.
_FILE_FORMAT = 1

_CHECKSUM_BYTES = 32
_ALIGNMENT = 64
_ARRAYS = ("window_position", "lane_window", "window_batch")


class _UnusableError(Exception):
    """Why a file is not taken."""


def open_plan(
    manifest: Manifest, config: DataConfig, seed: int, *, fewest_pairs: int = FEWEST_PAIRS
) -> Plan:
    """The plan of a prepared corpus, as ``Plan.of`` makes it, from a file where that is worth it.

    Raises:
        DataError: see ``Plan``.
    """
    if manifest.num_pairs < fewest_pairs:
        return Plan.of(manifest, config, seed)
    key = _key(manifest, config, seed)
    path = manifest.folder / FOLDER / f"{key[:16]}.plan"
    try:
        return _plan(manifest, config, seed, _read(path, key))
    except _UnusableError as error:
        log.info("%s: %s; making the plan", path, error)
    with _one_at_a_time(path.parent) as may_write:
        if may_write:
            with suppress(_UnusableError):  # another process has made it meanwhile
                return _plan(manifest, config, seed, _read(path, key))
            for draft in path.parent.glob("*.part"):  # of a rank that was killed
                draft.unlink(missing_ok=True)
        plan = Plan.of(manifest, config, seed)
        if may_write:
            try:
                _write(path, key, plan.tables)
                _prune(path.parent)
            except OSError as error:
                log.info("%s: not kept: %s", path, error.strerror or error)
    return plan


def _plan(manifest: Manifest, config: DataConfig, seed: int, tables: Tables) -> Plan:
    return Plan(
        manifest.lengths,
        manifest.blocks["num_pairs"],
        lanes=config.lanes,
        tokens_per_step=config.tokens_per_step,
        window_pairs=config.window_pairs,
        seed=seed,
        tables=tables,
    )


def _key(manifest: Manifest, config: DataConfig, seed: int) -> str:
    """A hash of all that a plan follows from. The manifest has checked its arrays."""
    index = manifest.data.index
    parts = (
        _FILE_FORMAT, PLAN_FORMAT, index.lengths.sha256, index.blocks.sha256, config.lanes,
        config.tokens_per_step, config.window_pairs, seed,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _named_arrays(tables: Tables) -> dict[str, NDArray[Any]]:
    arrays = {name: getattr(tables, name) for name in _ARRAYS}
    return arrays | {f.name: getattr(tables.batches, f.name) for f in fields(Batches)}


def _write(path: Path, key: str, tables: Tables) -> None:
    """Checksum; a line of JSON that says what follows; the arrays, aligned."""
    arrays, places, offset = _named_arrays(tables), {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, len(array), offset]
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    head = {"key": key, "longest": tables.longest, "digest": tables.digest, "arrays": places}
    line = json.dumps(head).encode()
    line += b" " * (-(_CHECKSUM_BYTES + len(line) + 1) % _ALIGNMENT) + b"\n"
    parts = [line]
    for array in arrays.values():
        parts += [array.tobytes(), bytes(-array.nbytes % _ALIGNMENT)]
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.writelines([checksum.digest(), *parts])
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path, key: str) -> Tables:
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _UnusableError("not there") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _UnusableError(f"cannot be read: {error}") from None
    view = memoryview(content)
    if hashlib.sha256(view[_CHECKSUM_BYTES:]).digest() != view[:_CHECKSUM_BYTES]:
        raise _UnusableError("damaged")
    end = content.find(b"\n", _CHECKSUM_BYTES) + 1
    head = json.loads(view[_CHECKSUM_BYTES:end].tobytes())
    if head["key"] != key:
        raise _UnusableError("of another corpus or other settings")
    arrays = {
        name: np.frombuffer(view, dtype, num, end + offset)
        for name, (dtype, num, offset) in head["arrays"].items()
    }
    batches = Batches(**{f.name: arrays[f.name] for f in fields(Batches)})
    with suppress(OSError):  # a folder that is only read
        os.utime(path)
    return Tables(
        longest=head["longest"],
        digest=head["digest"],
        **{name: arrays[name] for name in _ARRAYS},
        batches=batches,
    )


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[bool]:
    """Wait for others that make a plan here; False where nobody can write."""
    try:
        folder.mkdir(exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        log.info("%s: plans are not kept: %s", folder, error.strerror or error)
        yield False
        return
    with file:
        with suppress(OSError):  # a file system without locks: each makes it, one's remains
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True  # closing the file gives the lock back


def _prune(folder: Path) -> None:
    """Forget the plans that were not used for longest; who has one mapped keeps it."""
    files = sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[_MOST_FILES:]:
        path.unlink(missing_ok=True)

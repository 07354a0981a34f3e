"""Saving a checkpoint while training goes on: one a rank, each with one background thread.

``begin`` copies this rank's part of the state into host memory, which is all that training waits
for. The thread then writes, hashes and publishes the part and leaves a receipt. Rank 0 waits for
all receipts, puts ``model.safetensors`` together and writes state, manifest and COMMIT, in this
order, each on the disk before the next is begun: a process or a machine that dies at any moment
leaves a whole checkpoint or a remainder without COMMIT.

The ranks share nothing but the storage: no collective is entered here, so a rank that dies or hangs
cannot block another one's thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.manifest import file_sha256
from trainer.checkpoint import COMMIT, MANIFEST, STATE, WEIGHTS, Checkpoints
from trainer.engine import Engine, Fragment
from trainer.parts import (
    ITEM_BYTES,
    MOMENTS,
    WEIGHT,
    bytes_of,
    header,
    in_pieces,
    key_of,
    offsets,
    read_in_pieces,
)
from trainer.storage import FileWriter, StorageError

log = logging.getLogger(__name__)

# How often rank 0 looks for the other ranks' receipts: a look at a folder costs nothing, a request
# to a remote storage is paid for. Most often they are there soon after rank 0's own.
_FIRST_POLL_S = 0.01
_POLL_S = 0.05
_POLL_REMOTE_S = 1.0

# What the names of a rank's files begin with.
_WEIGHTS_PART = "weights"  # transient: rank 0 puts model.safetensors together from them
_MOMENTS_PART = "optimizer"
_RECEIPT = "receipt"  # transient: size and sha256 of this rank's parts, which are there


@dataclass(frozen=True)
class Saved:
    """How a save ended.

    ``bytes``: of the whole checkpoint (rank 0) or of this rank's part. ``seconds``: from ``begin``
    to the commit (rank 0) or until the part was published. ``error``: None if all went well.
    """

    step: int
    bytes: int
    seconds: float
    error: str | None


class _AbandonedError(Exception):
    """The save was given up from outside."""


@dataclass(frozen=True)
class _Piece:
    """Elements ``[start, start + length)`` of a parameter, at ``offset`` of each host buffer."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class _Source:
    """Where the bytes of some elements of a parameter's weights can be read."""

    name: str
    start: int
    length: int
    read: Callable[[], Iterator[bytes | memoryview]]


@dataclass
class _Job:
    """One save of this rank."""

    step: int
    tag: str
    state: dict[str, Any]
    best: int | None
    shapes: dict[str, tuple[int, ...]]
    pieces: list[_Piece]
    began: float
    abandoned: threading.Event = field(default_factory=threading.Event)
    drafts: list[Path] = field(default_factory=list)
    owns_folder: bool = False  # no other save's commit is in the folder

    def check(self) -> None:
        if self.abandoned.is_set():
            raise _AbandonedError

    def fragments(self) -> list[tuple[str, int, int]]:
        """As receipts and the manifest hold them: name, start, length."""
        return [(piece.name, piece.start, piece.length) for piece in self.pieces]


class Saver:
    """Saves one rank's part of each checkpoint; rank 0 also puts the whole together.

    Every rank must begin the same saves, and a new one only when no rank is ``busy``.

    Args:
        checkpoints: where to; rank 0 has called ``begin_attempt(token)``.
        engine: whose state is saved.
        rank, world_size: this process' place.
        token: 8 hex digits of this attempt, the same on all ranks, another one in each attempt.
        keep: how many checkpoints retention keeps (the best besides).
        staging: local folder for drafts (``recovery.staging``); see ``Checkpoints.staging``.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        *,
        rank: int,
        world_size: int,
        token: str,
        keep: int,
        staging: Path | None,
    ) -> None:
        self._checkpoints, self._engine = checkpoints, engine
        self._storage = checkpoints.storage
        self._rank, self._world_size = rank, world_size
        self._token, self._keep = token, keep
        self._staging = checkpoints.staging(staging)
        self._buffers: dict[str, Tensor] = {}
        self._num_saves = 0
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        with suppress(OSError):  # if it cannot be read, the first save says so
            for file in self._staging.iterdir():
                if token not in file.name:  # of an attempt that is over
                    file.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: dict[str, Any], *, step: int, best: int | None) -> float:
        """Copy this rank's part of the state and save it in the background.

        Args:
            state: what ``state.json`` shall hold; the optimizer's scalars are added here.
            step: updates made.
            best: the step of the best checkpoint, possibly this one; retention keeps it.

        Returns:
            Seconds that the copying took: training may go on.
        """
        assert not self.busy, "a save is still under way"
        began = time.monotonic()
        self._num_saves += 1
        self._saved = None
        self._job = _Job(
            step=step,
            # Also differs from save to save: what a failed one left is never taken for this one's.
            tag=f"{self._token}.{self._num_saves}",
            state={
                **state,
                "world_size": self._world_size,
                "optimizer": self._engine.scalars(),
            },
            best=best,
            shapes=self._engine.shapes(),
            pieces=self._copy(self._engine.fragments()),
            began=began,
        )
        self._thread = threading.Thread(
            target=self._save, args=(self._job,), name="babelray-save", daemon=True
        )
        self._thread.start()
        return time.monotonic() - began

    def finished(self) -> Saved | None:
        """The save that has ended since the last call."""
        if self.busy:
            return None
        saved, self._saved = self._saved, None
        return saved

    def abandon(self) -> None:
        """Give up the save under way, because another rank failed: it will not be committed."""
        if self._job is not None:
            self._job.abandoned.set()

    def close(self) -> None:
        """Give up the save under way; waits for nothing."""
        self.abandon()

    def _copy(self, fragments: Sequence[Fragment]) -> list[_Piece]:
        """Copy the state into host buffers, one a kind, which are kept from save to save."""
        pieces, total = [], 0
        for fragment in fragments:
            length = fragment.tensors[WEIGHT].numel()
            pieces.append(_Piece(fragment.name, fragment.start, length, total))
            total += length
        on_device = False
        for kind in (WEIGHT, *MOMENTS):
            buffer = self._buffers.get(kind)
            if buffer is None or buffer.numel() != total:
                # Pinned memory lets a GPU copy at the bus' speed.
                pinned = any(fragment.tensors[kind].is_cuda for fragment in fragments)
                buffer = torch.empty(total, dtype=torch.float32, pin_memory=pinned)
                self._buffers[kind] = buffer
            for piece, fragment in zip(pieces, fragments, strict=True):
                tensor = fragment.tensors[kind]
                target = buffer[piece.offset : piece.offset + piece.length]
                target.copy_(tensor.detach(), non_blocking=True)
                on_device = on_device or tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return pieces

    def _save(self, job: _Job) -> None:
        """The background thread."""
        num_bytes, error = 0, None
        try:
            num_bytes = self._save_first(job) if self._rank == 0 else self._save_other(job)
        except _AbandonedError:
            error = f"the checkpoint of step {job.step} was given up: another rank could not save"
        except (StorageError, OSError) as problem:
            error = f"the checkpoint of step {job.step} could not be saved: {problem}"
        except Exception as problem:  # a bug must end the save, not go unseen in a dead thread
            log.exception("saving the checkpoint of step %d", job.step)
            error = f"the checkpoint of step {job.step} could not be saved: {problem!r}"
        if error is not None:
            self._discard(job)
        for draft in job.drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        self._saved = Saved(job.step, num_bytes, time.monotonic() - job.began, error)

    def _save_other(self, job: _Job) -> int:
        """Publish this rank's parts and a receipt for them; returns their bytes."""
        weights = self._publish(job, _WEIGHTS_PART, (WEIGHT,))
        moments = self._publish(job, _MOMENTS_PART, MOMENTS)
        receipt = {"weights": weights, "moments": moments, "fragments": job.fragments()}
        name = self._name(job, _RECEIPT, self._rank)
        self._storage.write(self._path(job, name), json.dumps(receipt).encode())
        return int(weights["bytes"]) + int(moments["bytes"])

    def _save_first(self, job: _Job) -> int:
        """Publish rank 0's part, put the checkpoint together, commit it; returns its bytes."""
        self._check_attempt()
        self._checkpoints.clean(job.tag, step=job.step)
        receipts = [
            {
                "moments": self._publish(job, _MOMENTS_PART, MOMENTS),
                "fragments": job.fragments(),
            },
            *self._receipts(job),
        ]
        num_bytes = self._present(job)
        if num_bytes is None:
            job.owns_folder = True
            num_bytes = self._commit(job, receipts)
        try:
            self._tidy(job)
        except StorageError as error:
            log.warning("after the checkpoint of step %d was committed: %s", job.step, error)
        return num_bytes

    def _receipts(self, job: _Job) -> list[dict[str, Any]]:
        """What the other ranks have published, by rank; waits for all of them."""
        names = [self._name(job, _RECEIPT, rank) for rank in range(1, self._world_size)]
        folder = self._checkpoints.folder(job.step)
        longest_s = _POLL_S if self._storage.folder is not None else _POLL_REMOTE_S
        poll_s = _FIRST_POLL_S
        while names and not set(names) <= set(self._storage.names(folder)):
            job.abandoned.wait(poll_s)
            job.check()
            poll_s = min(2 * poll_s, longest_s)
        return [json.loads(self._storage.read(self._path(job, name))) for name in names]

    def _present(self, job: _Job) -> int | None:
        """The bytes of the checkpoint of this very step that is there already, if it verifies.

        So it is after a resume from an earlier one, when the newest could not be read for a while.
        It is left alone: the step decides the data, so it holds what would be written again, and
        at no moment is there less than there was. One that does not verify, or is of another
        history, counts no longer from here on.
        """
        if job.step not in self._checkpoints.committed():
            return None
        found = self._checkpoints.problems(job.step)
        if not found:
            with self._checkpoints.open(job.step) as reader:
                fields = ("step", "data_hash", "settings")
                found = [
                    f"its {name} is another"
                    for name in fields
                    if reader.state.get(name) != job.state.get(name)
                ]
        where = self._checkpoints.where(job.step)
        if not found:
            log.info("%s is there already and verifies", where)
            return _total_bytes(self._checkpoints.manifest(job.step)["files"])
        log.warning("%s is written anew: %s", where, "; ".join(found))
        self._check_attempt()
        self._checkpoints.uncommit(job.step)
        return None

    def _commit(self, job: _Job, receipts: list[dict[str, Any]]) -> int:
        """Publish what no single rank has, and the commit last; returns the checkpoint's bytes."""
        files: dict[str, dict[str, Any]] = {}
        for rank, receipt in enumerate(receipts):
            name = self._name(job, _MOMENTS_PART, rank)
            files[name] = {**receipt["moments"], "fragments": receipt["fragments"]}
        with ExitStack() as stack:
            sources = self._sources(job, receipts, stack)
            files[WEIGHTS] = self._write(job, WEIGHTS, job.shapes, _in_order(job.shapes, sources))
        state = _json(job.state)
        self._storage.write(self._path(job, STATE), state)
        files[STATE] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        manifest = _json({"step": job.step, "files": files})
        self._storage.write(self._path(job, MANIFEST), manifest)
        for name, entry in files.items():
            found = self._storage.size(self._path(job, name))
            if found != entry["bytes"]:
                raise StorageError(
                    f"{self._storage.where(self._path(job, name))} has {found} bytes after "
                    f"{entry['bytes']} were written: check that the storage is there and works"
                )
        self._check_attempt()
        job.check()
        self._storage.write(
            self._path(job, COMMIT), f"{hashlib.sha256(manifest).hexdigest()}\n".encode()
        )
        return _total_bytes(files)

    def _sources(
        self, job: _Job, receipts: list[dict[str, Any]], stack: ExitStack
    ) -> list[_Source]:
        """Every rank's fragments of the weights: rank 0's in memory, the others' in their parts."""
        mine = bytes_of(self._buffers[WEIGHT])
        sources = [
            _Source(
                piece.name,
                piece.start,
                piece.length,
                partial(
                    in_pieces,
                    mine[piece.offset * ITEM_BYTES : (piece.offset + piece.length) * ITEM_BYTES],
                ),
            )
            for piece in job.pieces
        ]
        for rank, receipt in enumerate(receipts[1:], start=1):
            name = self._path(job, self._name(job, _WEIGHTS_PART, rank))
            file = self._storage.fetch(name, self._staging)
            if self._storage.folder is None:
                job.drafts.append(file)
            job.check()
            try:
                # What is put together from it gets a sha256 of its own: damage would go unseen.
                if file_sha256(file) != receipt["weights"]["sha256"]:
                    raise OSError(errno.EIO, "differs from what was written (sha256)", str(file))
                stream = stack.enter_context(file.open("rb", buffering=0))
                where = offsets(stream)
            except OSError as error:
                raise StorageError.of("read", file, error) from error
            for parameter, start, length in receipt["fragments"]:
                begin, end = where[key_of(WEIGHT, parameter, start)]
                read = partial(read_in_pieces, stream, begin, end)
                sources.append(_Source(parameter, start, length, read))
        return sources

    def _tidy(self, job: _Job) -> None:
        """After the commit: note the best; remove what was only needed on the way, and the old."""
        best = job.best
        if best is not None and best in self._checkpoints.committed() and best != self._best():
            self._checkpoints.set_best(best, job.state.get("best_nll"))
        self._checkpoints.clean(None)
        self._checkpoints.retain(keep=self._keep, best=job.best)

    def _best(self) -> int | None:
        try:
            return self._checkpoints.best()
        except StorageError:
            return None  # and is written anew

    def _publish(self, job: _Job, part: str, kinds: tuple[str, ...]) -> dict[str, Any]:
        """Write this rank's fragments of some kinds as one file; its size and sha256."""
        shapes: dict[str, tuple[int, ...]] = {
            key_of(kind, piece.name, piece.start): (piece.length,)
            for kind in kinds
            for piece in job.pieces
        }
        data = (piece for kind in kinds for piece in in_pieces(bytes_of(self._buffers[kind])))
        return self._write(job, self._name(job, part, self._rank), shapes, data)

    def _write(
        self,
        job: _Job,
        name: str,
        shapes: dict[str, tuple[int, ...]],
        data: Iterable[bytes | memoryview],
    ) -> dict[str, Any]:
        """Write tensors to a local draft and publish it under its name; its size and sha256."""
        draft = self._staging / (name if job.tag in name else f"{name}.{job.tag}")
        job.drafts.append(draft)
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            with FileWriter(draft) as writer:
                writer.write(header(shapes))
                for piece in data:
                    job.check()
                    writer.write(piece)
        except OSError as error:
            raise StorageError.of("write", draft, error) from error
        self._storage.put(draft, self._path(job, name))
        return {"bytes": writer.num_bytes, "sha256": writer.sha256}

    def _discard(self, job: _Job) -> None:
        """Remove what a failed save has published.

        Each rank removes its own parts; rank 0 also those of ranks that have come to their end,
        never of one that may still be writing.
        """
        folder = self._checkpoints.folder(job.step)
        try:
            ranks = [self._rank]
            if self._rank == 0:
                if job.owns_folder and self._checkpoints.is_attempt(self._token):
                    for name in (COMMIT, MANIFEST, STATE, WEIGHTS):
                        self._storage.remove(f"{folder}/{name}")
                present = set(self._storage.names(folder))
                others = range(1, self._world_size)
                ranks += [rank for rank in others if self._name(job, _RECEIPT, rank) in present]
            for rank in ranks:
                for part in (_RECEIPT, _WEIGHTS_PART, _MOMENTS_PART):
                    self._storage.remove(self._path(job, self._name(job, part, rank)))
        except StorageError as error:
            log.warning("what is left of the checkpoint of step %d stays: %s", job.step, error)

    def _check_attempt(self) -> None:
        """Only the newest attempt may touch what ranks share: an older one may live on unseen."""
        if not self._checkpoints.is_attempt(self._token):
            raise StorageError(
                f"a newer attempt of this run has begun ({self._checkpoints.home}): "
                "this one may not save any more. End it"
            )

    def _name(self, job: _Job, part: str, rank: int) -> str:
        suffix = "json" if part == _RECEIPT else "safetensors"
        return f"{part}-{job.tag}-{rank:05d}-of-{self._world_size:05d}.{suffix}"

    def _path(self, job: _Job, name: str) -> str:
        return f"{self._checkpoints.folder(job.step)}/{name}"


def _in_order(
    shapes: dict[str, tuple[int, ...]], sources: Iterable[_Source]
) -> Iterator[bytes | memoryview]:
    """The bytes of all parameters, each from its fragments, which must cover it exactly once."""
    by_name: dict[str, list[_Source]] = {name: [] for name in shapes}
    for source in sources:
        by_name[source.name].append(source)
    for name, shape in shapes.items():
        position = 0
        for source in sorted(by_name[name], key=lambda source: source.start):
            assert source.start == position, f"{name}: a gap or an overlap at element {position}"
            yield from source.read()
            position += source.length
        assert position == math.prod(shape), f"{name}: the ranks hold {position} of {shape}"


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _total_bytes(files: dict[str, dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files.values())

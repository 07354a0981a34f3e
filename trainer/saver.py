"""Saving a checkpoint while training goes on: one a rank, each with one background thread.

``begin`` copies this rank's part of the state into host memory, which is all that training waits
for. The thread then writes, hashes and publishes the part and leaves a receipt; rank 0's waits for
all receipts and commits (``trainer.commit``).

The ranks share nothing but the storage: no collective is entered here, so a rank that dies or hangs
cannot block another one's thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import Checkpoints
from trainer.commit import Commit
from trainer.engine import Engine, Fragment
from trainer.parts import WEIGHT, bytes_of, in_pieces, key_of
from trainer.publication import (
    MOMENTS_PART,
    RECEIPT,
    WEIGHTS_PART,
    AbandonedError,
    Piece,
    Publication,
)
from trainer.storage import StorageError

log = logging.getLogger(__name__)


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
        self._rank, self._world_size = rank, world_size
        self._token, self._keep = token, keep
        self._staging = checkpoints.staging(staging)
        self._buffers = _host_buffers(engine)
        self._moments = tuple(kind for kind in engine.kinds if kind != WEIGHT)
        self._num_saves = 0
        self._has_told = False  # a receipt, of the save under way
        self._publication: Publication | None = None
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
        self._saved = None
        self._num_saves += 1
        self._has_told = False
        self._publication = publication = Publication(
            self._checkpoints,
            self._staging,
            step=step,
            # Also differs from save to save: what a failed one left is never taken for this one's.
            tag=f"{self._token}.{self._num_saves}",
            rank=self._rank,
            world_size=self._world_size,
        )
        pieces = self._copy(self._engine.fragments())
        save: Callable[[], int]
        discard: Callable[[], None]
        if self._rank == 0:
            commit = Commit(
                publication,
                token=self._token,
                state={
                    **state,
                    "world_size": self._world_size,
                    "optimizer": self._engine.scalars(),
                },
                shapes=self._engine.shapes(),
            )
            save = partial(self._save_first, publication, pieces, commit, best)
            discard = commit.discard
        else:
            save = partial(self._save_other, publication, pieces)
            discard = partial(self._discard_other, publication)
        self._thread = threading.Thread(
            target=self._run,
            args=(publication, began, save, discard),
            name="babelray-save",
            daemon=True,
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
        if self._publication is not None:
            self._publication.abandoned.set()

    def close(self) -> None:
        """Give up the save under way; waits for nothing."""
        self.abandon()

    def _copy(self, fragments: Sequence[Fragment]) -> list[Piece]:
        """Copy the state into the host buffers."""
        pieces, total = [], 0
        for fragment in fragments:
            length = fragment.tensors[WEIGHT].numel()
            pieces.append(Piece(fragment.name, fragment.start, length, total))
            total += length
        on_device = False
        for kind, buffer in self._buffers.items():
            assert buffer.numel() == total, "the engine's share has changed"
            for piece, fragment in zip(pieces, fragments, strict=True):
                tensor = fragment.tensors[kind]
                target = buffer[piece.offset : piece.offset + piece.length]
                target.copy_(tensor.detach(), non_blocking=True)
                on_device = on_device or tensor.is_cuda
        if on_device:
            torch.cuda.synchronize()
        return pieces

    def _run(
        self,
        publication: Publication,
        began: float,
        save: Callable[[], int],
        discard: Callable[[], None],
    ) -> None:
        """The background thread: a save, and what becomes of its failure."""
        num_bytes, error = 0, None
        what = f"the checkpoint of step {publication.step}"
        try:
            num_bytes = save()
        except AbandonedError:
            error = f"{what} was given up: another rank could not save"
        except (StorageError, OSError) as problem:
            error = f"{what} could not be saved: {problem}"
        except Exception as problem:  # a bug must end the save, not go unseen in a dead thread
            log.exception("saving %s", what)
            error = f"{what} could not be saved: {problem!r}"
        if error is not None:
            try:
                discard()
            except StorageError as problem:
                log.warning("what is left of %s stays until the next save: %s", what, problem)
        publication.remove_drafts()
        self._saved = Saved(publication.step, num_bytes, time.monotonic() - began, error)

    def _save_other(self, publication: Publication, pieces: list[Piece]) -> int:
        """Publish this rank's parts and a receipt for them; returns their bytes."""
        weights = self._put(publication, WEIGHTS_PART, (WEIGHT,), pieces)
        moments = self._put(publication, MOMENTS_PART, self._moments, pieces)
        receipt = {
            "weights": weights,
            "moments": moments,
            "fragments": [(piece.name, piece.start, piece.length) for piece in pieces],
        }
        name = publication.path(publication.name(RECEIPT, self._rank))
        self._has_told = True
        publication.storage.write(name, json.dumps(receipt).encode())
        return int(weights["bytes"]) + int(moments["bytes"])

    def _discard_other(self, publication: Publication) -> None:
        """Remove what this rank has published, unless rank 0 may have committed it by now."""
        if not self._has_told:
            publication.remove_parts([self._rank])

    def _save_first(
        self, publication: Publication, pieces: list[Piece], commit: Commit, best: int | None
    ) -> int:
        """Publish rank 0's part and commit; returns the checkpoint's bytes."""
        commit.prepare()
        moments = self._put(publication, MOMENTS_PART, self._moments, pieces)
        num_bytes = commit.complete(moments, pieces, bytes_of(self._buffers[WEIGHT]))
        try:
            commit.tidy(keep=self._keep, best=best)
        except StorageError as error:
            # The checkpoint stands; the next save tries again.
            log.warning("step %d is committed, but: %s", publication.step, error)
        return num_bytes

    def _put(
        self, publication: Publication, part: str, kinds: tuple[str, ...], pieces: list[Piece]
    ) -> dict[str, Any]:
        """Publish this rank's fragments of some kinds as one file; its size and sha256."""
        shapes: dict[str, tuple[int, ...]] = {
            key_of(kind, piece.name, piece.start): (piece.length,)
            for kind in kinds
            for piece in pieces
        }
        data = (some for kind in kinds for some in in_pieces(bytes_of(self._buffers[kind])))
        return publication.put(publication.name(part, self._rank), shapes, data)


def _host_buffers(engine: Engine) -> dict[str, Tensor]:
    """Memory for a copy of this rank's share, by kind; kept from save to save.

    It is taken, and touched, before training begins: the first save then takes no longer than the
    others, and a machine with too little memory shows it at once. Pinned memory lets a GPU copy at
    the bus' speed.
    """
    fragments = engine.fragments()
    total = sum(fragment.tensors[WEIGHT].numel() for fragment in fragments)
    pinned = any(fragment.tensors[WEIGHT].is_cuda for fragment in fragments)
    return {
        kind: torch.empty(total, dtype=torch.float32, pin_memory=pinned).fill_(0.0)
        for kind in engine.kinds
    }

"""One rank's side of one save: what its files are called, and how they come into the storage."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import Checkpoints
from trainer.parts import header
from trainer.storage import FileWriter, StorageError

# What the names of a rank's files begin with.
WEIGHTS_PART = "weights"  # transient: rank 0 puts model.safetensors together from them
MOMENTS_PART = "optimizer"
RECEIPT = "receipt"  # transient: size and sha256 of this rank's parts, which are there


class AbandonedError(Exception):
    """The save was given up from outside."""


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, start + length)`` of a parameter, at ``offset`` of each host buffer."""

    name: str
    start: int
    length: int
    offset: int


class Publication:
    """The files of one save that this rank writes.

    Every name carries the save's ``tag``, so that what a dead or a failed save left is told from
    what is being written. Files that are one for all ranks have the tag in their drafts only.

    Args:
        tag: attempt and number of the save.
        staging: local folder for drafts.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        staging: Path,
        *,
        step: int,
        tag: str,
        rank: int,
        world_size: int,
    ) -> None:
        self.checkpoints, self.storage = checkpoints, checkpoints.storage
        self.staging = staging
        self.step, self.tag = step, tag
        self.rank, self.world_size = rank, world_size
        self.abandoned = threading.Event()
        self.drafts: list[Path] = []

    def check(self) -> None:
        """Raises ``AbandonedError`` if the save was given up."""
        if self.abandoned.is_set():
            raise AbandonedError

    def name(self, part: str, rank: int) -> str:
        """A rank's file in the checkpoint's folder."""
        suffix = "json" if part == RECEIPT else "safetensors"
        return f"{part}-{self.tag}-{rank:05d}-of-{self.world_size:05d}.{suffix}"

    def path(self, name: str) -> str:
        """A file of the checkpoint's folder, as the storage calls it."""
        return f"{self.checkpoints.folder(self.step)}/{name}"

    def put(
        self,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        data: Iterable[bytes | memoryview],
    ) -> dict[str, Any]:
        """Write tensors to a local draft and publish it under its name.

        Args:
            shapes: the tensors, in the order in which their bytes come.

        Returns:
            The file's ``bytes`` and ``sha256``.

        Raises:
            AbandonedError: the save was given up meanwhile.
            StorageError: the draft cannot be written, or not be published.
        """
        draft = self.staging / (name if self.tag in name else f"{name}.{self.tag}")
        self.drafts.append(draft)
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            with FileWriter(draft) as writer:
                writer.write(header(shapes))
                for piece in data:
                    self.check()
                    writer.write(piece)
        except OSError as error:
            raise StorageError.of("write", draft, error) from error
        self.storage.put(draft, self.path(name))
        return {"bytes": writer.num_bytes, "sha256": writer.sha256}

    def remove_parts(self, ranks: Iterable[int]) -> None:
        """Remove what these ranks have published, their receipts first."""
        for rank in ranks:
            for part in (RECEIPT, WEIGHTS_PART, MOMENTS_PART):
                self.storage.remove(self.path(self.name(part, rank)))

    def remove_drafts(self) -> None:
        """Remove the local drafts that are left."""
        for draft in self.drafts:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

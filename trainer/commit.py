"""Rank 0's side of a save: from all ranks' parts to a checkpoint that counts.

Each file is on the disk before the next is begun, and COMMIT is the last: a process or a machine
that dies at any moment leaves a whole checkpoint or a remainder without COMMIT.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_shards.manifest import file_sha256
from trainer.checkpoint import COMMIT, MANIFEST, STATE
from trainer.parts import ITEM_BYTES, WEIGHT, WEIGHTS, in_pieces, key_of, offsets, read_in_pieces
from trainer.publication import MOMENTS_PART, RECEIPT, WEIGHTS_PART, Piece, Publication
from trainer.storage import StorageError

log = logging.getLogger(__name__)

# How often rank 0 looks for the other ranks' receipts: a look at a folder costs nothing, a request
# to a remote storage is paid for. Most often they are there soon after rank 0's own.
_FIRST_POLL_S = 0.01
_POLL_S = 0.05
_POLL_REMOTE_S = 1.0


@dataclass(frozen=True)
class _Source:
    """Where the bytes of some elements of a parameter's weights can be read."""

    name: str
    start: int
    length: int
    read: Callable[[], Iterator[bytes | memoryview]]


class Commit:
    """Puts the parts of one save together and commits it.

    Args:
        publication: rank 0's.
        token: this attempt's; only the newest may touch what ranks share.
        state: what ``state.json`` shall hold.
        shapes: all parameters, whole, in the module's order.
    """

    def __init__(
        self,
        publication: Publication,
        *,
        token: str,
        state: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self._publication, self._token = publication, token
        self._checkpoints, self._storage = publication.checkpoints, publication.storage
        self._step = publication.step
        self._state, self._shapes = _json(state), shapes
        self._owns_folder = False  # no other save's commit is in it

    def prepare(self) -> None:
        """Clear away what dead and failed saves left."""
        self._check_attempt()
        self._checkpoints.clean(self._publication.tag, step=self._step)

    def complete(self, moments: dict[str, Any], pieces: list[Piece], weights: memoryview) -> int:
        """Wait for the other ranks, put everything together, commit.

        Args:
            moments: size and sha256 of rank 0's part.
            pieces: rank 0's fragments; ``weights`` are their bytes, by ``Piece.offset``.

        Returns:
            The checkpoint's bytes.

        Raises:
            AbandonedError: another rank could not write its part.
            StorageError: a disk or a storage failed, or a newer attempt has begun.
        """
        fragments = [(piece.name, piece.start, piece.length) for piece in pieces]
        receipts = [{"moments": moments, "fragments": fragments}, *self._receipts()]
        present = self._present()
        if present is not None:
            return present
        self._owns_folder = True
        files: dict[str, dict[str, Any]] = {}
        for rank, receipt in enumerate(receipts):
            name = self._publication.name(MOMENTS_PART, rank)
            files[name] = {**receipt["moments"], "fragments": receipt["fragments"]}
        with ExitStack() as stack:
            sources = _own(pieces, weights)
            for rank, receipt in enumerate(receipts[1:], start=1):
                sources += self._sources(rank, receipt, stack)
            data = _in_order(self._shapes, sources)
            files[WEIGHTS] = self._publication.put(WEIGHTS, self._shapes, data)
        self._write(STATE, self._state)
        files[STATE] = {"bytes": len(self._state), "sha256": _sha256(self._state)}
        manifest = _json({"step": self._step, "files": files})
        self._write(MANIFEST, manifest)
        self._check_sizes(files)
        self._check_attempt()
        self._publication.check()
        self._write(COMMIT, f"{_sha256(manifest)}\n".encode())
        return _total_bytes(files)

    def tidy(self, *, keep: int, best: int | None) -> None:
        """After the commit: note the best; remove what was needed on the way only, and the old."""
        if not self._checkpoints.is_attempt(self._token):
            return  # what lies there is a newer attempt's by now
        if best is not None and best in self._checkpoints.committed() and best != self._best():
            best_nll = json.loads(self._state).get("best_nll")
            self._checkpoints.set_best(best, valid_nll=best_nll)
        self._checkpoints.clean(None)
        self._checkpoints.retain(keep=keep, best=best)

    def discard(self) -> None:
        """Remove what this failed save has published.

        Of other ranks' parts only those that are there to the end, with their receipts: a rank
        that may still be writing removes its own.
        """
        if self._owns_folder and self._checkpoints.is_attempt(self._token):
            for name in (COMMIT, MANIFEST, STATE, WEIGHTS):
                self._storage.remove(self._publication.path(name))
        present = set(self._storage.names(self._checkpoints.folder(self._step)))
        others = range(1, self._publication.world_size)
        ended = [rank for rank in others if self._publication.name(RECEIPT, rank) in present]
        self._publication.remove_parts([0, *ended])

    def _receipts(self) -> list[dict[str, Any]]:
        """What the other ranks have published, by rank; waits for all of them."""
        others = range(1, self._publication.world_size)
        names = [self._publication.name(RECEIPT, rank) for rank in others]
        folder = self._checkpoints.folder(self._step)
        longest_s = _POLL_S if self._storage.folder is not None else _POLL_REMOTE_S
        poll_s = _FIRST_POLL_S
        while names and not set(names) <= set(self._storage.names(folder)):
            self._publication.abandoned.wait(poll_s)
            self._publication.check()
            poll_s = min(2 * poll_s, longest_s)
        return [json.loads(self._storage.read(self._publication.path(name))) for name in names]

    def _present(self) -> int | None:
        """The bytes of the checkpoint of this very step that is there already, if it verifies.

        So it is after a resume from an earlier one, when the newest could not be read for a while.
        It is left alone: the step decides the data, so it holds what would be written again, and
        at no moment is there less than there was. One that does not verify, or is of another
        history, counts no longer from here on.
        """
        step = self._step
        if step not in self._checkpoints.committed():
            return None
        found = self._checkpoints.problems(step)
        if not found:
            state = json.loads(self._state)
            with self._checkpoints.open(step) as reader:
                found = [
                    f"its {name} is another"
                    for name in ("step", "data_hash", "settings", "guard")
                    if reader.state.get(name) != state.get(name)
                ]
        where = self._checkpoints.where(step)
        if not found:
            log.info("%s is there already and verifies", where)
            return _total_bytes(self._checkpoints.manifest(step)["files"])
        log.warning("%s is written anew: %s", where, "; ".join(found))
        self._check_attempt()
        self._checkpoints.uncommit(step)
        return None

    def _sources(self, rank: int, receipt: dict[str, Any], stack: ExitStack) -> list[_Source]:
        """Another rank's fragments of the weights, in its part, which stays open in ``stack``."""
        name = self._publication.name(WEIGHTS_PART, rank)
        file = self._storage.fetch(self._publication.path(name), self._publication.staging)
        if self._storage.folder is None:
            self._publication.drafts.append(file)
        self._publication.check()
        try:
            # What is put together from it gets a sha256 of its own: damage would go unseen.
            if file_sha256(file) != receipt["weights"]["sha256"]:
                raise OSError(errno.EIO, "differs from what was written (sha256)", str(file))
            stream = stack.enter_context(file.open("rb", buffering=0))
            where = offsets(stream)
        except OSError as error:
            raise StorageError.of("read", file, error) from error
        return [
            _Source(
                parameter,
                start,
                length,
                partial(read_in_pieces, stream, *where[key_of(WEIGHT, parameter, start)]),
            )
            for parameter, start, length in receipt["fragments"]
        ]

    def _check_sizes(self, files: dict[str, dict[str, Any]]) -> None:
        for name, entry in files.items():
            path = self._publication.path(name)
            found = self._storage.size(path)
            if found != entry["bytes"]:
                raise StorageError(
                    f"{self._storage.where(path)} has {found} bytes after {entry['bytes']} were "
                    "written: check that the storage is there and works"
                )

    def _check_attempt(self) -> None:
        """An older attempt may live on unseen, cut off by a network, say."""
        if not self._checkpoints.is_attempt(self._token):
            raise StorageError(
                f"a newer attempt of this run has begun ({self._checkpoints.home}): "
                "this one may not save any more. End it"
            )

    def _best(self) -> int | None:
        try:
            return self._checkpoints.best()
        except StorageError:
            return None  # and is written anew

    def _write(self, name: str, content: bytes) -> None:
        self._storage.write(self._publication.path(name), content)


def _own(pieces: list[Piece], weights: memoryview) -> list[_Source]:
    """Rank 0's own fragments, from memory."""
    return [
        _Source(
            piece.name,
            piece.start,
            piece.length,
            partial(
                in_pieces,
                weights[piece.offset * ITEM_BYTES : (piece.offset + piece.length) * ITEM_BYTES],
            ),
        )
        for piece in pieces
    ]


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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _total_bytes(files: dict[str, dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files.values())

"""Blocks out of shards: read by byte range, checked, decoded by WebDataset."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import autodecode
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_shards.blocks import Block, block_key
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.store import CopyId, ShardStore, copy_id

log = logging.getLogger(__name__)

# What a network file system answers while its server is away; the next attempt may succeed.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
_WAITS_S = (0.1, 1.0, 5.0)

_MEMBERS = ("source.npy", "target.npy", "lengths.npy")
# Only these: a decoder without a list would unpickle what a foreign file calls itself.
_decode_members = autodecode.Decoder([], only=_MEMBERS)


class _BadBlockError(Exception):
    """What was expected and what was found in its place, and in which file."""

    def __init__(self, message: str, copy: CopyId | None = None) -> None:
        super().__init__(message)
        self.copy = copy


class BlockReader:
    """Reads blocks of a prepared corpus; each is compared with what the index says of it."""

    def __init__(self, manifest: Manifest, store: ShardStore) -> None:
        self._manifest = manifest
        self._store = store

    def ensure(self, blocks: Iterable[int]) -> None:
        """Have the blocks' shards on this machine, fetched several at a time if they are remote."""
        self._store.ensure({int(self._manifest.blocks["shard"][block]) for block in blocks})

    def fetch_ahead(self, blocks: Iterable[int], pool: ThreadPoolExecutor) -> None:
        """Have the blocks' shards fetched that come whole and are not here, one task each.

        What goes wrong is met again, and told, by whoever reads a block.
        """
        for shard in sorted({int(self._manifest.blocks["shard"][block]) for block in blocks}):
            if self._store.is_missing(shard) and not self._store.in_parts(shard):
                pool.submit(self._store.path, shard)

    def read(self, block: int) -> Block:
        """Read, check and decode one block.

        Raises:
            DataError: its shard is missing, cut short or altered.
        """
        row = self._manifest.blocks[block]
        shard = int(row["shard"])
        try:
            return self._read(block, row)
        except _BadBlockError as error:
            if not self._store.is_remote(shard):
                raise self._error(block, shard, str(error)) from None
            log.warning("%s: cached copy is damaged (%s)", self._store.name(shard), error)
            self._store.discard(shard, error.copy)
        try:
            return self._read(block, row)
        except _BadBlockError as error:
            raise self._error(block, shard, str(error)) from None

    def _read(self, block: int, row: Any) -> Block:
        offset, num_bytes = int(row["offset"]), int(row["bytes"])
        expected, shard = row["sha256"].decode(), int(row["shard"])
        data, copy = None, None
        if self._store.in_parts(shard):
            data = self._store.read_part(shard, offset, num_bytes, expected)
        if data is None:
            data, copy = self._read_local(self._store.path(shard), offset, num_bytes)
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            raise _BadBlockError(f"expected sha256 {expected}, found {found}", copy)
        return self._checked(block, row, _decode(data))

    def _read_local(self, path: Path, offset: int, num_bytes: int) -> tuple[bytes, CopyId]:
        try:
            data, copy = self._read_range(path, offset, num_bytes)
        except FileNotFoundError:
            raise _BadBlockError("the file is missing") from None
        except OSError as error:
            raise _BadBlockError(
                f"cannot be read: {error.strerror or error}", _copy(path)
            ) from None
        if len(data) != num_bytes:
            end = offset + num_bytes
            found = (
                f"the file ends at byte {offset + len(data)}" if data else "the file ends before"
            )
            raise _BadBlockError(f"expected bytes {offset} to {end}, {found}", copy)
        return data, copy

    def _checked(self, block: int, row: Any, decoded: Block) -> Block:
        """The block, if it is what the index says."""
        if decoded.key != block_key(block):
            raise _BadBlockError(f"expected key {block_key(block)}, found {decoded.key}")
        first, num = int(row["first_pair"]), int(row["num_pairs"])
        if not np.array_equal(decoded.lengths, self._manifest.lengths[first : first + num]):
            raise _BadBlockError("expected the index's sentence lengths, found others")
        found_sizes = decoded.source_ids.size, decoded.target_ids.size
        expected_sizes = tuple(decoded.lengths.sum(axis=0, dtype=np.int64).tolist())
        if found_sizes != expected_sizes:
            raise _BadBlockError(f"expected {expected_sizes} ids a side, found {found_sizes}")
        return decoded

    def _read_range(self, path: Path, offset: int, num_bytes: int) -> tuple[bytes, CopyId]:
        """The file's bytes, and which file it was; tries again after errors of transport."""
        for wait_s in (*_WAITS_S, None):
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    return file.read(num_bytes), copy_id(os.fstat(file.fileno()))
            except OSError as error:
                if wait_s is None or error.errno not in _TRANSIENT:
                    raise
                log.warning("%s: %s; trying again in %g s", path, error.strerror, wait_s)
                self._store.wait(wait_s)
        raise AssertionError("unreachable")

    def _error(self, block: int, shard: int, problem: str) -> DataError:
        if self._store.is_remote(shard):
            where = f"shard {self._store.name(shard)}, block {block}"
            return DataError(f"{where}: {problem}. {self._store.remedy(shard)}")
        folder = self._manifest.folder
        return DataError(
            f"shard {self._store.name(shard)}, block {block}: {problem}. List all that is wrong "
            f"with `babelray data verify {folder}`; then restore the file from its copy, or "
            f"remove {folder} and run `babelray data prepare` again"
        )


def _copy(path: Path) -> CopyId | None:
    try:
        return copy_id(path.stat())
    except OSError:
        return None


def _decode(data: bytes) -> Block:
    """Decode the tar members of one block."""
    try:
        files = tar_file_expander([{"url": "", "stream": io.BytesIO(data)}])
        samples = [_decode_members(sample) for sample in group_by_keys(files)]
    except (tarfile.TarError, autodecode.DecodingError, ValueError, EOFError) as error:
        raise _BadBlockError(f"expected a WebDataset sample, found {error!r}") from None
    if len(samples) != 1 or not all(member in samples[0] for member in _MEMBERS):
        found = [sorted(name for name in sample if name[:2] != "__") for sample in samples]
        raise _BadBlockError(f"expected one sample of {sorted(_MEMBERS)}, found {found}")
    sample = samples[0]
    return Block(sample["__key__"], *(sample[member] for member in _MEMBERS))

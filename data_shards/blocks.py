"""Blocks of encoded pairs, their shards and their index: written in a stream, in fixed memory.

A block is a WebDataset sample: three ``.npy`` members that share a key. Blocks are laid into the
tar byte by byte here, because the index records where each begins and what it hashes to: a reader
can then fetch one block by a range request and check it. Times, owners and modes are constant, so
the same corpus gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.manifest import BLOCK_DTYPE, LENGTH_DTYPE, FileEntry, ShardEntry, file_sha256

_MEMBERS = ("source.npy", "target.npy", "lengths.npy")


@dataclass(frozen=True)
class Block:
    """A decoded block.

    Attributes:
        key: name of the sample, the block's number in nine digits.
        source_ids: ids of all source sentences, end signs included, one after another.
        target_ids: the same of the target side.
        lengths: uint16 ``[num_pairs, 2]``, which cuts the two into sentences.
    """

    key: str
    source_ids: npt.NDArray[np.unsignedinteger[Any]]
    target_ids: npt.NDArray[np.unsignedinteger[Any]]
    lengths: npt.NDArray[np.uint16]


def block_key(index: int) -> str:
    """Name of the sample that holds block ``index``."""
    return f"{index:09d}"


def id_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def encode_block(block: Block) -> bytes:
    """The block as the tar members it is stored as (no end-of-archive mark)."""
    parts = []
    arrays = (block.source_ids, block.target_ids, block.lengths)
    for member, array in zip(_MEMBERS, arrays, strict=True):
        content = io.BytesIO()
        np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
        data = content.getvalue()
        header = tarfile.TarInfo(f"{block.key}.{member}")
        header.size = len(data)
        parts += [header.tobuf(format=tarfile.USTAR_FORMAT), data, bytes(-len(data) % 512)]
    return b"".join(parts)


def decode_block(content: bytes) -> Block:
    """Read what :func:`encode_block` wrote.

    Raises:
        ValueError: the bytes are not one block.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"member {member.name} is not a file")
                keys.add(key)
                # From memory: NumPy would take a tar member for a file it can map.
                arrays[name] = np.load(io.BytesIO(file.read()), allow_pickle=False)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not a tar: {error}") from None
    if len(keys) != 1 or sorted(arrays) != sorted(_MEMBERS):
        raise ValueError(f"expected the members {_MEMBERS} of one key, found {sorted(arrays)}")
    return Block(keys.pop(), *(arrays[name] for name in _MEMBERS))


class ArrayWriter:
    """A ``.npy`` file that grows row by row; its header is known, and written, at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...] = ()) -> None:
        self._path = path
        self._rows = path.with_suffix(".rows")
        self._file = self._rows.open("wb")
        self._dtype = dtype
        self._row_shape = row_shape
        self._num_rows = 0

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Write rows of the array's type and row shape."""
        assert rows.dtype == self._dtype
        assert rows.shape[1:] == self._row_shape
        self._file.write(rows.tobytes())
        self._num_rows += len(rows)

    def close(self) -> None:
        """Put the header before the rows."""
        self._file.close()
        with self._path.open("wb") as file, self._rows.open("rb") as rows:
            header = {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._num_rows, *self._row_shape),
            }
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file, 1 << 20)
            sync(file)
        self._rows.unlink()


class ShardWriter:
    """Cuts a stream of encoded pairs into blocks, blocks into shards, and indexes both.

    Attributes:
        num_pairs: pairs written.
        num_tokens: source and target ids written, end signs included.
        shards: the finished shards.
    """

    def __init__(
        self, folder: Path, *, vocabulary_size: int, block_pairs: int, shard_pairs: int
    ) -> None:
        self._folder = folder
        self._dtype = id_dtype(vocabulary_size)
        self._block_pairs = block_pairs
        self._shard_pairs = shard_pairs
        (folder / "shards").mkdir()
        self._lengths = ArrayWriter(folder / "lengths.npy", LENGTH_DTYPE, (2,))
        self._blocks = ArrayWriter(folder / "blocks.npy", BLOCK_DTYPE)
        self._pending: list[tuple[list[int], list[int]]] = []
        self._shard: _OpenShard | None = None
        self._num_blocks = 0
        self.num_pairs = 0
        self.num_tokens = [0, 0]
        self.shards: list[ShardEntry] = []

    def add(self, source_ids: list[int], target_ids: list[int]) -> None:
        """Take the next pair; both sides with their end sign."""
        self._pending.append((source_ids, target_ids))
        if len(self._pending) == self._block_pairs:
            self._write_block()

    def close(self) -> None:
        """Write what is left and the index."""
        if self._pending:
            self._write_block()
        self._finish_shard()
        self._lengths.close()
        self._blocks.close()

    def _write_block(self) -> None:
        sources, targets = zip(*self._pending, strict=True)
        self._pending = []
        lengths = np.array([[len(s), len(t)] for s, t in zip(sources, targets, strict=True)])
        block = Block(
            block_key(self._num_blocks),
            self._concatenate(sources),
            self._concatenate(targets),
            lengths.astype(LENGTH_DTYPE),
        )
        content = encode_block(block)
        if self._shard is None:
            self._shard = _OpenShard(self._folder, len(self.shards))
        row = np.zeros(1, dtype=BLOCK_DTYPE)
        row["shard"] = len(self.shards)
        row["offset"] = self._shard.num_bytes
        row["bytes"] = len(content)
        row["first_pair"] = self.num_pairs
        row["num_pairs"] = len(lengths)
        row["sha256"] = hashlib.sha256(content).hexdigest().encode()
        self._shard.write_block(content, len(lengths))
        self._blocks.append(row)
        self._lengths.append(block.lengths)
        self._num_blocks += 1
        self.num_pairs += len(lengths)
        self.num_tokens[0] += block.source_ids.size
        self.num_tokens[1] += block.target_ids.size
        if self._shard.num_pairs >= self._shard_pairs:
            self._finish_shard()

    def _concatenate(self, sentences: Sequence[list[int]]) -> npt.NDArray[Any]:
        return np.array([piece for ids in sentences for piece in ids], dtype=self._dtype)

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.close())
            self._shard = None


class _OpenShard:
    """The tar being written."""

    def __init__(self, folder: Path, index: int) -> None:
        self._name = f"shards/train-{index:06d}.tar"
        self._file = (folder / self._name).open("wb")
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.num_blocks = 0
        self.num_pairs = 0

    def write_block(self, content: bytes, num_pairs: int) -> None:
        self._write(content)
        self.num_blocks += 1
        self.num_pairs += num_pairs

    def close(self) -> ShardEntry:
        # Two empty records end an archive; whole records of 10,240 bytes are customary.
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        sync(self._file)
        self._file.close()
        return ShardEntry(
            file=self._name,
            bytes=self.num_bytes,
            sha256=self._hash.hexdigest(),
            num_blocks=self.num_blocks,
            num_pairs=self.num_pairs,
        )

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.num_bytes += len(content)


def describe_file(folder: Path, name: str) -> FileEntry:
    """A file of the folder, as the manifest records it."""
    path = folder / name
    return FileEntry(file=name, bytes=path.stat().st_size, sha256=file_sha256(path))


def sync(file: io.BufferedWriter | io.TextIOWrapper) -> None:
    """Have the file's content on the disk, so that a manifest never outlives what it describes."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Have a closed file, or a folder's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

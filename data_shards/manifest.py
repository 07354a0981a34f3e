"""A prepared corpus as it lies on disk: ``manifest.json``, its index arrays and its texts.

Everything that reads a prepared corpus begins with :meth:`Manifest.load`. It is cheap (the arrays
are memory-mapped) and it refuses a folder that is missing, unfinished, of another format or whose
index was altered, so that later stages may trust what they see. The shards themselves are checked
where they are read, and all at once by ``babelray data verify``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_shards.config import DATA_FORMAT
from data_shards.errors import DataError

MANIFEST_NAME = "manifest.json"
LENGTHS_NAME = "lengths.npy"
BLOCKS_NAME = "blocks.npy"
VOCABULARY_NAME = "vocabulary.model"

SplitName = Literal["valid", "test"]

# One row of blocks.npy. ``offset`` and ``bytes`` are the range of the shard's tar file that holds
# exactly the block's members (headers and padding included); ``sha256`` is that range's, in hex:
# a raw digest in a NumPy bytes field would lose its trailing zero bytes.
BLOCK_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("first_pair", "<u8"),
        ("num_pairs", "<u4"),
        ("sha256", "S64"),
    ]
)
# One row of lengths.npy: source and target length of a pair in pieces, end sign included.
LENGTH_DTYPE = np.dtype("<u2")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """A file of the prepared folder, by its path relative to the folder."""

    file: str
    bytes: int = Field(ge=0)
    sha256: str


class VocabularyEntry(FileEntry):
    """The SentencePiece model and how many pieces it has."""

    size: int = Field(ge=4)


class ShardEntry(FileEntry):
    """One WebDataset tar."""

    num_blocks: int = Field(ge=1)
    num_pairs: int = Field(ge=1)


class SplitEntry(_Entry):
    """The two raw texts of a held-out set."""

    source: FileEntry
    target: FileEntry
    num_pairs: int = Field(ge=1)


class IndexEntry(_Entry):
    """The arrays that let any rank compute any batch without reading a shard."""

    lengths: FileEntry
    blocks: FileEntry


class RawFile(_Entry):
    """A file the corpus was made from: a name of the catalogue, or the path the user gave."""

    file: str
    bytes: int
    sha256: str


class ManifestData(_Entry):
    """What ``manifest.json`` holds."""

    format: int
    fingerprint: str
    corpus: str
    source_language: str
    target_language: str
    licence: str
    settings: dict[str, Any] = Field(description="the configuration values behind the fingerprint")
    sentencepiece: str = Field(description="version that learnt the vocabulary")
    raw_files: tuple[RawFile, ...]
    vocabulary: VocabularyEntry
    num_pairs: int = Field(ge=1)
    source_tokens: int
    target_tokens: int
    filters: dict[str, int] = Field(description="pairs dropped by reason, and 'read' and 'kept'")
    shards: tuple[ShardEntry, ...]
    splits: dict[SplitName, SplitEntry]
    index: IndexEntry


@dataclass(frozen=True)
class Manifest:
    """A finished prepared folder, checked and opened.

    Attributes:
        folder: where it lies.
        data: the content of ``manifest.json``.
        sha256: of the bytes of ``manifest.json``: the identity of the data, in hex.
        lengths: uint16 ``[num_pairs, 2]``, source and target length with the end sign.
        blocks: structured array of :data:`BLOCK_DTYPE`, in order of writing.
        shards_url: where the folder's shards lie instead of in it, if they do.
    """

    folder: Path
    data: ManifestData
    sha256: str
    lengths: npt.NDArray[np.uint16]
    blocks: npt.NDArray[np.void]
    shards_url: str | None = None

    @classmethod
    def load(cls, folder: Path | str, shards_url: str | None = None) -> Manifest:
        """Open the prepared corpus in ``folder``, its shards perhaps elsewhere.

        Raises:
            DataError: nothing was prepared there, or what is there is of another format, cut
                short or altered.
        """
        folder = Path(folder)
        data, digest = read_manifest(folder)
        lengths = _read_index(folder, data.index.lengths)
        blocks = _read_index(folder, data.index.blocks)
        if lengths.dtype != LENGTH_DTYPE or lengths.shape != (data.num_pairs, 2):
            raise _contradiction(folder, data.index.lengths.file)
        if (
            blocks.dtype != BLOCK_DTYPE
            or blocks.ndim != 1
            or len(blocks) != sum(shard.num_blocks for shard in data.shards)
            or int(blocks["num_pairs"].sum(dtype=np.int64)) != data.num_pairs
        ):
            raise _contradiction(folder, data.index.blocks.file)
        return cls(folder, data, digest, lengths, blocks, shards_url)

    @property
    def num_pairs(self) -> int:
        """Pairs of the training set."""
        return self.data.num_pairs

    @property
    def source_language(self) -> str:
        """Language code, or a name taken from the file where the user gave files."""
        return self.data.source_language

    @property
    def target_language(self) -> str:
        """Language code, or a name taken from the file where the user gave files."""
        return self.data.target_language

    @property
    def vocabulary_path(self) -> Path:
        """The SentencePiece model."""
        return self.folder / self.data.vocabulary.file

    @property
    def vocabulary_size(self) -> int:
        """Pieces of the vocabulary, the special ones included."""
        return self.data.vocabulary.size

    def shard_path(self, shard: int) -> str:
        """Path or URL of the tar that ``blocks["shard"]`` numbers."""
        if self.shards_url is not None:
            return f"{self.shards_url.rstrip('/')}/{self.data.shards[shard].file}"
        return str(self.folder / self.data.shards[shard].file)

    def split_text(self, split: SplitName) -> tuple[list[str], list[str]]:
        """Source and target sentences of a held-out set, raw.

        Raises:
            DataError: a file is missing, cut short or altered.
        """
        entry = self.data.splits[split]
        source, target = (_read_lines(self.folder, side) for side in (entry.source, entry.target))
        return source, target


def read_manifest(folder: Path) -> tuple[ManifestData, str]:
    """Read and check ``manifest.json`` alone; returns it and the sha256 of its bytes.

    Raises:
        DataError: it is missing, of another format or unreadable.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"no prepared corpus at {folder} ({MANIFEST_NAME} is not there): run "
            "`babelray data prepare` with the same configuration, or correct data.dir"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        data_format = _Format.model_validate_json(content).format
        if data_format != DATA_FORMAT:
            raise DataError(
                f"{path} is of format {data_format}; this version reads format {DATA_FORMAT}. "
                f"Prepare the corpus again: remove {folder} and run `babelray data prepare`"
            )
        data = ManifestData.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        detail = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise DataError(f"{path} is not a readable manifest ({detail}). {_again(folder)}") from None
    return data, hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The file's sha256 in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file of the folder: missing, cut short or altered; None if nothing."""
    path = folder / entry.file
    try:
        actual_bytes = path.stat().st_size
        if actual_bytes != entry.bytes:
            return f"{path}: expected {entry.bytes} bytes, found {actual_bytes}"
        actual = file_sha256(path)
    except FileNotFoundError:
        return f"{path}: missing (expected {entry.bytes} bytes)"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    if actual != entry.sha256:
        return f"{path}: expected sha256 {entry.sha256}, found {actual}"
    return None


class _Format(BaseModel):
    """Just enough to tell which version wrote the file, whatever else it holds."""

    model_config = ConfigDict(extra="ignore")
    format: int


def _again(folder: Path) -> str:
    return f"Copy it again, or remove {folder} and run `babelray data prepare`"


def _contradiction(folder: Path, name: str) -> DataError:
    return DataError(f"{folder / name} does not fit {MANIFEST_NAME} beside it. {_again(folder)}")


def _read_index(folder: Path, entry: FileEntry) -> npt.NDArray[Any]:
    problem = check_file(folder, entry)
    if problem is not None:
        raise DataError(f"{problem}. {_again(folder)}")
    try:
        array: npt.NDArray[Any] = np.load(folder / entry.file, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise _contradiction(folder, entry.file) from None
    return array


def _read_lines(folder: Path, entry: FileEntry) -> list[str]:
    problem = check_file(folder, entry)
    if problem is not None:
        raise DataError(f"{problem}. {_again(folder)}")
    # newline="\n": a stray carriage return inside a sentence must not split it.
    with (folder / entry.file).open(encoding="utf-8", newline="\n") as file:
        return [line.removesuffix("\n") for line in file]

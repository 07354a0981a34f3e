"""Look at a prepared folder again: is it what was written, and what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from data_shards.blocks import block_key, decode_block
from data_shards.config import EOS_ID, UNK_ID, check_shards_url
from data_shards.errors import DataError
from data_shards.manifest import MANIFEST_NAME, FileEntry, Manifest, check_file
from data_shards.vocabulary import Vocabulary

PERCENTILES = (50, 90, 99, 100)
_ROWS_TOGETHER = 1 << 20


def verify(folder: Path | str, shards_url: str | None = None) -> list[str]:
    """Compare every file, block and length with what was recorded when it was written.

    Args:
        folder: the prepared corpus.
        shards_url: where its shards lie instead of in it. Each is fetched, looked at and dropped.

    Returns:
        One line for each problem: the file (and block), what was expected, what was found and the
        mend. Nothing wrong gives an empty list.

    Raises:
        DataError: there can be no shards at such an address.
    """
    folder = Path(folder)
    try:
        shards_url = shards_url and check_shards_url(shards_url)
    except ValueError as error:
        raise DataError(f"--shards-url: {error}") from None
    try:
        manifest = Manifest.load(folder, shards_url)
    except DataError as error:
        return [str(error)]
    mend = f"Copy it again from where it was prepared, or remove {folder} and prepare it again"
    files: list[FileEntry] = [manifest.data.vocabulary]
    for split in manifest.data.splits.values():
        files += [split.source, split.target]
    problems = [problem for file in files if (problem := check_file(folder, file)) is not None]
    problems = [f"{problem}. {mend}" for problem in problems]
    shards = manifest.data.shards
    if shards_url is not None:
        return problems + list(_verify_there(manifest))
    if len(shards) > 1 and not any((folder / shard.file).exists() for shard in shards):
        return [
            *problems,
            f"{folder}: none of the {len(shards)} shards is there. If they lie elsewhere "
            f"(data.shards_url), give --shards-url, too. {mend}",
        ]
    for number, shard in enumerate(shards):
        problem = check_file(folder, shard)
        if problem is not None and "sha256" not in problem:
            problems.append(f"{problem}. {mend}")
            continue
        name = str(folder / shard.file)
        found = list(_block_problems(manifest, number, name, folder / shard.file))
        # Bytes outside all blocks were altered, then: say at least that the file is not the same.
        found = found or ([] if problem is None else [problem])
        problems += [f"{problem}. {mend}" for problem in found]
    return problems


def _verify_there(manifest: Manifest) -> Iterator[str]:
    """Problems of the shards at the manifest's URL, one of which is kept at a time."""
    from data_shards.store import ShardStore  # brings WebDataset, which is slow to import

    with TemporaryDirectory(prefix="babelray-verify-") as cache:
        store = ShardStore(manifest, Path(cache), attempts=2, backoff_s=0.2)
        for number in range(len(manifest.data.shards)):
            try:
                path = store.path(number)  # whose sha256 has been checked
            except DataError as error:
                yield str(error)
                continue
            for problem in _block_problems(manifest, number, store.name(number), path):
                yield f"{problem}. {store.remedy(number)}"
            path.unlink()


def _block_problems(manifest: Manifest, shard: int, name: str, path: Path) -> Iterator[str]:
    first_block = sum(before.num_blocks for before in manifest.data.shards[:shard])
    rows = manifest.blocks[first_block : first_block + manifest.data.shards[shard].num_blocks]
    with path.open("rb") as file:
        for index, row in enumerate(rows, start=first_block):
            wrong = _block_problem(manifest, file, shard, index, row)
            if wrong is not None:
                yield f"{name}, block {index}: {wrong}"


def _block_problem(
    manifest: Manifest, file: Any, shard: int, index: int, row: np.void
) -> str | None:
    """What is wrong with a block's bytes, name or lengths."""
    if row["shard"] != shard:
        return f"the index puts it into shard {row['shard']}, the manifest into {shard}"
    file.seek(int(row["offset"]))
    content = file.read(int(row["bytes"]))
    expected, actual = row["sha256"].decode(), hashlib.sha256(content).hexdigest()
    if actual != expected:
        return f"expected sha256 {expected}, found {actual}"
    try:
        block = decode_block(content)
    except ValueError as error:
        return f"cannot be read: {error}"
    if block.key != block_key(index):
        return f"expected key {block_key(index)}, found {block.key}"
    first = int(row["first_pair"])
    lengths = manifest.lengths[first : first + int(row["num_pairs"])]
    if not np.array_equal(block.lengths, lengths):
        return "its lengths differ from the index"
    for side, ids in enumerate((block.source_ids, block.target_ids)):
        ends = np.cumsum(block.lengths[:, side], dtype=np.int64)
        if ids.size != ends[-1] or not np.all(ids[ends - 1] == EOS_ID):
            return "its sentences do not end where its lengths say"
        if int(ids.max()) >= manifest.vocabulary_size:
            return f"holds id {int(ids.max())}, beyond the vocabulary of {manifest.vocabulary_size}"
    return None


@dataclass(frozen=True)
class SplitStatistics:
    """A held-out set, cut into pieces by the corpus' vocabulary.

    Attributes:
        num_pairs: sentences a side.
        num_tokens: source and target pieces, end signs included.
        unknown_rate: share of pieces that are the unknown one, source and target.
    """

    num_pairs: int
    num_tokens: tuple[int, int]
    unknown_rate: tuple[float, float]


@dataclass(frozen=True)
class Statistics:
    """What a prepared corpus holds.

    Attributes:
        filters: pairs by what became of them; ``read`` and ``kept`` among them.
        length_percentiles: source and target length (with the end sign) at
            :data:`PERCENTILES`, as ``{percent: (source, target)}``.
        num_bytes: all files of the folder that the manifest names.
    """

    corpus: str
    source_language: str
    target_language: str
    licence: str
    num_pairs: int
    source_tokens: int
    target_tokens: int
    filters: dict[str, int]
    length_percentiles: dict[int, tuple[int, int]]
    vocabulary_size: int
    splits: dict[str, SplitStatistics]
    num_shards: int
    num_blocks: int
    num_bytes: int


def statistics(folder: Path | str) -> Statistics:
    """Count what the prepared corpus in ``folder`` holds.

    Raises:
        DataError: it is missing or damaged.
    """
    manifest = Manifest.load(folder)
    data = manifest.data
    vocabulary = Vocabulary.load(manifest.vocabulary_path)
    files: list[FileEntry] = [data.vocabulary, data.index.lengths, data.index.blocks, *data.shards]
    for split in data.splits.values():
        files += [split.source, split.target]
    manifest_bytes = (manifest.folder / MANIFEST_NAME).stat().st_size
    return Statistics(
        corpus=data.corpus,
        source_language=data.source_language,
        target_language=data.target_language,
        licence=data.licence,
        num_pairs=data.num_pairs,
        source_tokens=data.source_tokens,
        target_tokens=data.target_tokens,
        filters=dict(data.filters),
        length_percentiles=_percentiles(manifest.lengths),
        vocabulary_size=data.vocabulary.size,
        splits={
            name: _split_statistics(manifest.split_text(name), vocabulary) for name in data.splits
        },
        num_shards=len(data.shards),
        num_blocks=len(manifest.blocks),
        num_bytes=manifest_bytes + sum(file.bytes for file in files),
    )


def format_statistics(stats: Statistics) -> str:
    """The statistics as a person reads them, a few lines."""
    average = [tokens / stats.num_pairs for tokens in (stats.source_tokens, stats.target_tokens)]
    dropped = [
        f"{count:,} {reason.replace('_', ' ')}"
        for reason, count in stats.filters.items()
        if reason not in ("read", "kept") and count
    ]
    lines = [
        f"corpus       {stats.corpus}, {stats.source_language} to {stats.target_language} "
        f"({stats.licence})",
        f"training     {stats.num_pairs:,} pairs of {stats.filters['read']:,} read; dropped: "
        f"{', '.join(dropped) or 'none'}",
        f"tokens       {stats.source_tokens:,} source, {stats.target_tokens:,} target; "
        f"{average[0]:.1f} and {average[1]:.1f} a sentence (end sign included)",
        "lengths      "
        + "; ".join(
            f"{'longest' if percent == 100 else f'{percent} %'}: {source} and {target}"
            for percent, (source, target) in stats.length_percentiles.items()
        ),
        f"vocabulary   {stats.vocabulary_size:,} pieces, shared",
    ]
    for name, split in stats.splits.items():
        lines.append(
            f"{name:<12} {split.num_pairs:,} pairs, {split.num_tokens[0]:,} and "
            f"{split.num_tokens[1]:,} tokens; unknown pieces {split.unknown_rate[0]:.3%} source, "
            f"{split.unknown_rate[1]:.3%} target"
        )
    lines.append(
        f"on disk      {stats.num_bytes:,} bytes, {stats.num_shards} shards, "
        f"{stats.num_blocks:,} blocks"
    )
    return "\n".join(lines)


def _percentiles(lengths: npt.NDArray[np.uint16]) -> dict[int, tuple[int, int]]:
    """The smallest length that at least so many per cent of sentences do not exceed."""
    # Counting by length, in pieces of the mapped array, keeps a large corpus out of memory.
    histogram = np.zeros((2, 1 << 16), dtype=np.int64)
    for start in range(0, len(lengths), _ROWS_TOGETHER):
        rows = lengths[start : start + _ROWS_TOGETHER]
        for side in (0, 1):
            histogram[side] += np.bincount(rows[:, side], minlength=1 << 16)
    cumulative = histogram.cumsum(axis=1)
    result = {}
    for percent in PERCENTILES:
        # Whole numbers: percent * n / 100 in floating point may fall just above an integer.
        wanted = -(-percent * len(lengths) // 100)
        source, target = (int(np.searchsorted(cumulative[side], wanted)) for side in (0, 1))
        result[percent] = (source, target)
    return result


def _split_statistics(text: tuple[list[str], list[str]], vocabulary: Vocabulary) -> SplitStatistics:
    tokens, unknown = [], []
    for lines in text:
        encoded = vocabulary.encode(lines)
        num_pieces = sum(len(ids) for ids in encoded)
        num_unknown = sum(ids.count(UNK_ID) for ids in encoded)
        tokens.append(num_pieces + len(lines))
        unknown.append(num_unknown / max(1, num_pieces))
    return SplitStatistics(len(text[0]), (tokens[0], tokens[1]), (unknown[0], unknown[1]))

"""From text to a prepared folder: ``prepare``. What ``babelray data`` does beside it: ``audit``.

Three passes, each a stream, so that memory does not grow with the corpus (learning the vocabulary
holds its sample, ``data.vocabulary_sample`` sentences):

1. clean the raw pairs into a spool file, and note each pair's digest;
2. learn the vocabulary from a sample of the spool that leaves out duplicates and held-out pairs;
3. encode the spool and write blocks, shards and index.

Everything happens in a hidden folder beside the final one, which takes its place in one rename: a
prepared folder is finished or is not there. Meanwhile the disk holds the cleaned text once more and
25 bytes a pair to find duplicates with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from data_shards import vocabulary
from data_shards.audit import Statistics, format_statistics, statistics, verify
from data_shards.blocks import ShardWriter, describe_file, sync, sync_path
from data_shards.clean import FILTERS
from data_shards.config import DATA_FORMAT, EOS_ID, DataConfig
from data_shards.corpora import SPLITS, open_corpus
from data_shards.errors import DataError
from data_shards.manifest import (
    BLOCKS_NAME,
    LENGTHS_NAME,
    MANIFEST_NAME,
    VOCABULARY_NAME,
    IndexEntry,
    Manifest,
    ManifestData,
    RawFile,
    SplitEntry,
    SplitName,
    VocabularyEntry,
    file_sha256,
    read_manifest,
)
from data_shards.spool import Spool, read_and_spool
from data_shards.vocabulary import Vocabulary

__all__ = ["Statistics", "format_statistics", "prepare", "statistics", "verify"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

# A small corpus still gets enough blocks to be shuffled and dealt to lanes.
_MOST_BLOCK_PAIRS, _FEWEST_BLOCK_PAIRS, _ENOUGH_BLOCKS = 1024, 16, 512
_ENCODED_TOGETHER = 4096
_STALE_S = 24 * 3600


def prepare(config: DataConfig, *, progress: Progress = logger.info) -> Path:
    """Have the corpus of ``config`` prepared; returns its folder, at once if it is there already.

    Args:
        config: what to prepare and where.
        progress: told in a few lines what was done, how much and how long it took.

    Raises:
        DataError: the text, the vocabulary's size or the folder is unusable; what and the mend.
    """
    # Absolute, so that a later change of the working directory does no harm.
    folder = config.folder().absolute()
    if _already_prepared(folder, config):
        progress(f"{folder} is prepared already")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            # Another process may have prepared it while this one waited.
            if _already_prepared(folder, config):
                progress(f"{folder} is prepared already")
                return folder
            _remove_stale(folder)
            partial = folder.with_name(
                f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}"
            )
            partial.mkdir()
            try:
                _build(config, partial, progress)
                _publish(partial, folder, config)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot prepare {folder}: {error}. Check free space and permissions there, or set "
            "data.root to another folder"
        ) from error
    return folder


def _build(config: DataConfig, partial: Path, progress: Progress) -> None:
    """Write all of the prepared folder into ``partial``, the manifest last."""
    corpus = open_corpus(config, progress=progress)
    started = time.monotonic()
    work = partial / "work"
    work.mkdir()

    counts: Counter[str] = Counter(dict.fromkeys(("read", *FILTERS), 0))
    spool = read_and_spool(corpus, config, work, counts)
    splits = {split: _write_split(partial, split, spool.heldout[split]) for split in SPLITS}
    num_left = spool.num_pairs
    dropped = ", ".join(f"{counts[name]:,} {name}" for name in FILTERS if counts[name])
    progress(
        f"cleaned {counts['read']:,} pairs in {time.monotonic() - started:.1f} s: "
        f"{num_left:,} left, dropped {dropped or 'none'}"
    )
    if num_left == 0:
        raise DataError(
            f"no training pair of corpus {corpus.name} is left of {counts['read']:,} read "
            f"(dropped: {dropped or 'none'}): check the files, data.max_ratio and data.max_length"
        )

    started = time.monotonic()
    vocab = vocabulary.train(
        spool.sample(config.vocabulary_sample // 2),
        partial / VOCABULARY_NAME,
        size=config.vocabulary_size,
        kind=config.vocabulary_type,
    )
    progress(f"learnt {vocab.size:,} pieces in {time.monotonic() - started:.1f} s")

    started = time.monotonic()
    writer = ShardWriter(
        partial,
        vocabulary_size=vocab.size,
        block_pairs=config.block_pairs or _choose_block_pairs(num_left),
        shard_pairs=config.shard_pairs,
    )
    _encode(spool, vocab, config, writer, counts)
    writer.close()
    if writer.num_pairs == 0:
        raise DataError(
            f"every pair of corpus {corpus.name} is longer than data.max_length "
            f"{config.max_length} pieces: raise it"
        )
    shutil.rmtree(work)
    progress(
        f"wrote {writer.num_pairs:,} pairs ({writer.num_tokens[0]:,} source and "
        f"{writer.num_tokens[1]:,} target tokens) in {len(writer.shards)} shards in "
        f"{time.monotonic() - started:.1f} s"
    )
    sync_path(partial / VOCABULARY_NAME)
    data = ManifestData(
        format=DATA_FORMAT,
        fingerprint=config.fingerprint(),
        corpus=corpus.name,
        source_language=corpus.source_language,
        target_language=corpus.target_language,
        licence=corpus.licence,
        settings=_settings(config),
        sentencepiece=version("sentencepiece"),
        raw_files=corpus.raw_files,
        vocabulary=VocabularyEntry(
            size=vocab.size, **describe_file(partial, VOCABULARY_NAME).model_dump()
        ),
        num_pairs=writer.num_pairs,
        source_tokens=writer.num_tokens[0],
        target_tokens=writer.num_tokens[1],
        filters={**counts, "kept": writer.num_pairs},
        shards=tuple(writer.shards),
        splits=splits,
        index=IndexEntry(
            lengths=describe_file(partial, LENGTHS_NAME),
            blocks=describe_file(partial, BLOCKS_NAME),
        ),
    )
    _write_text(partial / MANIFEST_NAME, data.model_dump_json(indent=2) + "\n")
    for path in (partial / "shards", partial):
        sync_path(path)


def _encode(
    spool: Spool,
    vocab: Vocabulary,
    config: DataConfig,
    writer: ShardWriter,
    counts: Counter[str],
) -> None:
    """The third pass: encode, drop what is too long in pieces, write."""
    pairs = spool.pairs()
    while batch := list(islice(pairs, _ENCODED_TOGETHER)):
        sources = vocab.encode([source for source, _ in batch])
        targets = vocab.encode([target for _, target in batch])
        for source_ids, target_ids in zip(sources, targets, strict=True):
            # A sentence of nothing but SentencePiece's own sign for a blank has no pieces.
            if not source_ids or not target_ids:
                counts["empty"] += 1
            elif max(len(source_ids), len(target_ids)) + 1 > config.max_length:
                counts["too_long"] += 1
            else:
                writer.add([*source_ids, EOS_ID], [*target_ids, EOS_ID])


def _choose_block_pairs(num_pairs: int) -> int:
    return min(_MOST_BLOCK_PAIRS, max(_FEWEST_BLOCK_PAIRS, num_pairs // _ENOUGH_BLOCKS))


def _write_split(partial: Path, split: SplitName, pairs: list[tuple[str, str]]) -> SplitEntry:
    names = [f"{split}.{side}.txt" for side in ("source", "target")]
    for side, name in enumerate(names):
        _write_text(partial / name, "".join(f"{pair[side]}\n" for pair in pairs))
    source, target = (describe_file(partial, name) for name in names)
    return SplitEntry(source=source, target=target, num_pairs=len(pairs))


def _settings(config: DataConfig) -> dict[str, Any]:
    """What decides the content of the folder: the fields from ``corpus`` to ``shard_pairs``."""
    names = list(DataConfig.model_fields)
    chosen = set(names[: names.index("shard_pairs") + 1])
    return config.model_dump(mode="json", include=chosen)


def _already_prepared(folder: Path, config: DataConfig) -> bool:
    """Whether ``folder`` holds what ``config`` asks for.

    Raises:
        DataError: it holds something else, or is damaged, or the text has changed since.
    """
    if not folder.exists():
        return False
    if not (folder / MANIFEST_NAME).exists():
        if folder.is_dir() and not any(folder.iterdir()):
            return False
        raise DataError(
            f"{folder} exists and is not a prepared corpus: remove it, or set data.dir to a folder "
            "that does not exist"
        )
    data, _ = read_manifest(folder)
    if data.fingerprint != config.fingerprint():
        wanted = _settings(config)
        differences = [
            f"{key} (there {data.settings.get(key)!r}, asked for {wanted[key]!r})"
            for key in wanted
            if data.settings.get(key) != wanted[key]
        ]
        raise DataError(
            f"{folder} holds a corpus prepared with another configuration: "
            f"{', '.join(differences) or 'by another version'}. Set data.dir to another folder (or "
            "leave it out), or remove this one"
        )
    prepared_ns = (folder / MANIFEST_NAME).stat().st_mtime_ns
    for raw in data.raw_files if data.corpus == "files" else ():
        if _has_changed(Path(raw.file), raw, prepared_ns):
            raise DataError(
                f"{raw.file} has changed since {folder} was prepared from it: remove the folder to "
                "prepare it again, or set data.dir to another one"
            )
    Manifest.load(folder)
    return True


def _has_changed(path: Path, raw: RawFile, prepared_ns: int) -> bool:
    """Whether a text is another one than at ``prepared_ns``; hashed only if it may be.

    A text that is not there has not changed: prepared folders travel without it.
    """
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != raw.bytes:
        return True
    # The inode's time, which also a copy that keeps the old modification time moves on.
    return status.st_ctime_ns >= prepared_ns and file_sha256(path) != raw.sha256


@contextlib.contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Keep other processes of this host from preparing the same folder meanwhile.

    It saves them the work; what is correct does not hang on it (see :func:`_publish`), so where
    the file system has no locks we go on without.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            logger.debug("no file locks at %s", path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed process left: of this host at once, of another host after a day."""
    prefix = f".{folder.name}.partial-"
    for path in folder.parent.iterdir():
        if not path.name.startswith(prefix):
            continue
        host, _, pid = path.name.removeprefix(prefix).rpartition("-")
        with contextlib.suppress(OSError, ValueError):
            if host == socket.gethostname():
                stale = int(pid) == os.getpid() or not _is_alive(int(pid))
            else:
                stale = time.time() - path.stat().st_mtime > _STALE_S
            if stale:
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _publish(partial: Path, folder: Path, config: DataConfig) -> None:
    """Rename the finished folder into place, unless another host's was there first."""
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _already_prepared(folder, config)  # raises if it is not what was asked for
    sync_path(folder.parent)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        sync(file)

"""Which raw pairs are fit to train on: filters, each counted, and exact removal of duplicates.

A pair meets the filters in the order of :data:`FILTERS` and is counted under the first that drops
it, so that ``read`` is always the sum of all other counts. Memory does not grow with the corpus:
the filters look at one pair at a time, and duplicates are found on disk, bucket by bucket.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_shards.config import DataConfig

# Reasons, in the order in which they are tried. ``duplicate`` and ``held_out`` are found once the
# whole corpus was read, and ``too_long`` again once there is a vocabulary to measure with.
FILTERS = (
    "not_unicode",
    "control_characters",
    "empty",
    "length_ratio",
    "too_long",
    "duplicate",
    "held_out",
)

# No SentencePiece piece is longer, so a sentence of n characters has at least n / 16 pieces (but
# for a run of unknown characters, which becomes one piece and teaches nothing either).
LONGEST_PIECE_CHARACTERS = 16

# C0 and C1 controls but the tab, and the two Unicode line separators: none belongs in a sentence,
# and several of them are line ends to other programs.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")

DIGEST_BYTES = 16


def normalise(text: str) -> str:
    """Compose characters (NFC) and make every run of white space one blank; case is left alone.

    Training text and text to translate both pass through here. Compatibility forms (NFKC) stay as
    they are: folding them would make references unreachable for a cased BLEU.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean(
    raw_pairs: Iterable[tuple[bytes, bytes]], config: DataConfig, counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Decode, normalise and filter pairs one at a time.

    Args:
        raw_pairs: lines without their line end, of source and target.
        config: ``max_ratio`` and ``max_length`` are used.
        counts: ``read`` and the reason of every dropped pair are added to it.

    Yields:
        Normalised ``(source, target)``, free of tabs and line ends. A sentence may still prove
        too long once it is cut into pieces; only what cannot fit is dropped here.
    """
    longest = LONGEST_PIECE_CHARACTERS * config.max_length
    for raw_source, raw_target in raw_pairs:
        counts["read"] += 1
        try:
            source, target = raw_source.decode(), raw_target.decode()
        except UnicodeDecodeError:
            counts["not_unicode"] += 1
            continue
        if _CONTROL.search(source) or _CONTROL.search(target):
            counts["control_characters"] += 1
            continue
        source, target = normalise(source), normalise(target)
        shorter, longer = sorted((len(source), len(target)))
        if shorter == 0:
            counts["empty"] += 1
        elif longer > config.max_ratio * shorter:
            counts["length_ratio"] += 1
        elif longer > longest:
            counts["too_long"] += 1
        else:
            yield source, target


def pair_digest(source: str, target: str) -> bytes:
    """Sixteen bytes that name a normalised pair (neither side holds a line end)."""
    text = f"{source}\n{target}".encode()
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


class DuplicateFinder:
    """Finds repeated digests among any number, exactly, in bounded memory.

    Each digest goes with its row to one of 64 files by its first byte; equal digests meet in the
    same file, and one file at a time is sorted in memory. 36 million pairs take 864 MB of disk
    while it works and about 40 MB of memory; the answer is one byte a pair, memory-mapped.
    """

    _NUM_BUCKETS = 64
    _RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])

    def __init__(self, folder: Path) -> None:
        """Work in ``folder``, which must exist; what is written there may be removed afterwards."""
        self._folder = folder
        self._num_rows = 0
        self._buckets = [
            (folder / f"digests-{bucket:02d}").open("wb") for bucket in range(self._NUM_BUCKETS)
        ]

    def add(self, digest: bytes) -> None:
        """Take the digest of the next row."""
        record = digest + self._num_rows.to_bytes(8, "little")
        self._buckets[digest[0] % self._NUM_BUCKETS].write(record)
        self._num_rows += 1

    def finish(self) -> npt.NDArray[np.bool_]:
        """True for each row whose digest was met in an earlier row; bool ``[rows]``, on disk."""
        path = self._folder / "duplicates"
        if self._num_rows == 0:
            self.close()
            return np.zeros(0, dtype=np.bool_)
        flags = np.memmap(path, dtype=np.bool_, mode="w+", shape=(self._num_rows,))
        for bucket in self._buckets:
            bucket.close()
            records = np.fromfile(bucket.name, dtype=self._RECORD)
            Path(bucket.name).unlink()
            # By digest, then by row: the first of equals is the one kept.
            records = records[np.lexsort((records["row"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (
                records["low"][1:] == records["low"][:-1]
            )
            flags[records["row"][1:][same]] = True
        return flags

    def close(self) -> None:
        """Close the files; needed only where :meth:`finish` was not reached."""
        for bucket in self._buckets:
            bucket.close()

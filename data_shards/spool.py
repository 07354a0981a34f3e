"""The first pass over the text: clean it onto disk, and settle which pairs not to train on."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_shards.clean import DuplicateFinder, clean, normalise, pair_digest
from data_shards.config import DataConfig
from data_shards.corpora import SPLITS, Corpus
from data_shards.errors import DataError
from data_shards.manifest import SplitName

# Where a corpus brings no validation or test set, at most one pair in ten is held out.
_HELDOUT_DIVISOR = 10
_ROWS_TOGETHER = 1 << 16


@dataclass(frozen=True)
class Spool:
    """Cleaned pairs on disk, which of them not to use, and the held-out sets.

    Attributes:
        path: lines of ``source TAB target``.
        dropped: bool ``[lines]``: duplicates and pairs of the held-out sets.
        heldout: sentences of each held-out set.
    """

    path: Path
    dropped: npt.NDArray[np.bool_]
    heldout: dict[SplitName, list[tuple[str, str]]]

    @property
    def num_pairs(self) -> int:
        """Pairs to train on."""
        return int(np.count_nonzero(~self.dropped))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The pairs to train on, in the order of the corpus."""
        with self.path.open(encoding="utf-8", newline="\n") as file:
            for start in range(0, len(self.dropped), _ROWS_TOGETHER):
                dropped = self.dropped[start : start + _ROWS_TOGETHER].tolist()
                for line, drop in zip(islice(file, len(dropped)), dropped, strict=True):
                    if not drop:
                        source, _, target = line.removesuffix("\n").partition("\t")
                        yield source, target

    def sample(self, num_pairs: int) -> Iterator[str]:
        """Both sides of at most ``num_pairs`` pairs, taken at even distances."""
        num_left = self.num_pairs
        for row, pair in enumerate(self.pairs()):
            # As row runs from 0, the quotient grows by one exactly num_pairs times.
            if num_left <= num_pairs or (row + 1) * num_pairs // num_left != (
                row * num_pairs // num_left
            ):
                yield from pair


def read_and_spool(corpus: Corpus, config: DataConfig, work: Path, counts: Counter[str]) -> Spool:
    """The first pass: clean, spool, find duplicates, settle the held-out sets."""
    heldout = {split: list(read()) for split, read in corpus.heldout.items()}
    given = {
        pair_digest(normalise(source), normalise(target))
        for pairs in heldout.values()
        for source, target in pairs
    }
    missing = [split for split in SPLITS if split not in heldout]
    candidates = _SmallestDigests(len(missing) * config.heldout_pairs)
    finder = DuplicateFinder(work)
    path = work / "spool.tsv"
    try:
        with path.open("w", encoding="utf-8", newline="\n") as spool:
            num_spooled = 0
            for source, target in clean(corpus.train(), config, counts):
                digest = pair_digest(source, target)
                if digest in given:
                    # Training on a test pair would flatter every score.
                    counts["held_out"] += 1
                    continue
                spool.write(f"{source}\t{target}\n")
                finder.add(digest)
                candidates.add(digest, num_spooled, (source, target))
                num_spooled += 1
        repeated = finder.finish()
    finally:
        finder.close()
    num_distinct = num_spooled - int(np.count_nonzero(repeated))
    if config.deduplicate:
        counts["duplicate"] = num_spooled - num_distinct
    else:
        repeated[:] = False
    dropped = repeated
    if missing:
        # At most a tenth of what there is, however small the corpus.
        num_each = min(config.heldout_pairs, num_distinct // _HELDOUT_DIVISOR // len(missing))
        if num_each == 0:
            raise DataError(
                f"{num_distinct:,} different clean pairs of {counts['read']:,} read are too few to "
                f"hold some out as {' and '.join(missing)} set: give more text, or files with "
                + " and ".join(f"data.{split}_source and data.{split}_target" for split in missing)
            )
        smallest = candidates.smallest(num_each * len(missing))
        for place, split in enumerate(missing):
            chosen = smallest[place :: len(missing)]
            heldout[split] = [candidate.pair for candidate in chosen]
            for candidate in chosen:
                rows = [row for row in candidate.rows if not dropped[row]]
                counts["held_out"] += len(rows)
                dropped[rows] = True
    return Spool(path, dropped, heldout)


@dataclass(frozen=True)
class _Candidate:
    pair: tuple[str, str]
    rows: list[int]


class _SmallestDigests:
    """The pairs with the smallest digests: a choice that depends on the pairs, not their order."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._candidates: dict[bytes, _Candidate] = {}
        self._heap: list[int] = []  # negated digests: the largest one kept comes first

    def add(self, digest: bytes, row: int, pair: tuple[str, str]) -> None:
        """Offer the pair of a row."""
        known = self._candidates.get(digest)
        if known is not None:
            known.rows.append(row)
            return
        negated = -int.from_bytes(digest)
        if len(self._heap) < self._capacity:
            heapq.heappush(self._heap, negated)
        elif self._heap and negated > self._heap[0]:
            largest = -heapq.heappushpop(self._heap, negated)
            del self._candidates[largest.to_bytes(len(digest))]
        else:
            return
        self._candidates[digest] = _Candidate(pair, [row])

    def smallest(self, count: int) -> list[_Candidate]:
        """The ``count`` candidates of the smallest digests, in their order."""
        return [self._candidates[digest] for digest in sorted(self._candidates)[:count]]

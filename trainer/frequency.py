"""How often training has seen each target word, counted in the prepared corpus.

Counting reads the shards, so it is done once: the counts lie beside the corpus, with the sha256 of
its manifest, which is all that is needed to know that they still fit.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.reader import BlockReader
from data_shards.store import ShardStore
from data_shards.vocabulary import Vocabulary
from trainer.breakdown import words
from trainer.storage import write_atomically

log = logging.getLogger(__name__)

COUNTS_NAME = "target-words.json"
# Bump when words are cut otherwise.
_FORMAT = 1

# About ten seconds of counting. A larger corpus is sampled: blocks evenly spread over it.
SAMPLED_PAIRS = 200_000


@dataclass(frozen=True)
class TrainingWords:
    """``counts`` of target words in ``counted_pairs`` of the corpus' ``num_pairs``."""

    counts: dict[str, int]
    counted_pairs: int
    num_pairs: int

    @property
    def note(self) -> str:
        """What was counted, for whoever reads the numbers."""
        if self.counted_pairs == self.num_pairs:
            return f"counted in all {self.num_pairs:,} training pairs"
        return (
            f"counted in a sample of {self.counted_pairs:,} of {self.num_pairs:,} training pairs "
            "(blocks evenly spread): a word that is rare there may be less rare in all"
        )


def training_words(manifest: Manifest, *, sampled_pairs: int = SAMPLED_PAIRS) -> TrainingWords:
    """Word counts of the corpus' target side, from the file beside it or counted now.

    Raises:
        DataError: a shard cannot be read; the shards are remote, and reading a sample of them
            would mean fetching them all.
    """
    file = manifest.folder / COUNTS_NAME
    stored = _read(file, manifest, sampled_pairs)
    if stored is not None:
        return stored
    counted = _count(manifest, sampled_pairs)
    values = {
        "format": _FORMAT,
        "manifest": manifest.sha256,
        "sampled_pairs": sampled_pairs,
        "counted_pairs": counted.counted_pairs,
        "counts": counted.counts,
    }
    try:
        write_atomically(file, json.dumps(values, ensure_ascii=False))
    except OSError as error:
        log.debug("word counts are not kept: %s", error)  # a corpus may well be read-only
    return counted


def _read(file: Path, manifest: Manifest, sampled_pairs: int) -> TrainingWords | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if [values[key] for key in ("format", "manifest", "sampled_pairs")] != [
            _FORMAT, manifest.sha256, sampled_pairs,
        ]:  # fmt: skip
            return None
        return TrainingWords(values["counts"], values["counted_pairs"], manifest.num_pairs)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _count(manifest: Manifest, sampled_pairs: int) -> TrainingWords:
    store = ShardStore(manifest)
    if store.is_remote(0):
        raise DataError(f"the shards of {manifest.folder} are remote")
    reader = BlockReader(manifest, store)
    vocabulary = Vocabulary.load(manifest.vocabulary_path)
    num_blocks = len(manifest.blocks)
    share = min(1.0, sampled_pairs / manifest.num_pairs)
    chosen = np.unique(np.linspace(0, num_blocks - 1, max(1, round(share * num_blocks))).round())
    counts: Counter[str] = Counter()
    counted_pairs = 0
    for number in chosen.astype(int).tolist():
        block = reader.read(number)
        ends = np.cumsum(block.lengths[:, 1], dtype=np.int64)
        targets = np.split(block.target_ids, ends[:-1])
        for line in vocabulary.decode([ids.tolist() for ids in targets]):
            counts.update(words(line))
        counted_pairs += len(targets)
    return TrainingWords(dict(counts), counted_pairs, manifest.num_pairs)

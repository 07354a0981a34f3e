"""How long a corpus' pairs are: counted in a prepared one, or drawn after published means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_shards.archived_corpora import ARCHIVED
from data_shards.config import DataConfig
from data_shards.errors import UserError
from data_shards.manifest import MANIFEST_NAME, Manifest
from data_shards.plan import Plan
from model.cost import Work

# Of the made-up lengths, log-normal, as in benchmarks/scaling_parts.py: the spread of the source
# side, and of target over source.
_SIGMA, _RATIO_SIGMA = 0.62, 0.2
_BLOCK_PAIRS = 1024
_CHUNK_PAIRS = 1 << 18
# As many windows a lane as this are drawn, if the corpus has so many.
_FEWEST_PAIRS, _MOST_PAIRS = 1 << 19, 1 << 22


@dataclass(frozen=True)
class CorpusSize:
    """A corpus as the plan needs it.

    Attributes:
        is_prepared: counted in the prepared corpus; else reckoned from published figures.
        source: where the figures are from.
        lengths: uint16 [pairs, 2], of all pairs or of a made-up sample.
        block_num_pairs: pairs of each block of ``lengths``.
        num_pairs: of the whole corpus.
        vocab_size: pieces.
    """

    is_prepared: bool
    source: str
    lengths: NDArray[np.uint16]
    block_num_pairs: NDArray[np.int64]
    num_pairs: int
    vocab_size: int

    @property
    def scale(self) -> float:
        """The corpus over its sample."""
        return self.num_pairs / len(self.lengths)

    @cached_property
    def mean_work(self) -> Work:
        """Of one pair."""
        sums = np.zeros(5)
        # A chunk at a time: in float64 the lengths of 36 million pairs are half a gigabyte.
        for start in range(0, len(self.lengths), _CHUNK_PAIRS):
            source, target = self.lengths[start : start + _CHUNK_PAIRS].astype(np.float64).T
            sums += [
                source.sum(),
                target.sum(),
                source @ source,
                source @ target,
                target @ target,
            ]
        means = sums / len(self.lengths)
        return Work(*means.tolist())

    def plan(self, data: DataConfig, seed: int) -> Plan:
        """How the pairs are dealt into batches; of a sample, an epoch of that."""
        return Plan(
            self.lengths,
            self.block_num_pairs,
            lanes=data.lanes,
            tokens_per_step=data.tokens_per_step,
            window_pairs=data.window_pairs,
            seed=seed,
        )


def corpus_size(
    data: DataConfig,
    *,
    num_pairs: int | None = None,
    mean_source: float | None = None,
    mean_target: float | None = None,
    prepared: bool = True,
) -> CorpusSize:
    """What is known of the configured corpus: prepared, published, or given by the user.

    Args:
        num_pairs, mean_source, mean_target: the user's own figures; all three or none.
        prepared: whether to look for a prepared one.

    Raises:
        UserError: nothing is known, or the prepared corpus is damaged.
    """
    given = num_pairs, mean_source, mean_target
    if any(value is not None for value in given):
        if num_pairs is None or mean_source is None or mean_target is None:
            raise UserError("give all three of --pairs, --source-length and --target-length")
        return _made_up(data, num_pairs, mean_source, mean_target, "given on the command line")
    folder = data.folder()
    if prepared and (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        return CorpusSize(
            is_prepared=True,
            source=f"counted in {folder}",
            lengths=manifest.lengths,
            block_num_pairs=manifest.blocks["num_pairs"].astype(np.int64),
            num_pairs=manifest.num_pairs,
            vocab_size=manifest.vocabulary_size,
        )
    entry = ARCHIVED.get(data.corpus)
    if entry is None or {data.source, data.target} != set(entry.languages):
        raise UserError(
            f"corpus {data.corpus} ({data.source}-{data.target}) is not prepared at {folder}, and "
            "no figures of it are published here: run `babelray data prepare` with the same "
            "configuration, or give --pairs, --source-length and --target-length"
        )
    means = entry.statistics.mean_pieces
    return _made_up(
        data,
        entry.statistics.num_pairs,
        means[data.source],
        means[data.target],
        f"published: {entry.statistics.source}",
    )


def _made_up(
    data: DataConfig, num_pairs: int, mean_source: float, mean_target: float, source: str
) -> CorpusSize:
    longest = data.max_length
    for option, mean in (("--source-length", mean_source), ("--target-length", mean_target)):
        if not 2 <= mean <= longest / 2:
            raise UserError(
                f"{option} {mean:g}: give the mean pieces a sentence, from 2 to half of "
                f"data.max_length {longest}"
            )
    if num_pairs < _BLOCK_PAIRS:
        raise UserError(f"--pairs {num_pairs}: at least {_BLOCK_PAIRS} are needed to plan with")
    wanted = max(_FEWEST_PAIRS, min(_MOST_PAIRS, data.lanes * data.window_pairs))
    num = min(num_pairs, wanted) // _BLOCK_PAIRS * _BLOCK_PAIRS
    return CorpusSize(
        is_prepared=False,
        source=source,
        lengths=made_up_lengths(num, mean_source, mean_target, longest),
        block_num_pairs=np.full(num // _BLOCK_PAIRS, _BLOCK_PAIRS, dtype=np.int64),
        num_pairs=num_pairs,
        vocab_size=data.vocabulary_size,
    )


def made_up_lengths(
    num_pairs: int, mean_source: float, mean_target: float, longest: int
) -> NDArray[np.uint16]:
    """Lengths [pairs, 2] of these means, with a long tail that is cut at ``longest``."""
    generator = np.random.default_rng(0)
    source = generator.lognormal(0.0, _SIGMA, num_pairs)
    target = source * generator.lognormal(0.0, _RATIO_SIGMA, num_pairs)
    sides = []
    for side, mean in ((source, mean_source), (target, mean_target)):
        scale = mean / side.mean()
        for _ in range(3):  # cutting and rounding shift the mean a little
            lengths = np.clip((side * scale).round(), 2, longest)
            scale *= mean / lengths.mean()
        sides.append(np.clip((side * scale).round(), 2, longest))
    return np.stack(sides, axis=1).astype(np.uint16)

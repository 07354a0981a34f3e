"""The plan: which pairs make up which batch, for every step, as a pure function.

A step's global batch follows from (sentence lengths, block sizes, lanes, token budget, window,
seed, step) and from nothing else: not from the number of ranks, not from what was read before. So
any rank computes any lane's batch of any step at once, without reading data, and a run resumes from
its step number alone.

How a corpus becomes batches:

1. The blocks are permuted once, by the seed. Blocks in that order, and pairs in order within their
   block, give every pair a *position*.
2. The positions are cut into one contiguous range a lane, of equal cost (the sum over pairs of the
   longer side), so that lanes have nearly equally many batches. A block may be shared by two lanes.
3. A lane's range is cut evenly into *windows* of at most ``window_pairs``. In a window pairs are
   sorted by the longer side (descending), then by source minus target (in turn ascending and
   descending, so that neighbours stay alike), and cut into batches: the longest pair comes first,
   so ``budget // longest`` pairs fit, padding included, on both sides. In small windows where full
   batches would be padded by more than 2 %, the cuts are moved to where padding is least
   (``data_shards.cuts``).
4. Which pairs lie in a window is fixed. Pairs of the same two lengths are in a new random order
   each epoch; as that leaves the sorted *lengths* alone, the shapes and token counts of all batches
   are the same in every epoch and are tabulated once. Each epoch permutes a lane's windows, and the
   batches within each window.
5. An epoch has as many steps as the lane with most batches. A lane with fewer is empty at some
   steps, spread evenly over the epoch, so that no step is much smaller than the others. Nothing is
   dropped, nothing is repeated, nothing is padded in.

Randomness is that of ``data_shards.randomness``: keyed by integers, ours, and the same for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_shards.config import DataConfig
from data_shards.cuts import cut_closely, cut_simply, is_worth_it
from data_shards.errors import DataError
from data_shards.randomness import MASK, Int64, UInt64, key_of, permutation, random_numbers

if TYPE_CHECKING:
    from data_shards.manifest import Manifest

Int32 = NDArray[np.int32]

# Bump when a change makes the same corpus and seed give other batches: a run must not resume then.
PLAN_FORMAT = 2

# One independent stream of random numbers for each use.
_BLOCKS, _TIES, _WINDOWS, _BATCHES, _GAPS, _HASH = range(1, 7)

# Low bits of a sort key that hold a pair's random number; the 34 above hold its lengths.
_TIE_BITS = 30

# Windows are cut side by side up to so many pairs: enough to share the steps of the search, and few
# tens of megabytes.
_PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class LaneBatch:
    """One lane's share of a step: which pairs, and how large the padded tensors are.

    ``rows`` are the same pairs as ``pair_ids``, counted from the start of their window.
    """

    step: int
    lane: int
    window: int
    pair_ids: Int64
    rows: Int32
    source_length: int
    target_length: int
    num_source_tokens: int
    num_target_tokens: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive pairs of one block: rows ``[first, first + num)`` of it."""

    block: int
    first: int
    num: int


@dataclass(frozen=True, slots=True)
class Batches:
    """All batches of an epoch, ordered by lane, window and place in the sorted window.

    One empty batch follows at the end, so that index -1 means "no batch" in every column.
    """

    window: Int32
    start: Int32
    num: Int32
    source_length: Int32
    target_length: Int32
    num_source_tokens: Int32
    num_target_tokens: Int32


@dataclass(frozen=True, slots=True)
class Tables:
    """What takes long to find out of a corpus' lengths; the rest of a plan follows at once."""

    longest: int
    digest: str
    window_position: Int64
    lane_window: Int64
    window_batch: Int64
    batches: Batches


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One epoch's order: ``schedule`` [steps, lanes] holds batch indices; the rest is per step."""

    schedule: Int32
    num_pairs: Int64
    num_source_tokens: Int64
    num_target_tokens: Int64


class Plan:
    """Deals a corpus into batches; see the module's description.

    Memory: the corpus' lengths (given, possibly memory-mapped), some 28 bytes a batch, two epochs'
    schedules, and one int32 a pair for the windows in use.

    Args:
        lengths: [N, 2] source and target length of every pair, end signs included, all >= 1.
        block_num_pairs: pairs in each block, in the order in which pairs are numbered.
        lanes: batches a step.
        tokens_per_step: bound on a step's source and on its target tokens, padding included.
        window_pairs: most pairs that are sorted together.
        seed: decides the order.
        tables: those of an equal plan, if there is one; see ``data_shards.plan_file``.

    Raises:
        DataError: there is no pair, or one that is longer than a lane's share of the budget.
    """

    def __init__(
        self,
        lengths: NDArray[Any],
        block_num_pairs: NDArray[Any] | Sequence[int],
        *,
        lanes: int,
        tokens_per_step: int,
        window_pairs: int,
        seed: int,
        tables: Tables | None = None,
    ) -> None:
        assert min(lanes, window_pairs) >= 1
        assert seed >= 0
        self.lanes = lanes
        self.tokens_per_step = tokens_per_step
        self.window_pairs = window_pairs
        self.seed = seed
        self.tokens_per_batch = tokens_per_step // lanes

        sizes = np.asarray(block_num_pairs, dtype=np.int64)
        assert lengths.shape == (sizes.sum(), 2)
        assert (sizes > 0).all()
        if len(lengths) == 0:
            raise DataError(
                "the corpus holds no sentence pair: give more text, or loosen the filters "
                "(data.max_length, data.max_ratio) and prepare it again"
            )
        self._lengths = lengths
        self._longest = tables.longest if tables else int(lengths.max())
        if self._longest > self.tokens_per_batch:
            pair = int(lengths.argmax()) // 2
            raise DataError(
                f"pair {pair} has {self._longest} pieces on a side, but "
                f"tokens_per_step {tokens_per_step} over {lanes} lanes leaves "
                f"{self.tokens_per_batch} tokens a lane: raise data.tokens_per_step to at least "
                f"{self._longest * lanes}, or lower data.lanes or data.max_length"
            )

        self._block_sizes = sizes
        self._first_pair = _starts(sizes)
        # Blocks in permuted order, and the position of the first pair of each.
        self._block_order = permutation(key_of(seed, _BLOCKS), len(sizes))
        self._block_position = _starts(sizes[self._block_order])

        if tables is None:
            self._window_position, self._lane_window = self._cut_windows(self._cut_lanes())
            self._batches, self._window_batch = self._cut_batches()
        else:
            self._window_position, self._lane_window = tables.window_position, tables.lane_window
            self._batches, self._window_batch = tables.batches, tables.window_batch
            self.digest = tables.digest  # else it is found when it is asked for
        lane_batch = self._window_batch[self._lane_window]
        self._lane_num_batches = np.diff(lane_batch)
        self.steps_per_epoch = int(self._lane_num_batches.max())

        # The thread that prefetches is an epoch ahead of the one that trains, at most.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        # Each lane has one window open; one more where an epoch's last meets the next one's first.
        self._window_rows = lru_cache(maxsize=lanes + 1)(self._sort_window)

    @classmethod
    def of(cls, manifest: Manifest, config: DataConfig, seed: int) -> Plan:
        """The plan of a prepared corpus."""
        return cls(
            manifest.lengths,
            manifest.blocks["num_pairs"],
            lanes=config.lanes,
            tokens_per_step=config.tokens_per_step,
            window_pairs=config.window_pairs,
            seed=seed,
        )

    @property
    def tables(self) -> Tables:
        """What another plan of the same corpus and settings need not find out again."""
        return Tables(
            longest=self._longest,
            digest=self.digest,
            window_position=self._window_position,
            lane_window=self._lane_window,
            window_batch=self._window_batch,
            batches=self._batches,
        )

    # What a step is made of.

    def locate(self, step: int) -> tuple[int, int]:
        """``(epoch, step within it)``, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, step: int, lane: int) -> LaneBatch | None:
        """The batch of a lane at a step; None where the lane is empty."""
        epoch, step_in_epoch = self.locate(step)
        index = int(self._epoch(epoch).schedule[step_in_epoch, lane])
        if index < 0:
            return None
        batches = self._batches
        window, start = int(batches.window[index]), int(batches.start[index])
        rows = self._window_rows(epoch, window)[start : start + int(batches.num[index])]
        positions = rows + self._window_position[window]
        place = np.searchsorted(self._block_position, positions, side="right") - 1
        first_pair = self._first_pair[self._block_order[place]]
        return LaneBatch(
            step=step,
            lane=lane,
            window=window,
            pair_ids=first_pair + positions - self._block_position[place],
            rows=rows,
            source_length=int(batches.source_length[index]),
            target_length=int(batches.target_length[index]),
            num_source_tokens=int(batches.num_source_tokens[index]),
            num_target_tokens=int(batches.num_target_tokens[index]),
        )

    def has_batch(self, step: int, lane: int) -> bool:
        """Whether a lane is not empty at a step; a look-up, cheaper than ``batch``."""
        epoch, step_in_epoch = self.locate(step)
        return bool(self._epoch(epoch).schedule[step_in_epoch, lane] >= 0)

    def step(self, step: int, lanes: Iterable[int] | None = None) -> list[LaneBatch]:
        """The batches of a step, of all lanes or of those given, without the empty ones."""
        chosen = range(self.lanes) if lanes is None else lanes
        batches = (self.batch(step, lane) for lane in chosen)
        return [batch for batch in batches if batch is not None]

    def steps(
        self, start: int, stop: int, lanes: Sequence[int] | None = None
    ) -> Iterator[list[LaneBatch]]:
        """The batches of steps ``start`` to ``stop`` (excluded)."""
        for step in range(start, stop):
            yield self.step(step, lanes)

    def num_pairs(self, step: int) -> int:
        """Pairs of a step, over all lanes."""
        epoch, step_in_epoch = self.locate(step)
        return int(self._epoch(epoch).num_pairs[step_in_epoch])

    def source_tokens(self, step: int) -> int:
        """Source tokens of a step, end signs included, padding not, over all lanes."""
        epoch, step_in_epoch = self.locate(step)
        return int(self._epoch(epoch).num_source_tokens[step_in_epoch])

    def target_tokens(self, step: int) -> int:
        """Target tokens of a step, end signs included, padding not, over all lanes."""
        epoch, step_in_epoch = self.locate(step)
        return int(self._epoch(epoch).num_target_tokens[step_in_epoch])

    def data_hash(self, step: int) -> int:
        """``data_hash`` of a step, over all lanes, as it should come out."""
        return sum(data_hash(step, b.lane, b.pair_ids) for b in self.step(step)) & MASK

    # What the stream must read.

    def segments(self, window: int) -> list[Segment]:
        """The parts of blocks that make up a window, in the order of its rows."""
        start, stop = (int(p) for p in self._window_position[window : window + 2])
        first = int(np.searchsorted(self._block_position, start, side="right")) - 1
        segments = []
        for place in range(first, len(self._block_order)):
            begin, end = (int(p) for p in self._block_position[place : place + 2])
            if begin >= stop:
                break
            low, high = max(begin, start), min(end, stop)
            segments.append(Segment(int(self._block_order[place]), low - begin, high - low))
        return segments

    def next_window(self, step: int, lane: int) -> int | None:
        """The window that a lane opens after the one of its next batch, from ``step`` on.

        None if it is not in what is left of the epoch or at the beginning of the next one: then it
        has no other.
        """
        epoch, step_in_epoch = self.locate(step)
        here = self._epoch(epoch).schedule[step_in_epoch:, lane]
        for order in (here, None):
            indices = self._epoch(epoch + 1).schedule[:, lane] if order is None else order
            windows = self._batches.window[indices[indices >= 0]]
            if order is not None:
                current = windows[0] if len(windows) else -1
            others = windows[windows != current]
            if len(others):
                return int(others[0])
        return None

    # What the plan is worth.

    def padding_efficiency(self) -> tuple[float, float]:
        """Real tokens as a fraction of those computed on, of source and of target."""
        batches = self._batches
        num = batches.num.astype(np.int64)
        source = batches.num_source_tokens.sum() / (num * batches.source_length).sum()
        target = batches.num_target_tokens.sum() / (num * batches.target_length).sum()
        return float(source), float(target)

    @property
    def num_batches(self) -> int:
        """Batches an epoch, over all lanes."""
        return len(self._batches.num) - 1

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with whatever changes any step.

        All ranks must have the same one, and a resumed run the same one as before.
        """
        digest = hashlib.sha256()
        names = (PLAN_FORMAT, self.lanes, self.tokens_per_step, self.window_pairs, self.seed)
        digest.update(repr(names).encode())
        digest.update(self._block_sizes.astype("<i8").tobytes())
        step = 1 << 20  # pairs at a time, so that a memory map is not copied whole
        for start in range(0, len(self._lengths), step):
            digest.update(self._lengths[start : start + step].astype("<u2").tobytes())
        return digest.hexdigest()[:16]

    # How it is made.

    def _cut_lanes(self) -> Int64:
        """First position of each lane and the end [lanes + 1]: equal sums of the longer sides."""
        total_before = _starts(self._block_costs()[self._block_order])
        total = int(total_before[-1])
        cuts = [0]
        for lane in range(1, self.lanes):
            wanted = total * lane // self.lanes
            place = int(np.searchsorted(total_before, wanted, side="right")) - 1
            block = self._block_order[place]
            within = np.cumsum(self._longer(block, block + 1))
            left = wanted - int(total_before[place])
            row = int(np.searchsorted(within, left, side="right"))
            cuts.append(int(self._block_position[place]) + row)
        return np.array([*cuts, len(self._lengths)], dtype=np.int64)

    def _block_costs(self) -> Int64:
        """Sum over each block's pairs of the longer side [blocks]."""
        parts = []
        step = 1024  # blocks at a time, so that a memory map is not copied whole
        for start in range(0, len(self._block_sizes), step):
            stop = min(start + step, len(self._block_sizes))
            begins = self._first_pair[start:stop] - self._first_pair[start]
            parts.append(np.add.reduceat(self._longer(start, stop), begins))
        return np.concatenate(parts)

    def _longer(self, start: int, stop: int) -> Int64:
        """The longer side's length of every pair of blocks ``start`` to ``stop`` (excluded)."""
        lengths = self._lengths[self._first_pair[start] : self._first_pair[stop]]
        longer: Int64 = np.maximum(lengths[:, 0], lengths[:, 1]).astype(np.int64)
        return longer

    def _cut_windows(self, cuts: Int64) -> tuple[Int64, Int64]:
        """First position of each window and the end, and first window of each lane and the end."""
        positions, lane_window = [], [0]
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            num = -(-(stop - start) // self.window_pairs)
            positions += [start + (stop - start) * i // num for i in range(num)]
            lane_window.append(len(positions))
        positions.append(int(cuts[-1]))
        return np.array(positions, dtype=np.int64), np.array(lane_window, dtype=np.int64)

    def _cut_batches(self) -> tuple[Batches, Int64]:
        """The table of batches, and the first batch of each window and the end."""
        columns: list[list[NDArray[Any]]] = [[] for _ in range(7)]
        num_batches = []
        for first, windows in self._sorted_windows():
            for window, (source, target), starts in zip(
                range(first, first + len(windows)), windows, self._cut_some(windows), strict=True
            ):
                num_batches.append(len(starts))
                values = (
                    np.full(len(starts), window),
                    starts,
                    np.diff(starts, append=len(source)),
                    np.maximum.reduceat(source, starts),
                    np.maximum.reduceat(target, starts),
                    np.add.reduceat(source, starts),
                    np.add.reduceat(target, starts),
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value.astype(np.int32))
        end = np.zeros(1, dtype=np.int32)
        table = Batches(*(np.concatenate([*column, end]) for column in columns))
        return table, _starts(np.array(num_batches, dtype=np.int64))

    def _sorted_windows(self) -> Iterator[tuple[int, list[tuple[Int32, Int32]]]]:
        """The windows' sorted (source, target) lengths, some at a time, and the first's number."""
        first, num_pairs, windows = 0, 0, []
        for window in range(len(self._window_position) - 1):
            key = np.sort(self._length_key(self._window_lengths(window)))
            windows.append(self._lengths_of_key(key))
            num_pairs += len(key)
            if num_pairs >= _PAIRS_AT_ONCE:
                yield first, windows
                first, num_pairs, windows = window + 1, 0, []
        if windows:
            yield first, windows

    def _cut_some(self, windows: list[tuple[Int32, Int32]]) -> list[Int64]:
        """Where the batches of some windows start."""
        budget = self.tokens_per_batch
        cuts = [cut_simply(np.maximum(source, target), budget) for source, target in windows]
        wasteful = [i for i, cut in enumerate(cuts) if is_worth_it(*windows[i], cut)]
        if wasteful:
            closer = cut_closely([windows[i] for i in wasteful], budget)
            for i, cut in zip(wasteful, closer, strict=True):
                cuts[i] = cut
        return cuts

    def _build_epoch(self, epoch: int) -> _Epoch:
        schedule = np.full((self.steps_per_epoch, self.lanes), -1, dtype=np.int32)
        for lane in range(self.lanes):
            first = int(self._lane_window[lane])
            num_windows = int(self._lane_window[lane + 1]) - first
            windows = permutation(key_of(self.seed, _WINDOWS, epoch, lane), num_windows)
            order = []
            for window in first + windows:
                start, stop = self._window_batch[window : window + 2]
                key = key_of(self.seed, _BATCHES, epoch, int(window))
                order.append(start + permutation(key, int(stop - start)))
            num = int(self._lane_num_batches[lane])
            if num:
                # Batch b goes to step (b * steps + offset) // num: each at another step, evenly.
                offset = key_of(self.seed, _GAPS, epoch, lane) % self.steps_per_epoch
                steps = (np.arange(num) * self.steps_per_epoch + offset) // num
                schedule[steps, lane] = np.concatenate(order)
        batches = self._batches
        return _Epoch(
            schedule,
            batches.num[schedule].sum(axis=1, dtype=np.int64),
            batches.num_source_tokens[schedule].sum(axis=1, dtype=np.int64),
            batches.num_target_tokens[schedule].sum(axis=1, dtype=np.int64),
        )

    def _sort_window(self, epoch: int, window: int) -> Int32:
        """Rows of a window in the epoch's sorted order."""
        pair_ids = np.concatenate([np.arange(*pairs) for pairs in self._pairs(window)])
        ties = random_numbers(key_of(self.seed, _TIES, epoch), pair_ids.astype(np.uint64))
        key = self._length_key(self._window_lengths(window)) << np.uint64(_TIE_BITS)
        key |= ties >> np.uint64(64 - _TIE_BITS)
        # Stable, so that the rare equal keys too come out alike on every machine.
        return np.argsort(key, kind="stable").astype(np.int32)

    def _pairs(self, window: int) -> Iterator[tuple[int, int]]:
        """The window's rows as ranges of pair ids."""
        for segment in self.segments(window):
            first = int(self._first_pair[segment.block]) + segment.first
            yield first, first + segment.num

    def _window_lengths(self, window: int) -> Int32:
        parts = [self._lengths[first:last] for first, last in self._pairs(window)]
        return np.concatenate(parts).astype(np.int32)

    def _length_key(self, lengths: Int32) -> UInt64:
        """What pairs are sorted by, as one number that gives back both lengths."""
        source, target = lengths[:, 0].astype(np.int64), lengths[:, 1].astype(np.int64)
        longer, difference = np.maximum(source, target), source - target
        snake = np.where(longer % 2 == 0, difference, -difference)
        key = (self._longest - longer) * (2 * self._longest) + snake + self._longest
        return key.astype(np.uint64)

    def _lengths_of_key(self, key: UInt64) -> tuple[Int32, Int32]:
        down, snake = np.divmod(key.astype(np.int64), 2 * self._longest)
        longer, snake = self._longest - down, snake - self._longest
        difference = np.where(longer % 2 == 0, snake, -snake)
        source, target = longer + np.minimum(difference, 0), longer - np.maximum(difference, 0)
        return source.astype(np.int32), target.astype(np.int32)


def lanes_of_rank(rank: int, world_size: int, lanes: int) -> range:
    """The lanes that a rank takes: ``rank``, ``rank + world_size``, …"""
    assert 0 <= rank < world_size
    return range(rank, lanes, world_size)


def data_hash(step: int, lane: int, pair_ids: NDArray[Any]) -> int:
    """A 64-bit number of which pairs a lane consumed at a step, whatever their order.

    The sum of these modulo 2**64 over all lanes and steps is a run's rolling hash: it does not
    depend on how lanes were shared out or on the order in which results were added.
    """
    numbers = random_numbers(key_of(_HASH, step, lane), pair_ids.astype(np.uint64))
    return int(numbers.sum(dtype=np.uint64))


def _starts(sizes: Int64) -> Int64:
    """Running totals from 0: where each part starts, and the end."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)])

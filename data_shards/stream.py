"""The stream: what the plan decided, as tensors, prepared ahead of training.

One background thread cuts the windows that its lanes have open into padded batches as the plan
says, and keeps a bounded number of steps ready. Others read the windows' blocks (each by its byte
range, checked and decoded by WebDataset): as soon as a lane opens a window they begin with its next
one, which then has a window's time to come, however slow disk or network are to answer. There is no
state worth saving: a step number opens it anywhere.

Shapes: B pairs, S source length, T target length; n pairs of a window.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.blocks import Block
from data_shards.config import BOS_ID, PAD_ID
from data_shards.manifest import Manifest
from data_shards.plan import LaneBatch, Plan, Segment, data_hash
from data_shards.ranges import Closed
from data_shards.reader import BlockReader
from data_shards.store import ShardStore

Int64 = NDArray[np.int64]

# Blocks read at a time. What each waits for is the disk or the network, not the processor.
_READERS = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """One lane's share of a step. All tensors are int64, padded with ``PAD_ID`` on the right.

    ``target_in_BT`` is BOS and the pieces, ``target_out_BT`` the pieces and EOS. Token counts
    include end signs and leave padding out. ``length_products`` are the sums over pairs with s
    source and t target tokens of s*s, s*t and t*t: what attention computes.
    """

    source_BS: Tensor  # noqa: N815 - shape suffix
    target_in_BT: Tensor  # noqa: N815
    target_out_BT: Tensor  # noqa: N815
    lane: int
    num_pairs: int
    num_source_tokens: int
    num_target_tokens: int
    length_products: tuple[int, int, int]
    data_hash: int


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What a rank computes at a step: its lanes' batches, without the empty ones."""

    step: int
    batches: list[Batch]


class Stream:
    """Iterator over the steps from ``start_step`` on, without end.

    Steps come in order, each whole. An error of reading is raised where the step that it spoilt
    would have come, after the steps that were ready before it. Close it (or use it as a context
    manager): that ends its threads.

    Args:
        manifest: the prepared corpus.
        plan: its plan.
        lanes: those to read, as ``lanes_of_rank`` gives them.
        start_step: the first step.
        prefetch_steps: most steps kept ready.
        cache_dir: where remote shards are kept; see ``ShardStore``.

    Raises (from ``next``):
        DataError: a shard is missing, cut short, altered or cannot be fetched.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        lanes: Sequence[int],
        start_step: int,
        *,
        prefetch_steps: int,
        cache_dir: Path | None = None,
    ) -> None:
        assert prefetch_steps >= 1
        self._queue: queue.Queue[StepBatches | BaseException] = queue.Queue(prefetch_steps)
        stop = threading.Event()
        store = ShardStore(manifest, cache_dir)
        pool = ThreadPoolExecutor(_READERS, "babelray-read")
        source = BatchSource(manifest, plan, BlockReader(manifest, store), pool)
        thread = threading.Thread(
            target=_prefetch,
            args=(source, pool, tuple(lanes), start_step, self._queue, stop),
            name="babelray-stream",
            daemon=True,
        )
        # The thread does not hold the stream, so one that was forgotten is closed when collected.
        self._close = weakref.finalize(self, _shut_down, stop, store, self._queue, thread)
        self._error: BaseException | None = None
        thread.start()

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        if self._error is not None:
            raise self._error
        if not self._close.alive:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the thread and drop what was ready. May be called again."""
        self._close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class BatchSource:
    """Turns the plan's batches into tensors, in the calling thread.

    It keeps one window a lane in memory: about 2 bytes a token, and 16 a pair; with a pool, which
    reads ahead, the blocks of the next one as well.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        reader: BlockReader,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self._manifest = manifest
        self._plan = plan
        self._reader = reader
        self._pool = pool
        self._windows: dict[int, _Window] = {}
        self._ahead: dict[int, tuple[int, list[Future[Block]]]] = {}

    def step(self, step: int, lanes: Sequence[int]) -> StepBatches:
        """The batches of some lanes at a step."""
        planned = self._plan.step(step, lanes)
        opened = [batch for batch in planned if not self._is_open(batch)]
        for batch in opened:  # all at once, not one after the other
            self._read_ahead(batch.lane, batch.window)
        batches = [self._shape(batch) for batch in planned]
        for batch in opened:
            if self._pool is not None:
                following = self._plan.next_window(step, batch.lane)
                if following is not None:
                    self._read_ahead(batch.lane, following)
        return StepBatches(step, batches)

    def _is_open(self, batch: LaneBatch) -> bool:
        window = self._windows.get(batch.lane)
        return window is not None and window.number == batch.window

    def _read_ahead(self, lane: int, number: int) -> None:
        """Have a window's blocks read, if they are not already on their way."""
        if self._pool is None or (lane in self._ahead and self._ahead[lane][0] == number):
            return
        blocks = [segment.block for segment in self._plan.segments(number)]
        # Shards that come whole first: or else every reader would wait for one and the same.
        self._reader.fetch_ahead(blocks, self._pool)
        self._ahead[lane] = number, [self._pool.submit(self._reader.read, b) for b in blocks]

    def _shape(self, planned: LaneBatch) -> Batch:
        window = self._window(planned.lane, planned.window)
        rows = planned.rows
        source_BS = window.source.padded(rows, planned.source_length)
        target_out_BT = window.target.padded(rows, planned.target_length)
        s, t = window.source.lengths(rows), window.target.lengths(rows)
        return Batch(
            source_BS=torch.from_numpy(source_BS),
            target_in_BT=torch.from_numpy(_shifted(target_out_BT, t)),
            target_out_BT=torch.from_numpy(target_out_BT),
            lane=planned.lane,
            num_pairs=len(rows),
            num_source_tokens=planned.num_source_tokens,
            num_target_tokens=planned.num_target_tokens,
            length_products=(int(s @ s), int(s @ t), int(t @ t)),
            # Of the blocks that were read, not of the plan: it proves what was trained on.
            data_hash=data_hash(planned.step, planned.lane, window.pair_ids[rows]),
        )

    def _window(self, lane: int, number: int) -> _Window:
        window = self._windows.pop(lane, None)
        if window is None or window.number != number:
            del window  # before the next one is read, not after
            window = self._read_window(lane, number)
        self._windows[lane] = window
        return window

    def _blocks(self, lane: int, segments: Sequence[Segment]) -> Iterator[Block]:
        """The blocks of a window, each forgotten here once it is taken."""
        if self._pool is None:
            self._reader.ensure(segment.block for segment in segments)
            yield from (self._reader.read(segment.block) for segment in segments)
            return
        _, futures = self._ahead.pop(lane)
        futures.reverse()
        while futures:
            yield futures.pop().result()

    def _read_window(self, lane: int, number: int) -> _Window:
        segments = self._plan.segments(number)
        sides: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
        lengths, pair_ids = [], []
        for segment, block in zip(segments, self._blocks(lane, segments), strict=True):
            rows = slice(segment.first, segment.first + segment.num)
            for parts, ids, lengths_n in zip(
                sides, (block.source_ids, block.target_ids), block.lengths.T, strict=True
            ):
                begin = int(lengths_n[: rows.start].sum(dtype=np.int64))
                parts.append(ids[begin : begin + int(lengths_n[rows].sum(dtype=np.int64))])
            lengths.append(block.lengths[rows])
            first_pair = int(self._manifest.blocks["first_pair"][int(block.key)])
            pair_ids.append(np.arange(first_pair + rows.start, first_pair + rows.stop))
        lengths_n2 = np.concatenate(lengths)
        source, target = (
            _Sentences.of(parts, lengths_n2[:, side]) for side, parts in enumerate(sides)
        )
        return _Window(number, np.concatenate(pair_ids), source, target)


@dataclass(frozen=True, slots=True)
class _Sentences:
    """One side of a window: all ids, and where each sentence begins (and the last ends)."""

    ids: NDArray[Any]
    starts: Int64

    @classmethod
    def of(cls, parts: list[NDArray[Any]], lengths_n: NDArray[Any]) -> _Sentences:
        starts = np.zeros(len(lengths_n) + 1, dtype=np.int64)
        np.cumsum(lengths_n, out=starts[1:])
        # Room behind the last sentence, so that a row may be read as wide as any batch.
        room = np.full(int(lengths_n.max()), PAD_ID, dtype=parts[0].dtype)
        return cls(np.concatenate([*parts, room]), starts)

    def lengths(self, rows: NDArray[Any]) -> Int64:
        lengths: Int64 = self.starts[rows + 1] - self.starts[rows]
        return lengths

    def padded(self, rows: NDArray[Any], width: int) -> Int64:
        """int64 [rows, width]; PAD_ID behind each sentence."""
        columns = np.arange(width)
        # Each row runs on into the sentences behind its own; those ids are blanked.
        ids = self.ids.take(self.starts[rows, None] + columns)
        ids[columns >= self.lengths(rows)[:, None]] = PAD_ID
        return ids.astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Window:
    """A window's sentences, in the order of the plan's rows."""

    number: int
    pair_ids: Int64
    source: _Sentences
    target: _Sentences


def _shifted(target_out_BT: Int64, lengths_B: Int64) -> Int64:
    """The decoder's input: BOS, then the target without its EOS."""
    shifted = np.empty_like(target_out_BT)
    shifted[:, 0] = BOS_ID
    shifted[:, 1:] = target_out_BT[:, :-1]
    # What follows the last piece is its EOS, if the row is not full.
    ends = np.flatnonzero(lengths_B < target_out_BT.shape[1])
    shifted[ends, lengths_B[ends]] = PAD_ID
    return shifted


def _prefetch(
    source: BatchSource,
    pool: ThreadPoolExecutor,
    lanes: Sequence[int],
    step: int,
    ready: queue.Queue[StepBatches | BaseException],
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            ready.put(source.step(step, lanes))
            step += 1
    except Closed:
        pass
    except BaseException as error:  # the consumer gets it, whatever it is
        ready.put(error)
    finally:
        pool.shutdown(cancel_futures=True)


def _shut_down(
    stop: threading.Event,
    store: ShardStore,
    ready: queue.Queue[StepBatches | BaseException],
    thread: threading.Thread,
) -> None:
    stop.set()
    store.close()
    if thread is threading.current_thread():
        return  # collected in the thread itself, which now ends by itself
    while thread.is_alive():
        # The thread may sit in a put; room lets it go on and see that it should stop.
        while not ready.empty():
            ready.get_nowait()
        thread.join(0.02)

"""Batches made ready on the device ahead of the step that computes them.

A thread takes steps from the stream, cuts them into passes, and copies them from pinned memory on a
stream of its own, while the device computes an earlier step. Whoever takes a step makes the current
stream wait for that copy; the host waits for nothing.

Shapes: B pairs, S source length, T target length, N target and M source tokens end to end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.packed import Packing
from model.packing import Layout, pack, unpack

if TYPE_CHECKING:
    from data_shards.stream import Batch, StepBatches, Stream

# Steps that wait on the device. Two more are there besides: the one that is computed, and the one
# that the thread holds until there is room for it.
_AHEAD = 2

# Longest wait for a thread that waits for the stream. It is a daemon, and holds nothing.
_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass computes.

    Attributes:
        lanes: whose batches: one padded, or several packed together.
        ids: source, decoder input and references, [B, S], [B, T] and [B, T] or [M], [N] and [N].
        packing: of packed sequences, where they begin.
        lane_tokens: of packed lanes, source and target tokens of each.
    """

    lanes: tuple[int, ...]
    ids: tuple[Tensor, Tensor, Tensor]
    packing: Packing | None = None
    lane_tokens: tuple[tuple[int, int], ...] = ()

    @property
    def computed_tokens(self) -> int:
        """Source and target tokens, with what only pads or fills up."""
        return self.ids[0].numel() + self.ids[2].numel()


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A rank's part of a step: its batches as they were read, and as passes on the device."""

    step: int
    batches: list[Batch]
    passes: list[Pass]


@dataclass(frozen=True, slots=True)
class Packer:
    """How a step's batches become passes.

    Attributes:
        lanes_together: of how many lanes the sequences are packed together; None packs none, and
            each lane is a padded pass.
        bucketed: see ``packing.pack``.
    """

    lanes_together: int | None
    bucketed: bool = False

    def num_passes(self, num_batches: int) -> int:
        """Of so many lanes' batches."""
        return -(-num_batches // (self.lanes_together or 1))

    def groups(self, batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
        """The batches of each pass."""
        size = self.lanes_together or 1
        for first in range(0, len(batches), size):
            yield batches[first : first + size]

    def passes(self, batches: Sequence[Batch], place: Callable[[Tensor], Tensor]) -> list[Pass]:
        """The passes of a step, whose tensors ``place`` brings to the device."""
        passes = []
        for group in self.groups(batches):
            lanes = tuple(batch.lane for batch in group)
            ids = [(b.source_BS, b.target_in_BT, b.target_out_BT) for b in group]
            if self.lanes_together is None:
                source, target_in, target_out = (place(part) for part in ids[0])
                passes.append(Pass(lanes, (source, target_in, target_out)))
            else:
                buffer, layout = pack(ids, bucketed=self.bucketed)
                passes.append(packed_pass(lanes, place(buffer), layout))
        return passes


def packed_pass(lanes: tuple[int, ...], buffer: Tensor, layout: Layout) -> Pass:
    """A pass from a packed buffer, wherever that lies."""
    *ids, packing = unpack(buffer, layout)
    return Pass(lanes, (ids[0], ids[1], ids[2]), packing, layout.lanes)


class DeviceBatches:
    """Iterator over a stream's steps, brought to a device ahead of their use.

    An error of the stream is raised where the step would have come. Close it (or use it as a
    context manager) before the stream.

    Args:
        stream: where steps come from; nobody else may take from it.
        packer: how they become passes.
        device: where they go.
    """

    def __init__(
        self, stream: Stream | Iterator[StepBatches], packer: Packer, device: torch.device
    ) -> None:
        self._device = device
        self._ready: queue.Queue[tuple[DeviceStep, Any] | BaseException] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=_bring,
            args=(iter(stream), packer, device, self._ready, self._stop),
            name="babelray-device-batches",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> DeviceStep:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        step, copied = item
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            # The allocator must not hand this memory to the copying stream before it was used.
            for tensor in _tensors(step):
                tensor.record_stream(current)
        return step

    def close(self) -> None:
        """End the thread. May be called again."""
        self._stop.set()
        for _ in range(int(_CLOSE_S / 0.02)):
            while not self._ready.empty():  # the thread may sit in a put
                self._ready.get_nowait()
            self._thread.join(0.02)
            if not self._thread.is_alive():
                return

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _bring(
    steps: Iterator[StepBatches],
    packer: Packer,
    device: torch.device,
    ready: queue.Queue[tuple[DeviceStep, Any] | BaseException],
    stop: threading.Event,
) -> None:
    try:
        on_cuda = device.type == "cuda"
        side = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

        def place(tensor: Tensor) -> Tensor:
            if not on_cuda:
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        for batches in steps:
            with torch.cuda.stream(side):  # does nothing for None
                passes = packer.passes(batches.batches, place)
                copied = None if side is None else side.record_event()
            ready.put((DeviceStep(batches.step, batches.batches, passes), copied))
            if stop.is_set():
                return
        ready.put(StopIteration())
    except BaseException as error:  # the consumer gets it, whatever it is
        ready.put(error)


def _tensors(step: DeviceStep) -> Iterator[Tensor]:
    for one in step.passes:
        yield from one.ids
        if one.packing is not None:
            for side in one.packing:
                yield side.positions_N
                yield side.starts_B

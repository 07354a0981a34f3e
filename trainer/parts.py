"""Files of float32 tensors in the safetensors format, written as a stream of raw bytes.

The library's own writer wants every tensor in memory at once and holds the interpreter's lock; here
the header is written first and the bytes follow from wherever they are.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from trainer.storage import PIECE_BYTES

ITEM_BYTES = 4  # float32

WEIGHTS = "model.safetensors"

# The kinds of tensors of a parameter: its float32 master, Adam's two moments, and, where the
# configuration asks for it, the master's moving average.
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What a file begins with whose float32 tensors then follow in this order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES
        entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return len(text).to_bytes(8, "little") + text


def offsets(stream: BinaryIO) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a file: ``key -> (begin, end)``."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    entries = json.loads(stream.read(length))
    return {
        key: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for key, entry in entries.items()
        if key != "__metadata__"
    }


def key_of(kind: str, name: str, start: int) -> str:
    """A fragment's key: its kind, its parameter, and its first element in the flat parameter."""
    return f"{kind}/{name}/{start}"


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    array: Any = tensor.numpy()  # of which 3.11's memoryview has no type
    return memoryview(array).cast("B")


def in_pieces(data: memoryview) -> Iterator[memoryview]:
    """The data a few megabytes at a time."""
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]


def read_in_pieces(stream: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """A range of a file's bytes, a few megabytes at a time.

    Raises:
        OSError: the file ends before the range does.
    """
    while begin < end:
        stream.seek(begin)
        piece = stream.read(min(PIECE_BYTES, end - begin))
        if not piece:
            raise OSError(errno.EIO, "ends early", stream.name)
        yield piece
        begin += len(piece)

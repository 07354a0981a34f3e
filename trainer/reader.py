"""A checkpoint's tensors, whole or in ranges, whichever ranks wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_shards.errors import RunFailedError
from trainer.parts import EMA, WEIGHT, WEIGHTS, key_of
from trainer.storage import StorageError


class Reader:
    """One checkpoint, open for reading; a context manager.

    Args:
        where: the checkpoint's path or URL, for messages.
        state: what ``state.json`` holds.
        files: the files of its manifest.
        local: gives a file's local path, by its name in the manifest.
    """

    def __init__(
        self,
        where: str,
        state: dict[str, Any],
        files: dict[str, dict[str, Any]],
        local: Callable[[str], Path],
    ) -> None:
        self.state = state
        self._where, self._local = where, local
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._fragments: dict[str, list[tuple[int, int, str]]] = {}
        for file, entry in files.items():
            for name, start, length in entry.get("fragments", ()):
                self._fragments.setdefault(name, []).append((start, length, file))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """A part of one flat parameter: ``[length]`` float32 on the CPU.

        Args:
            kind: ``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema``; where no moving average was
                kept, that is the weights.
            name: the parameter's name in the module.
            start, length: in elements of the flattened parameter.

        Raises:
            RunFailedError: the checkpoint does not hold that, or cannot be read.
        """
        try:
            if kind == WEIGHT or (kind == EMA and not self.has_average):
                return self._weight(name, start, length)
            return self._moment(kind, name, start, length)
        except OSError as error:
            raise StorageError.of("read", self._where, error) from error
        except SafetensorError as error:
            raise RunFailedError(
                f"{self._where} holds no {kind} of {name} "
                f"[{start}:{start + length}] ({error}): it was written by another model"
            ) from None

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights was kept."""
        return "ema_decay" in self.state.get("optimizer", {})

    def _weight(self, name: str, start: int, length: int) -> Tensor:
        whole = self._file(WEIGHTS).get_slice(name)
        shape = whole.get_shape()
        row = math.prod(shape[1:])
        end = start + length
        if end > math.prod(shape):
            raise SafetensorError(f"its shape is {shape}")
        if not shape or not length:
            tensor: Tensor = self._file(WEIGHTS).get_tensor(name)
            return tensor.reshape(-1)[start:end]
        first, last = start // row, -(-end // row)
        rows: Tensor = whole[first:last]
        return rows.reshape(-1)[start - first * row : end - first * row]

    def _moment(self, kind: str, name: str, start: int, length: int) -> Tensor:
        found, position, end = [], start, start + length
        for begin, size, file in sorted(self._fragments.get(name, ())):
            if begin <= position < begin + size and position < end:
                stop = min(begin + size, end)
                part = self._file(file).get_slice(key_of(kind, name, begin))
                found.append(part[position - begin : stop - begin])
                position = stop
        if position != end:
            raise SafetensorError(f"nothing from element {position} on")
        if not found:
            return torch.empty(0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            file = self._local(name)
            self._open[name] = self._files.enter_context(safe_open(file, framework="pt"))
        return self._open[name]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()
        self._files.close()

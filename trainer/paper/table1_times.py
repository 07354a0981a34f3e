"""Time and memory of Table 1's layers on this machine's processor, one thread, batch 1, float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.paper.table1_layers import LAYERS, make
from trainer.paper.timing import Timed, Work, one_thread, peak_bytes, time_in_turns

Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = ("forward", "training")


@dataclass(frozen=True)
class Cell:
    """One layer of one size."""

    layer: str
    n: int
    d: int


class _Bench:
    """Layers, made once for all cells that use them."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, int], nn.Module] = {}

    def work(self, cell: Cell, mode: Mode) -> Work:
        """A pass: forward without gradients, or forward and backward to input and parameters."""
        key = cell.layer, cell.d
        if key not in self._modules:
            torch.manual_seed(0)
            self._modules[key] = make(LAYERS[cell.layer], cell.d)
        module = self._modules[key]
        inputs_BND = torch.randn(1, cell.n, cell.d)
        if mode == "forward":
            return lambda: _forward(module, inputs_BND)
        inputs_BND.requires_grad_()
        wanted = [inputs_BND, *module.parameters()]
        gradient_BND = torch.randn(1, cell.n, cell.d)
        return lambda: torch.autograd.grad(module(inputs_BND), wanted, gradient_BND)


def _forward(module: nn.Module, inputs_BND: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(inputs_BND)
        return result


def measure_times(
    cells: Sequence[Cell], *, rounds: int, say: Callable[[str], None]
) -> list[tuple[Cell, Mode, Timed]]:
    """CPU time of all cells, in turns."""
    bench = _Bench()
    places = [(cell, mode) for cell in cells for mode in MODES]
    jobs = [partial(bench.work, cell, mode) for cell, mode in places]
    times = time_in_turns(jobs, rounds=rounds, say=say)
    return [(cell, mode, timed) for (cell, mode), timed in zip(places, times, strict=True)]


def measure_memory(cells: Sequence[Cell]) -> list[tuple[Cell, Mode, int]]:
    """Bytes that each pass takes at its peak, beside the layer's parameters and its input."""
    bench = _Bench()
    with one_thread():
        return [
            (cell, mode, peak_bytes(bench.work(cell, mode))) for cell in cells for mode in MODES
        ]

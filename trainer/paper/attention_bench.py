"""What attentions cost: time and memory of every score and implementation, by length and width.

Shapes: B batch, H heads, L length, K width of a head.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention import How, ScoreName, make_score
from trainer.machine import describe, versions
from trainer.paper import results
from trainer.paper.attention_scale import DTYPES, gaussian_rows, initial_rows, model_rows
from trainer.paper.timing import Work, one_thread, peak_bytes, time_in_turns
from trainer.run import LoadedModel

FORMAT = "babelray attention-bench 1"
HEADS, RADIUS = 4, 16

# Of the hidden layer of additive attention, beyond which it is left out: it takes seconds, and the
# formula holds all of it.
_MOST_ELEMENTS: dict[How, int] = {"reference": 1 << 23, "explicit": 1 << 25}
MODES = ("forward", "training")


@dataclass(frozen=True)
class Way:
    """An attention and how it is computed."""

    name: str
    score: ScoreName
    how: How
    local: bool = False
    gpu: bool = False


WAYS = (
    Way("scaled dot, formula", "scaled_dot", "reference"),
    Way("scaled dot, by hand", "scaled_dot", "explicit"),
    Way("scaled dot, fused", "scaled_dot", "fused"),
    Way("scaled dot, Flex", "scaled_dot", "flex", gpu=True),
    Way("dot, fused", "dot", "fused"),
    Way("general, fused", "general", "fused"),
    Way("additive, formula", "additive", "reference"),
    Way("additive, in pieces", "additive", "explicit"),
    Way("local, fused and masked", "scaled_dot", "fused", local=True),
    Way("local, in blocks", "scaled_dot", "blocks", local=True),
    Way("local, Flex", "scaled_dot", "flex", local=True, gpu=True),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured: lengths at one width, widths at one length."""

    lengths: tuple[int, ...] = (16, 64, 128, 256, 512, 1024)
    widths: tuple[int, ...] = (8, 32, 64, 128, 256)
    length: int = 128
    width: int = 64
    tokens: int = 256
    rounds: int = 5
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    scale_widths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
    scale_heads: tuple[int, ...] = (32, 16, 8, 4, 2, 1)


QUICK = Sizes(
    lengths=(16, 64), widths=(16, 64), length=64, tokens=256, rounds=1,
    scale_widths=(4, 64, 256), scale_heads=(16, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One way at one size."""

    way: Way
    dtype: str
    length: int
    width: int
    batch: int


def measure(
    sizes: Sizes, say: Callable[[str], None], loaded: LoadedModel | None = None
) -> dict[str, Any]:
    """All of it, as JSON's types; about two minutes of one core.

    Times are CPU time of one thread in turns, medians of the rounds; on a GPU the clock's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = os.getloadavg()[0]
    began = time.monotonic()
    with one_thread():
        say("the scale: queries and keys of unit variance, and of initialised models")
        gaussian, initial = (
            list(gaussian_rows(sizes.scale_widths)),
            list(initial_rows(sizes.scale_heads)),
        )
        trained = None
        if loaded is not None:
            say("the scale: the trained model")
            trained = model_rows(loaded)
        cells = list(_cells(sizes, device))
        speed = _measured(cells, sizes, device, say)
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": {**describe(device), "versions": versions(), "load_before": load,
                    "load_after": os.getloadavg()[0], "memory_kept": True},
        "seconds": round(time.monotonic() - began, 1),
        "heads": HEADS,
        "radius": RADIUS,
        "sizes": {"length": sizes.length, "width": sizes.width, "tokens": sizes.tokens,
                  "rounds": sizes.rounds},
        "model": None if loaded is None else {
            "d_k": loaded.config.model.key_width, "step": loaded.step,
            "corpus": loaded.config.data.corpus,
        },
        "speed": speed,
        "gaussian": gaussian,
        "initial": initial,
        "trained": trained,
    }  # fmt: skip


def _cells(sizes: Sizes, device: torch.device) -> Iterator[Cell]:
    places = [(length, sizes.width) for length in sizes.lengths]
    places += [(sizes.length, width) for width in sizes.widths]
    for length, width in dict.fromkeys(places):
        batch = max(1, sizes.tokens // length)
        for way in WAYS:
            elements = batch * HEADS * length * length * width
            if way.gpu and device.type != "cuda":
                continue
            if way.how == "explicit" and way.score != "additive" and device.type != "cpu":
                continue
            if way.score == "additive" and elements > _MOST_ELEMENTS[way.how]:
                continue
            for dtype in sizes.dtypes:
                yield Cell(way, dtype, length, width, batch)


class _Work:
    """A cell's tensors and passes."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell = cell
        torch.manual_seed(0)
        dtype = DTYPES[cell.dtype]
        self.score = make_score(cell.way.score, HEADS, cell.width).to(device, dtype)
        shape = (cell.batch, HEADS, cell.length, cell.width)
        self.heads = [
            torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)
        ]
        self.leaves = [*self.heads, *self.score.parameters()]
        self.grad = torch.randn(shape, device=device).to(dtype)

    def attended(self, how: How) -> Tensor:
        query, key, value = self.heads
        radius = RADIUS if self.cell.way.local else None
        output: Tensor = self.score(query, key, value, radius=radius, how=how)
        return output

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attended(self.cell.way.how)

    def training(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.attended(self.cell.way.how), self.leaves, self.grad)

    def of(self, mode: str) -> Work:
        """The pass of a mode."""
        return self.forward if mode == "forward" else self.training

    def difference(self) -> float:
        """The largest, of the output, to the formula's."""
        with torch.no_grad():
            found, expected = self.forward(), self.attended("reference")
        return float((found - expected).abs().max())


def _measured(
    cells: Sequence[Cell], sizes: Sizes, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    facts: list[dict[str, Any]] = []
    for cell in cells:
        work = _Work(cell, device)
        facts.append(
            {f"{mode}_bytes": peak_bytes(work.of(mode), device) for mode in MODES}
            | {"difference": None if cell.way.how == "reference" else work.difference()}
        )
    say(f"memory of {len(cells)} cells is measured; {sizes.rounds} rounds of times")
    jobs = [partial(_make, cell, mode, device) for cell in cells for mode in MODES]
    times = iter(time_in_turns(jobs, rounds=sizes.rounds, say=say, device=device))
    rows = []
    for cell, fact in zip(cells, facts, strict=True):
        row: dict[str, Any] = {
            "way": cell.way.name,
            "dtype": cell.dtype,
            "length": cell.length,
            "width": cell.width,
            "batch": cell.batch,
        }
        for mode in MODES:
            timed = next(times)
            row[f"{mode}_s"] = _rounded(timed.median_s)
            row[f"{mode}_range_s"] = [_rounded(timed.lowest_s), _rounded(timed.highest_s)]
        rows.append(row | fact)
    return rows


def _make(cell: Cell, mode: str, device: torch.device) -> Work:
    return _Work(cell, device).of(mode)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def read_result(file: Path) -> dict[str, Any]:
    """What ``babelray attention-bench --output`` wrote.

    Raises:
        UserError: there is no such file, or it is not one of these.
    """
    softmax = ("scaled", "variance", "entropy", "top", "saturated", "gradient", "median_gradient")
    found = results.read_result(
        file,
        "attention-bench",
        form=FORMAT,
        objects={
            "machine": ("cpu", "cores", "gpu", "versions", "load_before", "load_after"),
            "sizes": ("length", "width", "tokens", "rounds"),
        },
        rows={
            "speed": (
                *("way", "dtype", "length", "width", "batch", "difference"),
                *(f"{mode}_{value}" for mode in MODES for value in ("s", "range_s", "bytes")),
            ),
            "gaussian": ("d_k", "dtype", "largest", "error", "exp_overflow", "bound", *softmax),
            "initial": ("heads", "d_k", *softmax),
        },
    )
    return {"model": None, "trained": None, **found}

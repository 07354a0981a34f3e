"""What attentions cost: time and memory of every score and implementation, by length and width.

Shapes: B batch, H heads, L length, K width of a head.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.errors import UserError
from model.attention import How, ScoreName, make_score
from trainer.machine import describe, versions
from trainer.paper.attention_scale import DTYPES, gaussian_rows, initial_rows, model_rows
from trainer.paper.table1_times import one_thread, peak_bytes
from trainer.run import LoadedModel

FORMAT = "babelray attention-bench 1"
HEADS, RADIUS = 4, 16

# Of the hidden layer of additive attention, beyond which it is left out: it takes seconds, and the
# formula holds all of it.
_MOST_ELEMENTS: dict[How, int] = {"reference": 1 << 23, "explicit": 1 << 25}
# A sample is repeated until it takes this long.
_SAMPLE_S = 0.004
_LONG_S = 0.05
_LONG_ROUNDS = 3  # of what takes longer than that


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
    rounds: int = 3
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
                    "load_after": os.getloadavg()[0]},
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

    def difference(self) -> float:
        """The largest, of the output, to the formula's."""
        with torch.no_grad():
            found, expected = self.forward(), self.attended("reference")
        return float((found - expected).abs().max())


def _measured(
    cells: Sequence[Cell], sizes: Sizes, device: torch.device, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every cell once a round, every other round backwards."""
    samples: list[dict[str, list[float]]] = [{"forward": [], "training": []} for _ in cells]
    facts: list[dict[str, Any]] = []
    for cell in cells:
        work = _Work(cell, device)
        passes = {"forward": work.forward, "training": work.training}
        facts.append(
            {f"{mode}_bytes": _peak(run, device) for mode, run in passes.items()}
            | {"difference": None if cell.way.how == "reference" else work.difference()}
        )
    say(f"memory of {len(cells)} cells is measured; {sizes.rounds} rounds of times")
    for number in range(sizes.rounds):
        order = range(len(cells))
        for index in order if number % 2 == 0 else reversed(order):
            done = samples[index]
            long = max(done["training"], default=0.0) > _LONG_S
            if long and number >= _LONG_ROUNDS:
                continue
            work = _Work(cells[index], device)
            for mode, run in (("forward", work.forward), ("training", work.training)):
                done[mode].append(_seconds(run, device, warm=not long))
        say(f"round {number + 1} of {sizes.rounds}, load {os.getloadavg()[0]:.1f}")
    return [
        {
            "way": cell.way.name,
            "dtype": cell.dtype,
            "length": cell.length,
            "width": cell.width,
            "batch": cell.batch,
            **{f"{mode}_s": _rounded(statistics.median(done[mode])) for mode in done},
            **{f"{mode}_range_s": [_rounded(f(done[mode])) for f in (min, max)] for mode in done},
            **fact,
        }
        for cell, done, fact in zip(cells, samples, facts, strict=True)
    ]


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _peak(run: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return peak_bytes(run)
    run()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _seconds(run: Callable[[], object], device: torch.device, *, warm: bool) -> float:
    if warm:
        run()
    total, repeats = 0.0, 0
    while total < _SAMPLE_S:
        began = _clock(device)
        run()
        total, repeats = total + _clock(device) - began, repeats + 1
    return total / repeats


def _clock(device: torch.device) -> float:
    """CPU seconds of this thread, in which PyTorch computes; the clock's where a GPU does."""
    if device.type != "cuda":
        return time.thread_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def write_result(file: Path, result: dict[str, Any]) -> None:
    """As JSON, a line a row.

    Raises:
        UserError: it cannot be written.
    """
    parts = []
    for name, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the results cannot be written: {file}: {error.strerror}: choose another place"
        ) from None


def read_result(file: Path) -> dict[str, Any]:
    """What ``write_result`` wrote.

    Raises:
        UserError: there is no such file, or it is not one of these.
    """
    mend = "give a file that babelray attention-bench --output wrote, or measure without --input"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--input {file}: {error.strerror}: {mend}") from None
    except ValueError:
        raise UserError(f"--input {file}: this is not JSON: {mend}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"--input {file}: these are no results of attention-bench: {mend}")
    return found

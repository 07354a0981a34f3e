"""Table 1 of the paper, reckoned, counted and measured: one result that tables and plots read.

Source: Vaswani et al. 2017, section 4 and table 1.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.machine import describe, versions
from trainer.paper import results
from trainer.paper import table1_counts as counts
from trainer.paper.table1_fit import crossing, fit_line, fit_power
from trainer.paper.table1_layers import (
    LAYERS,
    Layer,
    Recurrence,
    SelfAttention,
    make_stack,
)
from trainer.paper.table1_times import MODES, Cell, measure_memory, measure_times
from trainer.paper.timing import one_thread

# Changed when a result of an earlier version can no longer be read.
FORMAT = 1

# Attentions and recurrences that are measured at several widths, to find where they cross.
CROSSING = ("attention", "attention-projected", "rnn", "lstm")
_ATTENTIONS, _RECURRENCES = CROSSING[:2], CROSSING[2:]


@dataclass(frozen=True)
class Sizes:
    """What is tried. Fits of times use the sizes from ``upper_n`` and ``upper_d`` on."""

    count_n: tuple[int, ...] = (32, 64, 128)
    count_d: tuple[int, ...] = (32, 64, 128)
    count_at: int = 128  # n and d, where the other, or the window, varies
    windows: tuple[int, ...] = (3, 5, 9, 17, 33)
    chain_n: tuple[int, ...] = (16, 32, 64, 128)
    path_n: tuple[int, ...] = (17, 33, 65, 129)
    dilated_n: tuple[int, ...] = (3, 9, 27, 81, 243)
    strength_n: int = 129
    strength_d: int = 64
    seeds: int = 32
    time_n: tuple[int, ...] = (32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
    time_d: tuple[int, ...] = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
    at_n: int = 256  # where d varies
    at_d: int = 64  # where n varies
    crossing_n: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    crossing_d: tuple[int, ...] = (64, 128, 256, 512)
    upper_n: int = 256
    upper_d: int = 256
    rounds: int = 5


QUICK = Sizes(
    count_n=(32, 64),
    count_d=(32, 64),
    count_at=64,
    windows=(3, 5, 9),
    chain_n=(4, 8),
    path_n=(17, 33),
    dilated_n=(3, 9),
    strength_n=17,
    strength_d=16,
    seeds=2,
    time_n=(32, 64, 128),
    time_d=(16, 32, 64),
    at_n=64,
    at_d=32,
    crossing_n=(32, 64, 128),
    crossing_d=(32, 64),
    upper_n=64,
    upper_d=32,
    rounds=2,
)


def measure(sizes: Sizes, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it; minutes. See ``docs/paper/table1.md`` for what each part means.

    Times are CPU time of this process with one thread, so that other work on the machine disturbs
    them little.
    """
    load_before = os.getloadavg()[0]
    say("operations and sequential steps")
    layers = {name: _counted(layer, sizes) for name, layer in LAYERS.items()}
    say("path lengths")
    with one_thread():
        for name, layer in LAYERS.items():
            layers[name]["path"] = _paths(layer, sizes)
        say("strength of the gradient")
        strengths = _strengths(sizes)
    times = measure_times(_time_cells(sizes), rounds=sizes.rounds, say=say)
    say("memory")
    memory = measure_memory(_sweep_cells(sizes))
    rows = [
        {
            **asdict(cell),
            "mode": mode,
            "seconds": _digits(timed.median_s),
            "lowest_s": _digits(timed.lowest_s),
            "highest_s": _digits(timed.highest_s),
            "rounds": timed.rounds,
        }
        for cell, mode, timed in times
    ]
    held = [{**asdict(cell), "mode": mode, "bytes": peak} for cell, mode, peak in memory]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            **describe(torch.device("cpu")),
            "versions": versions(),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "memory_kept": True,
        },
        "sizes": asdict(sizes),
        "layers": layers,
        "strengths": strengths,
        "times": rows,
        "memory": held,
        "time_fits": scaling(rows, "seconds", sizes),
        "memory_fits": scaling(held, "bytes", sizes),
        "crossings": crossings(rows, sizes),
    }


def _digits(value: float) -> float:
    """As many digits as a measurement has, and some."""
    return float(f"{value:.5g}")


# --- what can be counted --------------------------------------------------------------------------


def _counted(layer: Layer, sizes: Sizes) -> dict[str, Any]:
    at, window = sizes.count_at, layer.window
    sweeps: dict[str, list[tuple[int, int, int | None]]] = {
        "n": [(n, at, window) for n in sizes.count_n],
        "d": [(at, d, window) for d in sizes.count_d],
    }
    if window is not None:
        sweeps["window"] = [(at, at, w) for w in sizes.windows]
    operations: dict[str, Any] = {}
    for name, places in sweeps.items():
        counted = [counts.operations(layer, n, d, window=w) for n, d, w in places]
        operations[name] = {
            "counted": counted,
            "reckoned": [layer.operations(n, d, w or 0) for n, d, w in places],
            "exponent": asdict(fit_power(_varied(layer, name, places), counted)),
        }
    chain = [counts.chain_length(layer, n) for n in sizes.chain_n]
    return {
        "label": layer.label,
        "paper_row": layer.paper_row,
        "formula": layer.formula,
        "operations": operations,
        "chain": {
            "n": sizes.chain_n,
            "length": chain,
            "line": asdict(fit_line(sizes.chain_n, chain)),
            "exponent": asdict(fit_power(sizes.chain_n, chain)),
        },
    }


def _varied(layer: Layer, name: str, places: Sequence[tuple[int, int, int | None]]) -> list[float]:
    """The size that is varied; a neighbourhood by what it adds to the position itself."""
    column = [float(place[("n", "d", "window").index(name)] or 0) for place in places]
    return [w - 1 for w in column] if name == "window" and _is_restricted(layer) else column


def _is_restricted(layer: Layer) -> bool:
    return layer.paper_row == "Self-Attention (restricted)"


def _paths(layer: Layer, sizes: Sizes) -> dict[str, Any]:
    """Lengths against n, and against the window at the largest n, with exponents.

    Exponents are of the distance n - 1 that a path must bridge and of what a layer adds to its
    reach, r - 1 or k - 1. A dilated stack has a line through log_k n instead.
    """
    ns = sizes.dilated_n if layer.dilated else sizes.path_n
    lengths = [counts.path_length(layer, n) for n in ns]
    found: dict[str, Any] = {
        "n": ns,
        "length": lengths,
        "reckoned": [counts.reckoned_path(layer, n) for n in ns],
    }
    if layer.dilated:
        assert layer.window is not None
        logarithms = [math.log(n, layer.window) for n in ns]
        return {**found, "line_through_log": asdict(fit_line(logarithms, lengths))}
    distances = [n if layer.cell is not None else n - 1 for n in ns]
    found["exponent"] = asdict(fit_power(distances, lengths))
    if layer.window is not None:
        at_n = ns[-1]
        lengths = [counts.path_length(layer, at_n, window=w) for w in sizes.windows]
        found["by_window"] = {
            "n": at_n,
            "window": sizes.windows,
            "length": lengths,
            "reckoned": [counts.reckoned_path(layer, at_n, window=w) for w in sizes.windows],
            "exponent": asdict(fit_power([w - 1 for w in sizes.windows], lengths)),
        }
    return found


def _strengths(sizes: Sizes) -> list[dict[str, Any]]:
    """Of one layer that connects all positions, or of the shortest stack that does."""
    n, d = sizes.strength_n, sizes.strength_d
    names = ("attention-projected", "rnn", "gru", "lstm", "attention-banded", "convolution",
             "convolution-dilated")  # fmt: skip
    found: list[dict[str, Any]] = []
    for name in names:
        layer = _with_projections(LAYERS[name])
        depth = 1 if layer.cell is not None else counts.reckoned_path(layer, n)

        def build(layer: Layer = layer, depth: int = depth) -> nn.Module:
            return make_stack(layer, d, depth)

        values = list(map(_digits, counts.strengths(build, n, d, seeds=sizes.seeds)))
        found.append({"layer": name, "label": layer.label, "depth": depth, "values": values})
    for name, label, variant in (
        ("rnn", "RNN, orthogonal recurrent matrix", _orthogonal),
        ("lstm", "LSTM, forget bias 1", _remembering),
    ):

        def build_variant(name: str = name, variant: Callable[..., Any] = variant) -> nn.Module:
            module = make_stack(LAYERS[name], d, 1)
            variant(module)
            return module

        values = list(map(_digits, counts.strengths(build_variant, n, d, seeds=sizes.seeds)))
        found.append({"layer": name, "label": label, "depth": 1, "values": values})
    for one in found:
        # Without distance 0, where a position's own value takes no path.
        logs = [math.log(max(v, 1e-300)) for v in one["values"][1:]]
        one["log_line"] = asdict(fit_line(range(1, n), logs))
    return found


def _with_projections(layer: Layer) -> Layer:
    """The restricted attention as it is beside the full one: both have their matrices.

    Without, a position's product with itself, the square of its length, takes nearly all weight.
    """
    if layer.name != "attention-banded":
        return layer
    return replace(
        layer,
        label="restricted self-attention with projections",
        make=lambda d, window, dilation: SelfAttention(
            d, "banded", projections=True, neighbourhood=window
        ),
    )


def _recurrent_part(stack: nn.Module, name: str) -> torch.Tensor:
    (layer,) = [module for module in stack.modules() if isinstance(module, Recurrence)]
    part: torch.Tensor = getattr(layer.layer, name)
    return part


def _orthogonal(stack: nn.Module) -> None:
    nn.init.orthogonal_(_recurrent_part(stack, "weight_hh_l0"))


def _remembering(stack: nn.Module) -> None:
    bias = _recurrent_part(stack, "bias_hh_l0")
    quarter = len(bias) // 4  # gates: input, forget, cell, output
    with torch.no_grad():
        bias[quarter : 2 * quarter] += 1.0


# --- what is measured -----------------------------------------------------------------------------


def _sweep_cells(sizes: Sizes) -> list[Cell]:
    places = [(n, sizes.at_d) for n in sizes.time_n] + [(sizes.at_n, d) for d in sizes.time_d]
    names = [name for name, layer in LAYERS.items() if layer.timed]
    return [Cell(name, n, d) for name in names for n, d in dict.fromkeys(places)]


def _time_cells(sizes: Sizes) -> list[Cell]:
    crossing_cells = [
        Cell(name, n, d) for name in CROSSING for d in sizes.crossing_d for n in sizes.crossing_n
    ]
    return list(dict.fromkeys([*_sweep_cells(sizes), *crossing_cells]))


def scaling(rows: Sequence[dict[str, Any]], value: str, sizes: Sizes) -> dict[str, Any]:
    """Exponents of a measured value by layer, mode and size.

    Of each: over the upper range, over all sizes, and of the operations over the upper range, with
    which the first is to be compared (a sum such as n²d + nd² has no one exponent).
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["layer"] for row in rows):
        for mode in MODES:
            for size, start, ns, ds in (
                ("n", sizes.upper_n, sizes.time_n, (sizes.at_d,)),
                ("d", sizes.upper_d, (sizes.at_n,), sizes.time_d),
            ):
                own = [row for row in rows if row["layer"] == name and row["mode"] == mode]
                own = [row for row in own if row["n"] in ns and row["d"] in ds]
                own.sort(key=lambda row: int(row[size]))
                x, y = [row[size] for row in own], [row[value] for row in own]
                layer = LAYERS[name]
                work = [layer.operations(row["n"], row["d"], layer.window or 0) for row in own]
                found.setdefault(name, {}).setdefault(mode, {})[size] = {
                    "upper": asdict(fit_power(x, y, start=start)),
                    "all": asdict(fit_power(x, y)),
                    "operations": asdict(fit_power(x, work, start=start)),
                }
    return found


def reckoned_crossing(attention: str, recurrence: str, d: int) -> float:
    """The n up to which attention has fewer operations; 0 if there is none."""
    # Operations of attention are a n² d + b n d², those of recurrence c n d²: n = (c - b) d / a.
    quadratic = LAYERS["attention"].operations(1, 1, 0)
    linear = LAYERS[attention].operations(1, 1, 0) - quadratic
    return max(0.0, (LAYERS[recurrence].operations(1, 1, 0) - linear) * d / quadratic)


def crossings(rows: Sequence[dict[str, Any]], sizes: Sizes) -> list[dict[str, Any]]:
    """Up to which n attention takes less time than recurrence, beside what operations say.

    ``measured`` is 0 where it never does, None where it still does at the last n.
    """
    by_place = {(r["layer"], r["mode"], r["n"], r["d"]): r["seconds"] for r in rows}
    return [
        {
            "attention": attention,
            "recurrence": recurrence,
            "d": d,
            "mode": mode,
            "reckoned": reckoned_crossing(attention, recurrence, d),
            "measured": crossing(
                sizes.crossing_n,
                [by_place[attention, mode, n, d] for n in sizes.crossing_n],
                [by_place[recurrence, mode, n, d] for n in sizes.crossing_n],
            ),
            "last_n": sizes.crossing_n[-1],
        }
        for attention in _ATTENTIONS
        for recurrence in _RECURRENCES
        for d in sizes.crossing_d
        for mode in MODES
    ]


# --- the file -------------------------------------------------------------------------------------

_ROW = ("layer", "n", "d", "mode")


def read_result(file: Path) -> dict[str, Any]:
    """What ``babelray table1 --output`` wrote.

    Raises:
        UserError: there is no such file, or it is not one of these.
    """
    fits = [name for name, layer in LAYERS.items() if layer.timed]
    return results.read_result(
        file,
        "table1",
        form=FORMAT,
        objects={
            "machine": ("cpu", "cores", "versions", "load_before", "load_after", "memory_kept"),
            "sizes": [field.name for field in fields(Sizes)],
            "layers": list(LAYERS),
            "time_fits": fits,
            "memory_fits": fits,
        },
        rows={
            "strengths": ("layer", "label", "depth", "values", "log_line"),
            "times": (*_ROW, "seconds", "lowest_s", "highest_s"),
            "memory": (*_ROW, "bytes"),
            "crossings": ("attention", "recurrence", "d", "mode", "reckoned", "measured", "last_n"),
        },
    )

"""The tables that a result of table 1 is told in, on a terminal and on its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.formats import format_bytes, format_number
from trainer.paper.table1_layers import KERNEL, LAYERS, NEIGHBOURHOOD

# As printed: layer type, complexity per layer, sequential operations, maximum path length.
PAPER = (
    ("Self-Attention", "O(n²·d)", "O(1)", "O(1)"),
    ("Recurrent", "O(n·d²)", "O(n)", "O(n)"),
    ("Convolutional", "O(k·n·d²)", "O(1)", "O(log_k(n))"),
    ("Self-Attention (restricted)", "O(r·n·d)", "O(1)", "O(n/r)"),
)
# What the text says of a layer that the table has no row for.
_OF_THE_TEXT = {"convolution-separable": "O(k·n·d + n·d²), section 4"}
# A loop over cells, one a position: no measurement could find another length.
BY_CONSTRUCTION = "by construction"
MODE_NAMES = {"forward": "forward", "training": "forward and backward"}
# How far a measured exponent may be from that of the operations to be called the same.
CLOSE = 0.15
_SUPERSCRIPTS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first columns of ``words`` are words, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    note: str = ""


def all_tables(result: Mapping[str, Any]) -> list[Table]:
    """In the order in which they are printed."""
    return [
        paper(),
        orders(result),
        operations(result),
        steps(result),
        paths(result),
        strengths(result),
        time_exponents(result),
        times(result),
        crossings(result),
        memory_exponents(result),
        memory(result),
    ]


def text(table: Table) -> str:
    """A table as plain text: words to the left, numbers to the right."""
    lines = [table.head, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        [
            table.title + (f" ({table.note})" if table.note else ""),
            *(
                "  "
                + "  ".join(
                    cell.ljust(width) if place < table.words else cell.rjust(width)
                    for place, (cell, width) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in lines
            ),
        ]
    )


def paper() -> Table:
    """As printed."""
    head = ("layer type", "complexity per layer", "sequential operations", "maximum path length")
    return Table("The paper's table 1", head, list(PAPER), words=4)


def orders(result: Mapping[str, Any]) -> Table:
    """The paper's table with what was counted beside it."""
    pairs = (("operations: paper", "counted"), ("steps: paper", "counted"))
    head = ("layer", *pairs[0], *pairs[1], "path: paper", "measured")
    rows = [
        (
            layer["label"],
            _OF_THE_TEXT.get(name, complexity),
            _counted_order(layer),
            sequential,
            _chain_order(layer),
            longest,
            _constructed(name, _path_order(layer)),
        )
        for paper_row, complexity, sequential, longest in PAPER
        for name, layer in result["layers"].items()
        if layer["paper_row"] == paper_row
    ]
    return Table("Table 1, counted", head, rows, words=7)


def _constructed(name: str, length: str) -> str:
    return f"{length}, {BY_CONSTRUCTION}" if LAYERS[name].cell is not None else length


def power(symbol: str, exponent: float) -> str:
    """A size to an exponent, if there is one: n², d, k⁰·⁵; empty for 0."""
    text = f"{exponent:.2f}".rstrip("0").rstrip(".")
    if text in {"0", "-0"}:
        return ""
    return symbol + ("" if text == "1" else text.translate(_SUPERSCRIPTS))


def _counted_order(layer: Mapping[str, Any]) -> str:
    found = layer["operations"]
    window = "r" if "restricted" in layer["paper_row"] else "k"
    symbols = {"window": window, "n": "n", "d": "d"}
    parts = [
        power(symbol, found[name]["exponent"]["slope"])
        for name, symbol in symbols.items()
        if name in found
    ]
    return " ".join(filter(None, parts)) or "1"


def chain_formula(layer: Mapping[str, Any]) -> str:
    """The number of steps as a + b n, from a line that was fitted."""
    line = layer["chain"]["line"]
    slope, base = round(line["slope"], 6), round(line["intercept"], 6)
    if slope == 0:
        return format_number(base)
    each = f"{slope:g} n"
    return each if base == 0 else f"{each} + {base:g}"


def _chain_order(layer: Mapping[str, Any]) -> str:
    return power("n", layer["chain"]["exponent"]["slope"]) or "1"


def _path_order(layer: Mapping[str, Any]) -> str:
    path = layer["path"]
    if "line_through_log" in path:
        slope = path["line_through_log"]["slope"]
        return "log_k n" if round(slope, 2) == 1 else f"{slope:.2f} log_k n"
    along = power("n", path["exponent"]["slope"])
    if "by_window" not in path or not along:
        return along or "1"
    window = "r" if "restricted" in layer["paper_row"] else "k"
    slope = path["by_window"]["exponent"]["slope"]
    return f"{along} / {power(window, -slope)}" if slope < 0 else along


def operations(result: Mapping[str, Any]) -> Table:
    """Formula and count at one size, and exponents."""
    sizes = result["sizes"]
    at = sizes["count_at"]
    head = ("layer", "reckoned", f"at n = d = {at}", "counted", "n", "d", "r or k")
    rows = []
    for layer in result["layers"].values():
        found = layer["operations"]
        place = list(sizes["count_n"]).index(at)
        rows.append(
            (
                layer["label"],
                layer["formula"],
                f"{found['n']['reckoned'][place]:,}",
                f"{found['n']['counted'][place]:,}",
                *(_exponent(found, name) for name in ("n", "d", "window")),
            )
        )
    return Table("Operations of a forward pass, and their exponents", head, rows, words=2)


def _exponent(found: Mapping[str, Any], name: str) -> str:
    return f"{found[name]['exponent']['slope']:.3f}" if name in found else ""


def steps(result: Mapping[str, Any]) -> Table:
    """The chain of operations at each n."""
    ns = result["sizes"]["chain_n"]
    rows = [
        (
            layer["label"],
            *map(str, layer["chain"]["length"]),
            chain_formula(layer),
            f"{layer['chain']['exponent']['slope']:.3f}",
        )
        for layer in result["layers"].values()
    ]
    head = ("layer", *(f"n = {n}" for n in ns), "formula", "exponent of n")
    return Table("Sequential steps: the longest chain of operations", head, rows)


def paths(result: Mapping[str, Any]) -> Table:
    """Layers (or cells) until every output depends on every input it can see."""
    head = ("layer", "n", "measured", "reckoned", "against n", "against r or k")
    sizes = result["sizes"]
    windows = f"r = {NEIGHBOURHOOD} and k = {KERNEL}"
    varied = ", ".join(map(str, sizes["windows"]))
    note = f"{windows}; the last column: r or k = {varied} at n = {sizes['path_n'][-1]}"
    rows = []
    for name, layer in result["layers"].items():
        path = layer["path"]
        places, found, reckoned = (
            ", ".join(map(str, path[key])) for key in ("n", "length", "reckoned")
        )
        by_window = path.get("by_window")
        line = path.get("line_through_log")
        slope = f"{line['slope']:.3f} × log_k n" if line else f"{path['exponent']['slope']:.3f}"
        rows.append(
            (
                layer["label"],
                places,
                _constructed(name, found),
                reckoned,
                slope,
                f"{by_window['exponent']['slope']:.3f}" if by_window else "",
            )
        )
    return Table("Longest path, by gradients", head, rows, words=4, note=note)


def distances(result: Mapping[str, Any]) -> list[int]:
    """1, 4, 16, ... and the longest."""
    last = result["sizes"]["strength_n"] - 1
    found = [0]
    step = 1
    while step < last:
        found.append(step)
        step *= 4
    return [*found, last]


def strengths(result: Mapping[str, Any]) -> Table:
    """How strongly the last output depends on inputs far away."""
    places = distances(result)
    head = ("layer", "layers", *(f"{place}" for place in places), "factor a position")
    rows = [
        (
            one["label"],
            str(one["depth"]),
            *(f"{one['values'][place]:.1e}" for place in places),
            _factor(one),
        )
        for one in result["strengths"]
    ]
    sizes = result["sizes"]
    note = f"n = {sizes['strength_n']}, d = {sizes['strength_d']}, {sizes['seeds']} initialisations"
    return Table("Gradient of the last output at inputs so far away", head, rows, note=note)


# A curve that varies less is flat, whatever explains it; a line must explain others so well.
_FLAT_RATIO = 100
_STRAIGHT = 0.99


def _factor(one: Mapping[str, Any]) -> str:
    """What a position more costs, where the strength falls (or not) by one factor."""
    line, far = one["log_line"], one["values"][1:]
    if line["r_squared"] < _STRAIGHT and max(far) > _FLAT_RATIO * min(far):
        return "not one"
    return f"{math.exp(line['slope']):.3f}"


def time_exponents(result: Mapping[str, Any]) -> Table:
    """Measured ones beside those of the operations, each with its R²."""
    sizes = result["sizes"]
    note = (
        f"n varies at d = {sizes['at_d']}, d at n = {sizes['at_n']}; median of {sizes['rounds']} "
        "rounds"
    )
    head = ("layer", "pass", "of", "operations", *_fitted(sizes))
    rows = [
        (*names, f"{fits['operations']['slope']:.2f}", *_fit_cells(fits))
        for names, fits in _fits(result["time_fits"])
    ]
    return Table("Exponents of CPU time", head, rows, words=3, note=note)


def memory_exponents(result: Mapping[str, Any]) -> Table:
    """As those of time; the operations have nothing to say here."""
    sizes = result["sizes"]
    note = f"n varies at d = {sizes['at_d']}, d at n = {sizes['at_n']}"
    head = ("layer", "pass", "of", *_fitted(sizes))
    rows = [(*names, *_fit_cells(fits)) for names, fits in _fits(result["memory_fits"])]
    return Table("Exponents of peak memory", head, rows, words=3, note=note)


def _fitted(sizes: Mapping[str, Any]) -> tuple[str, ...]:
    return f"n ≥ {sizes['upper_n']}, d ≥ {sizes['upper_d']}", "R²", "all sizes", "R²"


def _fits(found: Mapping[str, Any]) -> Iterable[tuple[tuple[str, str, str], dict[str, Any]]]:
    for name, by_mode in found.items():
        for mode, by_size in by_mode.items():
            for size, fits in by_size.items():
                yield (LAYERS[name].label, MODE_NAMES[mode], size), fits


def _fit_cells(fits: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = ((fit["slope"], fit["r_squared"]) for fit in (fits["upper"], fits["all"]))
    return tuple(cell for slope, r in pairs for cell in (f"{slope:.2f}", f"{r:.3f}"))


def times(result: Mapping[str, Any]) -> Table:
    """Milliseconds at some sizes."""
    return _measured(result, "times", "CPU time in ms", lambda row: f"{row['seconds'] * 1e3:,.3g}")


def memory(result: Mapping[str, Any]) -> Table:
    """Peak memory at some sizes."""
    return _measured(result, "memory", "Peak memory", lambda row: format_bytes(row["bytes"]))


def _measured(
    result: Mapping[str, Any], which: str, title: str, text: Callable[[dict[str, Any]], str]
) -> Table:
    sizes = result["sizes"]
    ns, ds = _some(sizes["time_n"]), _some(sizes["time_d"])
    places = [(n, sizes["at_d"]) for n in ns] + [(sizes["at_n"], d) for d in ds]
    places = list(dict.fromkeys(places))
    rows: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    for row in result[which]:
        own = rows.setdefault((row["layer"], row["mode"]), {})
        own[row["n"], row["d"]] = text(row)
    head = ("layer", "pass", *(f"{n} × {d}" for n, d in places))
    lines = [
        (LAYERS[name].label, MODE_NAMES[mode], *(own[place] for place in places))
        for (name, mode), own in rows.items()
    ]
    return Table(f"{title}, n × d", head, lines, words=2)


def _some(values: Sequence[int]) -> list[int]:
    """The first, the last and the middle."""
    return sorted({values[0], values[len(values) // 2], values[-1]})


def crossings(result: Mapping[str, Any]) -> Table:
    """Up to which n attention is cheaper than recurrence."""
    head = ("attention", "against", "d", "by operations", "by time: forward", "both passes")
    rows: dict[tuple[str, str, int], list[str]] = {}
    for row in result["crossings"]:
        key = row["attention"], row["recurrence"], row["d"]
        rows.setdefault(key, [_place(row["reckoned"])]).append(
            f"> {row['last_n']:,}" if row["measured"] is None else about(row["measured"])
        )
    lines = [
        (LAYERS[attention].label, LAYERS[other].label.split("(")[1].rstrip(")"), str(d), *cells)
        for (attention, other, d), cells in rows.items()
    ]
    return Table("Self-attention is cheaper than recurrence up to n =", head, lines, words=2)


def _place(n: float) -> str:
    return f"{n:,.0f}" if n > 0 else "never"


def about(n: float) -> str:
    """A measured place, with the two digits that it has from one run to the next."""
    return _place(float(f"{n:.2g}"))

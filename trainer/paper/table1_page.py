"""The parts of ``docs/paper/table1.md`` that are made of results, and its plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.paper import table1_tables as tables
from trainer.paper.pages import check_page, markdown_table, write_parts
from trainer.paper.table1_charts import write_all
from trainer.paper.table1_layers import LAYERS
from trainer.paper.table1_tables import CLOSE, MODE_NAMES, Table, about
from trainer.paper.timing import spread

# By whether the allocator kept memory while times were taken: see ``timing.memory_kept``.
ALLOCATOR = {
    True: "freed memory is kept for the next pass, as in babelray's workers",
    False: "with the C library's own ways, so that the system's work for large blocks is in them",
}
# How many of the exponents that differ are named.
_NUM_NAMED = 6


PARTS = (
    "machine",
    "findings",
    "paper",
    "orders",
    "operations",
    "steps",
    "paths",
    "strengths",
    "time_exponents",
    "times",
    "crossings",
    "memory_exponents",
    "memory",
)


def check(page: Path) -> None:
    """That ``write_page`` will find what it needs: to be asked before minutes of measuring.

    Raises:
        UserError: it will not.
    """
    check_page(page, PARTS, images(page))


def images(page: Path) -> Path:
    """Where the plots of a page lie."""
    return page.parent.parent / "images" / "paper"


def write_page(result: Mapping[str, Any], page: Path) -> list[Path]:
    """Write the tables into ``page``, and the plots ``../images/paper/table1-*.svg`` beside it.

    Raises:
        UserError: a file cannot be written, or the page lacks a part's marks.
    """
    write_parts(page, parts(result))
    return [page, *write_all(result, images(page))]


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """By name, Markdown."""
    machine = result["machine"]
    texts = {
        "paper": tables.paper(),
        "orders": tables.orders(result),
        "operations": tables.operations(result),
        "steps": tables.steps(result),
        "paths": tables.paths(result),
        "strengths": tables.strengths(result),
        "time_exponents": tables.time_exponents(result),
        "times": tables.times(result),
        "crossings": tables.crossings(result),
        "memory_exponents": tables.memory_exponents(result),
        "memory": tables.memory(result),
    }
    return {
        "machine": f"Times are of {result['date']}, one thread of an {machine['cpu']} "
        f"({machine['cores']} cores, shared: load {machine['load_before']:.1f} before and "
        f"{machine['load_after']:.1f} after), PyTorch {machine['versions']['torch']}; "
        f"{ALLOCATOR[machine['memory_kept']]}. Of {len(result['times'])} times, each the median "
        f"of its rounds, {spread((row['lowest_s'], row['highest_s']) for row in result['times'])}. "
        "Everything else on this page is counted, and the same on every machine.",
        "findings": "\n".join(f"- {line}" for line in _findings(result)),
        **{name: markdown(table) for name, table in texts.items()},
    }


def markdown(table: Table) -> str:
    """A table under its note."""
    text = markdown_table(table.head, table.rows, text=table.words)
    return f"{table.note}\n\n{text}" if table.note else text


# --- what was found -------------------------------------------------------------------------------


def _findings(result: Mapping[str, Any]) -> list[str]:
    return [
        _counted(result),
        *_timed(result),
        *_crossed(result),
        "What one thread cannot show is the paper's point about sequential steps: on a device that "
        "computes all positions at once, n steps that wait for each other take n times as long as "
        "one. There was none here; the steps are counted instead.",
    ]


def _counted(result: Mapping[str, Any]) -> str:
    layers = result["layers"].values()
    places = [
        (a, b)
        for layer in layers
        for found in layer["operations"].values()
        for a, b in zip(found["counted"], found["reckoned"], strict=True)
    ]
    lengths: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for name, layer in result["layers"].items():
        own = lengths[LAYERS[name].cell is not None]
        for found in (layer["path"], layer["path"].get("by_window")):
            if found:
                own += zip(found["length"], found["reckoned"], strict=True)
    return (
        f"Operations as PyTorch counts them equal the formula in {_equal(places)}, paths measured "
        f"by gradients in {_equal(lengths[False])}; in the {len(lengths[True])} cases of "
        "recurrence the path is n by construction. Orders of operations, steps and paths are the "
        "paper's. Where a row differs it is another layer: projections add nd², a mask saves "
        "nothing, separable convolutions have the knd + nd² of the paper's section 4 (between "
        "exponents, as any sum of two terms), and contiguous convolutions need a stack of n/k "
        "(the paper's text has both, its table the log_k n of dilated ones)."
    )


def _equal(pairs: list[tuple[int, int]]) -> str:
    same = sum(a == b for a, b in pairs)
    return f"all {same} cases" if same == len(pairs) else f"{same} of {len(pairs)} cases"


def _timed(result: Mapping[str, Any]) -> Iterable[str]:
    sizes = result["sizes"]
    found: list[tuple[float, str]] = []
    for name, by_mode in result["time_fits"].items():
        for mode, by_size in by_mode.items():
            for size, fits in by_size.items():
                measured, expected = fits["upper"]["slope"], fits["operations"]["slope"]
                words = (
                    f"{LAYERS[name].label}, {MODE_NAMES[mode]}: {size} to the {measured:.2f} "
                    f"instead of {expected:.2f}"
                )
                found.append((abs(measured - expected), words))
    found.sort(reverse=True)
    far = [words for difference, words in found if difference > CLOSE]
    yield (
        f"Time grows as the operations do, within {CLOSE} of the exponent, in "
        f"{len(found) - len(far)} of {len(found)} fits over n ≥ {sizes['upper_n']} or "
        f"d ≥ {sizes['upper_d']}."
    )
    if far:
        yield (
            "The largest differences (see [Time](#time) for why): "
            + "; ".join(far[:_NUM_NAMED])
            + "."
        )


def _crossed(result: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        row
        for row in result["crossings"]
        if row["attention"] == "attention" and row["mode"] == "forward"
    ]
    for recurrence in dict.fromkeys(row["recurrence"] for row in rows):
        own = [row for row in rows if row["recurrence"] == recurrence]
        label = LAYERS[recurrence].label.split("(")[1].rstrip(")")
        places = "; ".join(
            f"d = {row['d']}: {_up_to(row['reckoned'])} by operations, {_measured(row)} by time"
            for row in own
        )
        yield f"Self-attention's forward pass is cheaper than the {label}'s up to n, {places}."
    longer = [row for row in result["crossings"] if _is_longer(row)]
    yield (
        "With projections and without, forward and both passes, self-attention is the cheaper one "
        f"for longer by time than by operations in {len(longer)} of {len(result['crossings'])} "
        "comparisons with recurrence."
    )


def _is_longer(row: Mapping[str, Any]) -> bool:
    if row["measured"] is None:
        return bool(row["last_n"] >= row["reckoned"])
    return bool(row["measured"] > row["reckoned"])


def _up_to(n: float) -> str:
    return f"{n:,.0f}" if n else "never"


def _measured(row: Mapping[str, Any]) -> str:
    if row["measured"] is None:
        return f"beyond {row['last_n']:,}"
    return f"about {about(row['measured'])}" if row["measured"] else "never"

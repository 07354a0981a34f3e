"""The tables and plots of a result of the attention bench, and the parts of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.paper.attention_bench import WAYS
from trainer.paper.attention_findings import findings
from trainer.paper.charts import Panel, Series, write_charts
from trainer.paper.pages import check_page, write_parts
from trainer.paper.table1_page import ALLOCATOR, images, markdown
from trainer.paper.table1_tables import Table
from trainer.paper.timing import spread

_MODES = {"forward": "forward", "training": "forward and backward"}
# What is drawn: not what lies on another curve.
_DRAWN = [way.name for way in WAYS if way.score != "dot" and (not way.local or way.how != "fused")]
_LOOKS = {name: look for look, name in enumerate(_DRAWN)}


def all_tables(result: Mapping[str, Any]) -> list[Table]:
    """In the order in which they are printed."""
    trained = [_trained(result)] if result["trained"] else []
    return [*speed_tables(result).values(), _gaussian(result), _types(result), _initial(result),
            *trained]  # fmt: skip


def speed_tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Times and memory by length and by width, by the names of the page's parts."""
    sizes, tables = result["sizes"], {}
    for axis, other in (("length", "width"), ("width", "length")):
        fixed = sizes[other]
        for dtype in dict.fromkeys(row["dtype"] for row in result["speed"]):
            rows = [r for r in result["speed"] if r[other] == fixed and r["dtype"] == dtype]
            tables[f"{axis}_{dtype}"] = _by(
                rows,
                axis,
                f"Time in {dtype}, {other} {fixed}",
                lambda row: f"{1e3 * row['forward_s']:.2f} / {1e3 * row['training_s']:.2f}",
                f"CPU ms of a pass over {sizes['tokens']:,} tokens or one sentence, "
                f"{result['heads']} heads: forward / forward and backward",
            )
        rows = [r for r in result["speed"] if r[other] == fixed and r["dtype"] == "fp32"]
        tables[f"memory_{axis}"] = _by(
            rows,
            axis,
            f"Memory in fp32, {other} {fixed}",
            lambda row: f"{row['forward_bytes'] / 1e6:.1f} / {row['training_bytes'] / 1e6:.1f}",
            "MB at the peak, beside inputs and parameters: forward / forward and backward",
        )
    return tables


def _by(rows: Sequence[Mapping[str, Any]], axis: str, title: str, cell: Any, note: str) -> Table:
    places = sorted({row[axis] for row in rows})
    found = {(row["way"], row[axis]): cell(row) for row in rows}
    names = dict.fromkeys(row["way"] for row in rows)
    lines = [(name, *(found.get((name, place), "-") for place in places)) for name in names]
    return Table(title, (axis, *(f"{place:,}" for place in places)), lines, note=note)


def _gaussian(result: Mapping[str, Any]) -> Table:
    head = ("d_k", "variance", "entropy", "top weight", "saturated", "gradient", "its median")
    rows = [
        (f"{row['d_k']:,}{', scaled' if row['scaled'] else ''}", *_softmax_cells(row))
        for row in result["gaussian"]
        if row["dtype"] == "fp32"
    ]
    return Table("The scale: queries and keys of unit variance, 64 keys, fp32", head, rows)


def _softmax_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['variance']:.2f}",
        f"{row['entropy']:.2f}",
        f"{row['top']:.3f}",
        f"{row['saturated']:.1%}",
        f"{row['gradient']:.3f}",
        f"{row['median_gradient']:.2g}",
    )


def _types(result: Mapping[str, Any]) -> Table:
    head = ("d_k", "largest logit", "error fp32", "error bf16", "error fp16",
            "exp overflows fp16", "exp overflows bf16, fp32", "fp16 overflows at")  # fmt: skip
    by = {(row["d_k"], row["scaled"], row["dtype"]): row for row in result["gaussian"]}
    rows = []
    for d_k, scaled in dict.fromkeys((row["d_k"], row["scaled"]) for row in result["gaussian"]):
        fp32, bf16, fp16 = (by[d_k, scaled, dtype] for dtype in ("fp32", "bf16", "fp16"))
        rows.append((
            f"{d_k:,}{', scaled' if scaled else ''}",
            f"{fp32['largest']:.1f}",
            *(f"{row['error']:.1e}" for row in (fp32, bf16, fp16)),
            *(f"{row['exp_overflow']:.1%}" for row in (fp16, fp32)),
            f"{fp32['bound']:.0f}",
        ))  # fmt: skip
    return Table("Numerical range, by type", head, rows)


def _initial(result: Mapping[str, Any]) -> Table:
    head = ("heads", "d_k", "variance", "entropy", "top weight", "saturated", "gradient",
            "its median")  # fmt: skip
    rows = [
        (f"{row['heads']}{', scaled' if row['scaled'] else ''}", f"{row['d_k']}",
         *_softmax_cells(row))
        for row in result["initial"]
    ]  # fmt: skip
    return Table("The scale: first layer of a base model before training", head, rows)


def _trained(result: Mapping[str, Any]) -> Table:
    head = ("attention", "variance", "entropy", "top weight", "saturated", "gradient", "its median")
    rows = [
        (
            f"{row['kind']}, {row['state']}{', scaled' if row['scaled'] else ''}",
            *_softmax_cells(row),
        )
        for row in result["trained"]
    ]
    model = result["model"]
    title = f"The scale: a model of d_k {model['d_k']} trained on {model['corpus']}"
    return Table(title, head, rows)


PARTS = (
    "machine",
    "agreement",
    "length_fp32",
    "length_bf16",
    "width_fp32",
    "width_bf16",
    "found_time",
    "memory_length",
    "memory_width",
    "found_memory",
    "gaussian",
    "found_scale",
    "types",
    "found_range",
    "initial",
    "trained",
    "found_model",
)


def check(page: Path) -> None:
    """That ``write_page`` will find what it needs: to be asked before minutes of measuring.

    Raises:
        UserError: it will not.
    """
    check_page(page, PARTS, images(page))


def write_page(result: Mapping[str, Any], page: Path) -> list[Path]:
    """Write the tables into ``page``, and ``../images/paper/attention-*.svg`` beside it.

    Raises:
        UserError: a file cannot be written, or the page lacks a part's marks.
    """
    write_parts(page, parts(result))
    return [page, *write_plots(result, images(page))]


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """By name, Markdown."""
    machine, speed, speed_rows = result["machine"], speed_tables(result), result["speed"]
    texts = {**speed, "gaussian": _gaussian(result), "types": _types(result),
             "initial": _initial(result)}  # fmt: skip
    if result["trained"]:
        texts["trained"] = _trained(result)
    device = machine["gpu"] or (
        f"one thread of an {machine['cpu']} ({machine['cores']} cores), shared"
    )
    clock = "" if machine["gpu"] else f"; {ALLOCATOR[machine.get('memory_kept', False)]}"
    ranges = [row[f"{mode}_range_s"] for row in speed_rows for mode in _MODES]
    differences = [row["difference"] for row in result["speed"] if row["difference"] is not None
                   and row["dtype"] == "fp32"]  # fmt: skip
    return {
        **findings(result),
        "machine": f"Measured on {result['date']} in {result['seconds']:.0f} s: {device}, load "
        f"{machine['load_before']:.1f} before and {machine['load_after']:.1f} after; "
        f"{'the clock' if machine['gpu'] else 'CPU time of one thread'}, medians of "
        f"{result['sizes']['rounds']} rounds in turns (three of what takes longer than 0.2 s)"
        f"{clock}; PyTorch {machine['versions']['torch']}. Of {len(ranges)} times, "
        f"{spread((lowest, highest) for lowest, highest in ranges)}.",
        "agreement": f"In fp32 the outputs of all {len(differences)} cells differ from the "
        f"formula's by {max(differences):.1e} at most.",
        **{name: markdown(table) for name, table in texts.items()},
    }


def write_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``attention-speed.svg`` and ``attention-scale.svg``.

    Raises:
        UserError: a file cannot be written.
    """
    speed, scale = folder / "attention-speed.svg", folder / "attention-scale.svg"
    write_charts(speed, _speed_panels(result), title="What attentions cost", legend="below")
    write_charts(scale, _scale_panels(result), title="What the scale 1/√d_k does")
    return [speed, scale]


def _speed_panels(result: Mapping[str, Any]) -> list[Panel]:
    sizes, dtypes = result["sizes"], list(dict.fromkeys(row["dtype"] for row in result["speed"]))
    drawn = [("length", "width", dtype) for dtype in dtypes] + [("width", "length", "fp32")]
    panels = [
        Panel(
            f"{dtype}, {other} {sizes[other]}",
            axis if axis == "length" else "d_k",
            "ms, forward and backward",
            _curves(result, axis, other, dtype, "training_s", 1e3),
            x_log=True,
            y_log=True,
        )
        for axis, other, dtype in drawn
    ]
    memory = _curves(result, "length", "width", "fp32", "training_bytes", 1e-6)
    panels.append(Panel(f"fp32, width {sizes['width']}", "length", "MB at the peak, with backward",
                        memory, x_log=True, y_log=True))  # fmt: skip
    return panels


def _curves(
    result: Mapping[str, Any], axis: str, other: str, dtype: str, value: str, factor: float
) -> list[Series]:
    rows = [
        row
        for row in result["speed"]
        if row[other] == result["sizes"][other] and row["dtype"] == dtype
    ]
    curves = []
    for name in dict.fromkeys(row["way"] for row in rows if row["way"] in _LOOKS):
        own = sorted((row[axis], row[value] * factor) for row in rows if row["way"] == name)
        x, y = zip(*own, strict=True)
        curves.append(Series(name, x, y, look=_LOOKS[name]))
    return curves


def _scale_panels(result: Mapping[str, Any]) -> list[Panel]:
    def curve(name: str, value: str, *, scaled: bool, dtype: str = "fp32", look: int) -> Series:
        rows = [r for r in result["gaussian"] if r["scaled"] == scaled and r["dtype"] == dtype]
        return Series(name, [r["d_k"] for r in rows], [r[value] for r in rows], look=look)

    def both(value: str) -> list[Series]:
        return [
            curve("unscaled", value, scaled=False, look=1),
            curve("scaled", value, scaled=True, look=0),
        ]

    widths = sorted({row["d_k"] for row in result["gaussian"]})
    initial = [
        Series(f"base model, {'scaled' if scaled else 'unscaled'}",
               [row["d_k"] for row in rows], [row["variance"] for row in rows], look=look)
        for scaled, look in ((False, 4), (True, 5))
        if (rows := [row for row in result["initial"] if row["scaled"] == scaled])
    ]  # fmt: skip
    theory = Series("d_k", widths, widths, style="theory", look=6)
    return [
        Panel("Variance of the logits", "d_k", "variance", [*both("variance"), *initial, theory],
              x_log=True, y_log=True),
        Panel("Entropy of the softmax over 64 keys", "d_k", "nats", both("entropy"), x_log=True),
        Panel("Jacobian of the softmax, median", "d_k", "Frobenius norm", both("median_gradient"),
              x_log=True, y_log=True),
        Panel("Error of the weights in bf16", "d_k", "half the sum of differences",
              [curve("unscaled", "error", scaled=False, dtype="bf16", look=1),
               curve("scaled", "error", scaled=True, dtype="bf16", look=0)],
              x_log=True),
    ]  # fmt: skip

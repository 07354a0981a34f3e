"""The report's pictures as inline SVG that takes its colours and its font from the page.

Curves are drawn by matplotlib, which is imported on first use and asked for figure objects only:
no backend is chosen and no global setting is left changed. Attention maps are written directly, a
rectangle a cell, so that each cell can carry its number and its tooltip.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib wants real colours; these stand for the page's, which differ by light and dark.
_INK, _MUTED, _GRID, _CARD = "#010101", "#010102", "#010103", "#010104"
# As many as the page has colours for; more curves begin again, with another dash.
SERIES = tuple(f"#01011{number}" for number in range(1, 9))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _CARD: "var(--card)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",  # matplotlib's own; measured here, replaced by the page's
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a file's name may hold a dollar sign
    "text.color": _INK,
    "xtick.color": _MUTED,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.color": _MUTED,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
# How a mark looks: its line, None for no line, and its sign at the top, which needs no colour.
_MARKS: dict[str, tuple[Any, str]] = {
    "resumed": (":", "|"),
    "restarted": ("--", "v"),
    "resized": ((0, (4, 2, 1, 2)), "D"),
    "skipped": (None, "x"),
    "rewound": (":", "<"),
}
# Inches of a chart. On a phone, where it has a third of that, its letters can still be read.
_SIZE = (4.6, 2.75)
# Up to here every point is marked, so that a run of a single logged step shows something.
_MARKED_POINTS = 25


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """Where something happened: ``kind`` is resumed, restarted, resized, skipped or rewound."""

    kind: str
    x: Sequence[float]


def curves(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    y_label: str,
    x_label: str = "step",
    marks: Sequence[Mark] = (),
    has_whole_x: bool = True,
    from_zero: bool = False,
    wide: bool = False,
    looks: Sequence[int] | None = None,
) -> str:
    """Curves over a common x axis as an SVG element.

    Args:
        name: unique within the page; prefixes every id of the picture.
        title: the text alternative.
        marks: what happened, drawn as upright lines with a sign above.
        has_whole_x: only whole numbers have a tick on the x axis.
        from_zero: let the y axis begin at zero.
        wide: twice as wide as it would be else, at about the same height; for a narrow screen it
            comes as it would be else, too, and the page shows one of both.
        looks: each curve's number, which decides its colour and dash; by default its place.
    """

    # A line of its own needs no name, unless it might be another's.
    is_named = len(series) > 1 or looks is not None

    def draw(axes: Axes) -> None:
        for number, item in zip(looks or range(len(series)), series, strict=True):
            axes.plot(
                item.x,
                item.y,
                color=SERIES[number % len(SERIES)],
                linestyle=_DASHES[number % len(_DASHES)],
                linewidth=1.6,
                marker="os^"[number % 3] if len(item.x) <= _MARKED_POINTS else None,
                markersize=3.5,
                label=item.label if is_named else "",
            )
        for mark in marks:
            _mark(axes, mark)
        if from_zero:
            axes.set_ylim(0, 1.08 * max([*(y for item in series for y in item.y), 1e-12]))
        if is_named or marks:
            _add_legend(axes)

    return _draw(
        draw,
        name=name,
        title=title,
        x_label=x_label,
        y_label=y_label,
        wide=wide,
        has_whole_x=has_whole_x,
    )


def areas(
    series: Sequence[Series], *, name: str, title: str, y_label: str, x_label: str = "step"
) -> str:
    """Areas one on the other over a common x, the first at the bottom; with one x, bars."""

    def draw(axes: Axes) -> None:
        x = np.asarray(series[0].x, dtype=float)
        base = np.zeros(len(x))
        for number, item in enumerate(series):
            top = base + np.asarray(item.y, dtype=float)
            color = SERIES[number % len(SERIES)]
            if len(x) == 1:
                axes.bar(x, top - base, 0.4, base, color=color, alpha=0.8, label=item.label)
            else:
                axes.fill_between(
                    x, base, top, color=color, alpha=0.8, linewidth=0, label=item.label
                )
                # The edge parts neighbours for who cannot tell their colours.
                axes.plot(x, top, color=_CARD, linewidth=0.8)
            base = top
        axes.set_ylim(0, 1.08 * max(float(base.max(initial=0.0)), 1e-12))
        if len(x) > 1:
            axes.set_xlim(x[0], x[-1])
        else:
            axes.set_xlim(x[0] - 1, x[0] + 1)
        _add_legend(axes)

    return _draw(draw, name=name, title=title, x_label=x_label, y_label=y_label, wide=True)


def _mark(axes: Axes, mark: Mark) -> None:
    line, sign = _MARKS[mark.kind]
    if line is not None:
        for x in mark.x:
            axes.axvline(x, color=_MUTED, linewidth=0.9, linestyle=line)
    axes.plot(
        mark.x,
        [1.0] * len(mark.x),
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        color=_MUTED,
        linestyle="none",
        marker=sign,
        markersize=5,
        label=mark.kind,
    )


def histogram(
    columns: Sequence[tuple[str, npt.NDArray[np.integer[Any]]]],
    *,
    name: str,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """Outlined histograms of whole numbers over common bins; the last bin takes all above."""
    top = max(float(np.percentile(values, 99.5)) for _, values in columns)
    width = max(1, int(np.ceil(top / 48)))
    edges = np.arange(0, top + 2 * width, width)

    def draw(axes: Axes) -> None:
        for number, (label, values) in enumerate(columns):
            counts, _ = np.histogram(np.minimum(values, edges[-1]), bins=edges)
            axes.stairs(
                counts,
                edges,
                color=SERIES[number],
                linestyle=_DASHES[number],
                linewidth=1.6,
                label=label,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        _add_legend(axes)

    return _draw(draw, name=name, title=title, x_label=x_label, y_label=y_label)


def attention_map(
    weights_TS: npt.NDArray[np.floating[Any]],
    source: Sequence[str],
    target: Sequence[str],
    *,
    title: str,
) -> str:
    """A labelled heat map: a row for each target piece, a column for each source piece.

    Every cell of a tenth or more shows its weight in per cent: the picture does not rest on colour.
    """
    cell = 27
    left = 14 + max(len(piece) for piece in target) * 7
    top = 14 + max(len(piece) for piece in source) * 6
    right = max(len(piece) for piece in source[-4:]) * 4
    width, height = left + cell * len(source) + right, top + cell * len(target) + 4
    parts = [_svg(width, height, title, f"max-width:{width}px")]
    for column, piece in enumerate(source):
        middle = left + cell * column + cell / 2 + 3
        parts.append(
            f'<text class="piece" transform="translate({middle:.0f} {top - 7}) rotate(-55)">'
            f"{escape(piece)}</text>"
        )
    for row, piece in enumerate(target):
        base = top + cell * row + cell // 2 + 4
        parts.append(
            f'<text class="piece" x="{left - 8}" y="{base}" text-anchor="end">'
            f"{escape(piece)}</text>"
        )
        for column, weight in enumerate(weights_TS[row]):
            x, y = left + cell * column, top + cell * row
            tip = f"{piece} attends to {source[column]}: {weight:.2f}"
            parts.append(
                f'<g><title>{escape(tip)}</title><rect class="cell" x="{x}" y="{y}" '
                f'width="{cell - 2}" height="{cell - 2}" rx="3"/>'
                f'<rect class="heat" x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" '
                f'rx="3" fill-opacity="{weight:.2f}"/>'
            )
            if weight >= 0.095:
                kind = "on-heat" if weight > 0.55 else "on-cell"
                kind += " stronger" if weight > 0.8 else ""
                parts.append(
                    f'<text class="{kind}" x="{x + cell / 2 - 1:.0f}" y="{y + 17}" '
                    f'text-anchor="middle">{100 * weight:.0f}</text>'
                )
            parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def _svg(width: float, height: float, title: str, style: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'style="{style}">'
    )


def _draw(
    draw: Callable[[Axes], None],
    *,
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    wide: bool = False,
    has_whole_x: bool = True,
) -> str:
    if wide:
        wide_one, narrow_one = (
            _drawn(draw, name, title, x_label, y_label, is_wide, has_whole_x)
            for name, is_wide in ((name, True), (f"{name}-narrow", False))
        )
        return f'<div class="roomy">{wide_one}</div><div class="narrow">{narrow_one}</div>'
    return _drawn(draw, name, title, x_label, y_label, wide, has_whole_x)


def _drawn(
    draw: Callable[[Axes], None],
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    wide: bool,
    has_whole_x: bool,
) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with mpl.rc_context({**_RC, "svg.hashsalt": name}), warnings.catch_warnings():
        # Only measured with matplotlib's font: the page's font has the letters it lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(11.2, 3.2) if wide else _SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True, axis="y")
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(12 if wide else 5, integer=has_whole_x))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        return _inline(figure, name, title)


def _add_legend(axes: Axes) -> None:
    # Above the curves, where it hides nothing; searching the best place inside takes long.
    is_wide = axes.bbox.width / axes.figure.dpi > _SIZE[0]
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=4 if is_wide else 3,
        borderaxespad=0.7,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _tick(value: float) -> str:
    """1200 -> 1,200; 250000 -> 250k; 0.0004 -> 4e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.01:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _inline(figure: Figure, name: str, title: str) -> str:
    buffer = io.StringIO()
    # No metadata: it would bring foreign addresses and the time of drawing.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    head_end = body.index(">") + 1
    view = re.search(r'viewBox="([^"]+)"', body[:head_end])
    assert view is not None, "matplotlib's SVG has a viewBox"
    body = body[head_end:]
    # Its style sheet would hold for the whole page; the page has those two lines itself.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]+)?", "var(--font)", body)
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(title)}">{body.strip()}'

"""Plots of the paper's tables as image files, by matplotlib's figure objects, in one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_shards.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")

# Told apart by the colour-blind and in grey (Okabe and Ito 2008), and each with a mark of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D00",
            "#7F7F7F")  # fmt: skip
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "savefig.facecolor": "white",  # legible on a dark page, too
    "svg.fonttype": "none",
    "svg.hashsalt": "babelray",
    "text.parse_math": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
_PANEL_INCHES = (4.4, 3.2)
_LEGEND_INCHES = 0.17  # a line of it
_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: in the legend; empty for none.
        low, high: of each point, an interval around y; empty for none.
        look: number of the colour and mark; by default the place in the panel.
        style: measured points joined by a line, or by a broken one (a variant of what has the same
            look), points only, or a line without points (theory).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    look: int | None = None
    style: Literal["line", "variant", "points", "theory"] = "line"


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``x_ticks`` names places on the x axis (a category each)."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    x_ticks: dict[float, str] = field(default_factory=dict)


def write_charts(
    file: Path,
    panels: Sequence[Panel],
    *,
    title: str = "",
    panels_a_row: int = 2,
    legend: Literal["inside", "below"] = "inside",
) -> None:
    """Draw panels side by side and write them; the same panels give the same file.

    ``legend``: inside each panel, or below, where it hides nothing: one for all panels if they
    have the same series, else one for each.

    Raises:
        UserError: the file cannot be written, or its ending is none of ``FORMATS``.
    """
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"{file}: an image ends in {', '.join(FORMATS)}")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    across = min(panels_a_row, len(panels))
    down = math.ceil(len(panels) / across)
    with mpl.rc_context(_RC):
        shared = len({tuple(one.name for one in panel.series) for panel in panels}) == 1
        height = _PANEL_INCHES[1] * down + (0.3 if title else 0.0)
        if legend == "below" and not shared:
            height += down * _LEGEND_INCHES * max(len(panel.series) for panel in panels)
        figure = Figure(figsize=(_PANEL_INCHES[0] * across, height), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index < len(panels):
                _draw(axes, panels[index])
            else:
                axes.set_axis_off()
        if legend == "below" and shared:
            handles = grid.flat[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=2 * across)
        else:
            for axes, panel in zip(grid.flat, panels, strict=False):
                if any(one.name for one in panel.series):
                    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 1}
                    axes.legend(**(below if legend == "below" else {}))
        if title:
            figure.suptitle(title, fontsize=11)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        metadata = {"Title": title or panels[0].title, **undated.get(file.suffix.lower(), {})}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=_DOTS_PER_INCH, metadata=metadata)
        except OSError as error:
            raise UserError(
                f"the image cannot be written: {file}: {error.strerror}: choose another place"
            ) from None


def _draw(axes: Axes, panel: Panel) -> None:
    for place, one in enumerate(panel.series):
        look = place if one.look is None else one.look
        colour, mark = _COLOURS[look % len(_COLOURS)], _MARKS[look % len(_MARKS)]
        if one.style == "theory":
            axes.plot(one.x, one.y, color=colour, linestyle="--", linewidth=1.0, label=one.name)
            continue
        axes.plot(
            one.x,
            one.y,
            color=colour,
            marker=mark,
            markersize=4.5,
            linewidth=1.5,
            linestyle={"line": "-", "variant": "--"}.get(one.style, "none"),
            label=one.name,
        )
        if len(one.low):
            if one.style != "points":
                axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.15, linewidth=0)
            else:
                axes.vlines(one.x, one.low, one.high, color=colour, linewidth=1.2)
    if panel.x_log:
        axes.set_xscale("log", base=2)
    if panel.y_log:
        axes.set_yscale("log")
    for axis, is_log in ((axes.xaxis, panel.x_log), (axes.yaxis, panel.y_log)):
        if is_log:  # its own formatter writes powers in the markup that is switched off above
            axis.set_major_formatter(_tick)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks), list(panel.x_ticks.values()), rotation=35, ha="right")


def _tick(value: float, _: object) -> str:
    """A place on a logarithmic axis: 0.01; 4,096; 1e-12."""
    return f"{value:,.4g}" if 1e-3 <= value < 1e6 else f"{value:.0e}"

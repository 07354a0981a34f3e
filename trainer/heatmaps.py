"""Attention maps as image files, by matplotlib's figure objects: no global setting is changed.

Shapes: Q queries (rows), K keys (columns).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_shards.errors import UserError
from trainer.attention import SPACE, AttentionMaps, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FORMATS = (".png", ".svg", ".pdf")

_FONT = "DejaVu Sans"  # comes with matplotlib
# One hue from light to dark: read alike in print, in grey and by the colour-blind.
_COLOURS = "Blues"
_RC = {
    "font.size": 9,
    "text.parse_math": False,  # a piece may hold a dollar sign
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
    "svg.fonttype": "none",  # the viewer's fonts have what ours lack
    "svg.hashsalt": "attention",
}
_DOTS_PER_INCH = 160
# Above this many cells a vector file takes each map as a picture.
_VECTOR_CELLS = 12_000
# Up to this many pieces a side the cells of a single map show their number.
_NUMBERED_PIECES = 24
# More maps than this are thumbnails: labels would be too small to read.
_LABELLED_PANELS = 16


@dataclass(frozen=True)
class Panel:
    """One map of a picture."""

    title: str
    weights: npt.NDArray[np.floating[Any]]
    """[Q, K]"""


def select(maps: AttentionMaps, kind: Kind, layer: int | None, head: int | str) -> list[Panel]:
    """The maps to draw, layer by layer.

    Args:
        layer: a layer's number from 1; None for all.
        head: a head's number from 1, "all", or "mean" for the mean over heads.

    Raises:
        UserError: the model has no such attention, layer or head.
    """
    if kind not in maps.kinds:
        raise UserError(
            f"--kind {kind}: this model has no self-attention, only --kind {', '.join(maps.kinds)}"
        )
    weights_LHQK = maps.labelled(kind)[0].numpy()
    num_layers, num_heads = weights_LHQK.shape[:2]
    if layer is not None and not 1 <= layer <= num_layers:
        raise UserError(
            f"--layer {layer}: the {'encoder' if kind == 'encoder' else 'decoder'} has layers "
            f"1 to {num_layers}: give one of them, or all"
        )
    if isinstance(head, int) and not 1 <= head <= num_heads:
        raise UserError(
            f"--head {head}: a layer has heads 1 to {num_heads}: give one of them, all or mean"
        )
    panels = []
    for number in range(1, num_layers + 1) if layer is None else [layer]:
        weights_HQK = weights_LHQK[number - 1]
        if head == "mean":
            mean = f", mean of {num_heads} heads" if num_heads > 1 else ""
            panels.append(Panel(f"layer {number}{mean}", weights_HQK.mean(0)))
            continue
        heads = [head] if isinstance(head, int) else range(1, num_heads + 1)
        panels += [Panel(f"layer {number}, head {one}", weights_HQK[one - 1]) for one in heads]
    return panels


def write_image(
    file: Path,
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_name: str,
    column_name: str,
    panels_a_row: int | None = None,
    value_name: str = "attention weight",
    least_number: float = 0.095,
) -> None:
    """Draw maps with a common colour scale and write them to ``file``.

    Pieces label the rows and columns of up to 16 maps, a dot in front of those that begin a word;
    more maps are drawn small, without labels.
    A character that no installed font has is drawn as a box, with a warning that names it; an SVG
    keeps it for the viewer's fonts.

    Args:
        file: its ending, one of ``FORMATS``, is the format.
        panels: maps, all of one shape.
        rows: Q pieces.
        columns: K pieces.
        title: stands above the picture, and in the file as its title.
        row_name, column_name: what the pieces of rows and columns are.
        panels_a_row: by default as many as make a picture of a handy shape.
        value_name: what the cells' values are, from 0 to 1.
        least_number: the least value that is also written into its cell, in per cent.

    Raises:
        UserError: the file cannot be written, or has another ending.
    """
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"{file}: an image ends in {', '.join(FORMATS)}")
    import matplotlib as mpl

    rows, columns = ([piece.replace(SPACE, "\u00b7") for piece in side] for side in (rows, columns))
    families, lacking = _fonts("".join((*rows, *columns, title)))
    if lacking and file.suffix.lower() != ".svg":
        log.warning("no installed font has %s: drawn as boxes", " ".join(sorted(lacking)))
        boxes = str.maketrans(dict.fromkeys(lacking, "\u25a1"))
        rows = [piece.translate(boxes) for piece in rows]
        columns = [piece.translate(boxes) for piece in columns]
        title = title.translate(boxes)
    with mpl.rc_context({**_RC, "font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        across = panels_a_row or _panels_a_row(len(panels), len(columns))
        figure = _figure(panels, rows, columns, title, (row_name, column_name, value_name), across)
        if len(panels) == 1 and max(len(rows), len(columns)) <= _NUMBERED_PIECES:
            _add_numbers(figure.axes[0], panels[0], least_number)
        _save(figure, file, title)


def _figure(
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    names: tuple[str, str, str],
    across: int,
) -> Figure:
    from matplotlib.figure import Figure

    is_labelled = len(panels) <= _LABELLED_PANELS
    down = math.ceil(len(panels) / across)
    cell = _cell_inches(max(len(rows), len(columns)), len(panels))
    letters = 0.62 * _font_points(cell) / 72 if is_labelled else 0.0
    margins = letters * max(map(len, rows)), letters * max(map(len, columns))
    width = across * (cell * len(columns) + 0.12) + margins[0] + 1.5
    height = down * (cell * len(rows) + 0.35 + margins[1]) + 0.9
    figure = Figure(figsize=(max(width, 4.2), max(height, 2.6)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    top = max(float(panel.weights.max()) for panel in panels)
    mesh = None
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_axis_off()
            continue
        mesh = _draw_map(axes, panels[index], top, rasterize=len(panels) * len(rows) * len(columns))
        if len(panels) > 1:
            # Below: above, the columns' labels are.
            axes.set_xlabel(panels[index].title, fontsize=9)
        _label(
            axes,
            rows if is_labelled and index % across == 0 else [],
            columns if is_labelled else [],
            _font_points(cell),
        )
    figure.suptitle(f"{title}, {panels[0].title}" if len(panels) == 1 else title, fontsize=10)
    figure.supxlabel(f"columns: {names[1]}   ·   rows: {names[0]}", fontsize=8.5)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=grid, shrink=0.8, aspect=28, pad=0.015)
    bar.set_label(names[2], fontsize=8.5)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    return figure


def _panels_a_row(num_panels: int, num_columns: int) -> int:
    """Rows of four, or of three where those come out even; of two where maps are wide."""
    if num_columns > 30:
        return min(num_panels, 2)
    return min(num_panels, 3 if num_panels % 3 == 0 and num_panels % 4 else 4)


def _cell_inches(num_pieces: int, num_panels: int) -> float:
    """Side of a cell: large where there is room, never too small for its label."""
    if num_panels > _LABELLED_PANELS:
        return min(0.11, 2.2 / num_pieces)
    room = 7.0 if num_panels == 1 else 3.2
    return min(max(room / num_pieces, 0.125), 0.32)


def _font_points(cell_inches: float) -> float:
    return min(9.0, 0.78 * 72 * cell_inches)


def _draw_map(axes: Axes, panel: Panel, top: float, *, rasterize: int) -> Any:
    num_rows, num_columns = panel.weights.shape
    mesh = axes.pcolormesh(
        panel.weights,
        cmap=_COLOURS,
        vmin=0.0,
        vmax=top,
        rasterized=rasterize > _VECTOR_CELLS,
        edgecolors="white" if max(num_rows, num_columns) <= _NUMBERED_PIECES else "face",
        linewidth=0.3,
    )
    axes.set_ylim(num_rows, 0)
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_color("#999999")
        spine.set_linewidth(0.5)
    return mesh


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str], points: float) -> None:
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=points)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=points, rotation=90)
    axes.tick_params(length=0, pad=2, top=False, labeltop=True, bottom=False, labelbottom=False)


def _add_numbers(axes: Axes, panel: Panel, least: float) -> None:
    top = float(panel.weights.max())
    for row, column in np.argwhere(panel.weights >= least):
        weight = float(panel.weights[row, column])
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{100 * weight:.0f}",
            ha="center",
            va="center_baseline",
            fontsize=7.5,
            color="white" if weight > 0.55 * top else "black",
        )


def _fonts(text: str) -> tuple[list[str], set[str]]:
    """Families that have the text's characters between them, and the characters none has."""
    from matplotlib import font_manager, ft2font

    lacking = {character for character in text if not character.isspace()}
    families: list[str] = []
    for entry in sorted(
        font_manager.fontManager.ttflist,
        key=lambda entry: (entry.name != _FONT, entry.style != "normal", entry.name),
    ):
        if not lacking:
            break
        # The last resort has a box for each character there is.
        if entry.name in families or entry.name.startswith("Last Resort"):
            continue
        try:
            covered = ft2font.FT2Font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # a format of font that matplotlib does not read
            continue
        found = {character for character in lacking if ord(character) in covered}
        if found:
            families.append(entry.name)
            lacking -= found
    return families or [_FONT], lacking


def _save(figure: Figure, file: Path, title: str) -> None:
    # Without the date, so that the same maps give the same file.
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(file.suffix.lower(), {})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=_DOTS_PER_INCH, metadata={"Title": title, **undated})
    except OSError as error:
        raise UserError(
            f"the image cannot be written: {file}: {error.strerror}: choose another --output"
        ) from None

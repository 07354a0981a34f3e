"""The plots of a result of table 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trainer.paper.charts import Panel, Series, write_charts
from trainer.paper.table1_layers import LAYERS

# The colour and mark that a layer has in every plot.
_LOOKS = {
    name: look
    for look, name in enumerate(
        (
            "attention",
            "attention-fused",
            "attention-projected",
            "attention-banded",
            "rnn",
            "lstm",
            "convolution",
            "convolution-dilated",
            "gru",
        )
    )
}
# Whose time and memory are drawn.
_DRAWN = (
    "attention",
    "attention-fused",
    "attention-projected",
    "attention-banded",
    "rnn",
    "lstm",
    "convolution",
)
_MODES = {"forward": "forward", "training": "forward and backward"}
# Its gradient lies on the GRU's.
_HIDES = "recurrence (LSTM)"
NAMES = ("path", "gradient", "time", "crossing", "memory")


def write_all(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``table1-<name>.svg`` for all of ``NAMES``.

    Raises:
        UserError: a file cannot be written.
    """
    drawn = {
        "path": (_path_panels(result), "Sequential steps and longest paths"),
        "gradient": (_gradient_panels(result), "How far a gradient reaches, untrained"),
        "time": (_sweeps(result, "times", "seconds", "CPU time, ms", 1e3), "CPU time, one thread"),
        "crossing": (_crossing_panels(result), "Self-attention against recurrence"),
        "memory": (_sweeps(result, "memory", "bytes", "MB", 1e-6), "Peak memory of a layer"),
    }
    files = []
    for name in NAMES:
        panels, title = drawn[name]
        files.append(folder / f"table1-{name}.svg")
        write_charts(files[-1], panels, title=title, legend="below")
    return files


def _path_panels(result: Mapping[str, Any]) -> list[Panel]:
    layers = result["layers"]
    chains, paths = [], []
    names = ("attention", "rnn", "lstm", "convolution", "convolution-dilated", "attention-banded")
    for name in names:
        layer, look = layers[name], _LOOKS[name]
        if not LAYERS[name].dilated:  # one layer is as any convolution
            chain = layer["chain"]
            chains.append(Series(layer["label"], chain["n"], chain["length"], look=look))
        if name != "lstm":  # as the RNN
            path = layer["path"]
            label = layer["label"].replace(" (RNN)", "")
            paths.append(Series(label, path["n"], path["length"], look=look))
    return [
        Panel("steps one after another", "length n", "operations", chains, x_log=True, y_log=True),
        Panel("longest path", "length n", "layers, or cells", paths, x_log=True, y_log=True),
    ]


def _gradient_panels(result: Mapping[str, Any]) -> list[Panel]:
    single: list[Series] = []
    stacks: list[Series] = []
    for one in result["strengths"]:
        layer = LAYERS[one["layer"]]
        places = range(0, len(one["values"]), 8)
        values = [one["values"][place] for place in places]
        look = _LOOKS[one["layer"]]
        if layer.cell is not None or one["layer"] == "attention-projected":
            again = any(series.look == look for series in single)
            label = one["label"] + (", nearly as the GRU" if one["label"] == _HIDES else "")
            style: Literal["line", "variant"] = "variant" if again else "line"
            single.append(Series(label, places, values, look=look, style=style))
        if layer.cell is None:
            label = f"{one['label']}, {one['depth']} layer{'s' * (one['depth'] > 1)}"
            stacks.append(Series(label, places, values, look=look))
    x, y = "distance in positions", "norm of the gradient"
    return [
        Panel("one layer", x, y, single, y_log=True),
        Panel("the shortest stack that connects all", x, y, stacks, y_log=True),
    ]


def _sweeps(
    result: Mapping[str, Any], which: str, value: str, unit: str, scale: float
) -> list[Panel]:
    sizes = result["sizes"]
    panels = []
    for mode, mode_name in _MODES.items():
        for size, other in (("n", "d"), ("d", "n")):
            held = sizes[f"at_{other}"]
            series = []
            for name in _DRAWN:
                rows = [
                    row
                    for row in result[which]
                    if (row["layer"], row["mode"], row[other]) == (name, mode, held)
                    and row[size] in sizes[f"time_{size}"]
                ]
                rows.sort(key=lambda row: int(row[size]))
                series.append(
                    Series(
                        LAYERS[name].label,
                        [row[size] for row in rows],
                        [row[value] * scale for row in rows],
                        look=_LOOKS[name],
                    )
                )
            words = {"n": "length n", "d": "width d"}
            title = f"{mode_name}, {other} = {held}"
            panels.append(Panel(title, words[size], unit, series, x_log=True, y_log=True))
    return panels


def _crossing_panels(result: Mapping[str, Any]) -> list[Panel]:
    sizes = result["sizes"]
    panels = []
    for d in sizes["crossing_d"]:
        series = []
        for name in ("attention", "attention-projected", "rnn", "lstm"):
            rows = [
                row
                for row in result["times"]
                if (row["layer"], row["mode"], row["d"]) == (name, "forward", d)
                and row["n"] in sizes["crossing_n"]
            ]
            rows.sort(key=lambda row: int(row["n"]))
            x, y = [row["n"] for row in rows], [row["seconds"] * 1e3 for row in rows]
            series.append(Series(LAYERS[name].label, x, y, look=_LOOKS[name]))
        title = f"forward, d = {d}"
        panels.append(Panel(title, "length n", "CPU time, ms", series, x_log=True, y_log=True))
    return panels

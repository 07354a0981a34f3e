"""What the committed dashboards ask of Prometheus: every expression, and what it needs to answer.

For tests, and for whoever changes a metric. Reads the JSON; needs no Grafana package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
DASHBOARDS = MONITORING / "dashboards"
NAMES = ("run", "cluster", "data", "reliability")

Needs = Literal["gpu", "scores", "fault"]

# Rows, by the start of their title, and panels that stay empty without something.
_ROWS: dict[str, Needs] = {"GPUs": "gpu", "Scores": "scores"}
PANELS: dict[str, Needs] = {"From a failure to the next update": "fault"}

_WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Expression:
    """One query of a dashboard.

    Attributes:
        needs: without which it returns nothing on a healthy run: ``gpu`` a GPU (or an energy
            meter), ``scores`` BLEU being computed, ``fault`` something that went wrong; None if it
            always returns data while a run trains that has validated and saved, and Prometheus
            reads Ray's metrics, too.
    """

    dashboard: str
    panel: str
    expr: str
    needs: Needs | None

    def filled(self, *, run: str, instance: str = ".*", window: str = "1m") -> str:
        """The query as Grafana sends it: variables replaced by regular expressions."""
        replaced = self.expr.replace(_WINDOW, window)
        replaced = re.sub(r"\$run\b", lambda _: run, replaced)
        return re.sub(r"\$instance\b", lambda _: instance, replaced)


def load(name: str) -> dict[str, Any]:
    """A committed dashboard."""
    made: dict[str, Any] = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
    return made


def panels(dashboard: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel that draws something, with the title of its row."""
    row = ""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield row, panel
            continue
        row = panel["title"]
        for inner in panel.get("panels") or ():
            yield row, inner


def expressions() -> list[Expression]:
    """Every query of the four dashboards, annotations included."""
    found = []
    for name in NAMES:
        dashboard = load(name)
        for row, panel in panels(dashboard):
            of_row = next((needs for start, needs in _ROWS.items() if row.startswith(start)), None)
            needs = PANELS.get(panel["title"], of_row)
            found += [
                Expression(name, panel["title"], target["expr"], needs)
                for target in panel["targets"]
            ]
        for annotation in dashboard["annotations"]["list"]:
            title = f"annotation {annotation['name']}"
            found.append(Expression(name, title, annotation["expr"], "fault"))
    return found

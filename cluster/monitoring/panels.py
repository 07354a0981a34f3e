"""The few kinds of panel that the dashboards are made of, and how they lie on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as cm
from grafana_foundation_sdk.models import dashboard as dm
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "babelray"
TITLES = {
    "run": "Run",
    "cluster": "Cluster",
    "data": "Data",
    "reliability": "Reliability",
}
SOURCE = dm.DataSourceRef(type_val="prometheus", uid="${datasource}")

_WIDTH = 24
# The panels of its default dashboard that Ray's overview page embeds, by these numbers: the nodes,
# and how busy they are. A dashboard may stand in for Ray's (RAY_GRAFANA_DEFAULT_DASHBOARD_UID) if
# it has them.
RAY_NODES_ID, RAY_UTILIZATION_ID = 24, 41

Step = tuple[float | None, str]  # from this value on (None: from below), this colour
Query = tuple[str, str]  # expression, legend
Mapping = tuple[int, str, str]  # value, text, colour


@dataclass
class Row:
    """Panels under a heading. ``needs`` keys the rows that stay empty without what they need."""

    title: str
    panels: list[Builder[dm.Panel]] = field(default_factory=list)
    collapsed: bool = False


def _thresholds(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    made = [dm.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(dm.ThresholdsMode.ABSOLUTE).steps(made)


def _mappings(states: Sequence[Mapping]) -> list[dm.ValueMapping]:
    results = {
        str(value): dm.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, text, color) in enumerate(states)
    }
    return [dm.ValueMap(options=results)]


def _query(expr: str, legend: str, index: int) -> prometheus.Dataquery:
    ref = chr(ord("A") + index)
    made = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend)
    return made.ref_id(ref).range()


def number(
    title: str,
    description: str,
    expr: str,
    unit: str,
    *,
    legend: str = "{{run}}",
    steps: Sequence[Step] | None = None,
    states: Sequence[Mapping] = (),
    decimals: int | None = None,
    width: int = 3,
    sparkline: bool = False,
) -> stat.Panel:
    """One number, the newest; coloured by ``steps`` where the colour says good or bad."""
    made = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .with_target(_query(expr, legend, 0))
        .unit(unit)
        .span(width)
        .height(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .color_mode(cm.BigValueColorMode.VALUE)
        .graph_mode(cm.BigValueGraphMode.AREA if sparkline else cm.BigValueGraphMode.NONE)
        .text_mode(cm.BigValueTextMode.AUTO)
        .thresholds(_thresholds(steps or [(None, "text")]))
    )
    if states:
        made = made.mappings(_mappings(states)).color_mode(cm.BigValueColorMode.BACKGROUND)
    return made if decimals is None else made.decimals(decimals)


def curve(
    title: str,
    description: str,
    queries: Iterable[Query],
    unit: str,
    *,
    width: int = 12,
    stacked: bool = False,
    style: Literal["line", "bars", "points"] = "line",
    log: bool = False,
    least: float | None = None,
    most: float | None = None,
    steps: Sequence[Step] | None = None,
    colors: dict[str, str] | None = None,
    decimals: int | None = None,
) -> timeseries.Panel:
    """Curves over time, with the newest, least and greatest value in the legend.

    Args:
        stacked: lay the curves on each other.
        steps: dashed lines where it becomes good or bad.
        colors: of curves by their legend.
    """
    drawn = {
        "line": cm.GraphDrawStyle.LINE,
        "bars": cm.GraphDrawStyle.BARS,
        "points": cm.GraphDrawStyle.POINTS,
    }
    legend = (
        common.VizLegendOptions()
        .display_mode(cm.LegendDisplayMode.TABLE)
        .placement(cm.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "min", "max"])
    )
    made = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .interval("15s")
        .legend(legend)
        .tooltip(
            common.VizTooltipOptions()
            .mode(cm.TooltipDisplayMode.MULTI)
            .sort(cm.SortOrder.DESCENDING)
        )
        .draw_style(drawn[style])
        .line_width(1)
        .fill_opacity(60 if stacked or style == "bars" else 8)
        .show_points(cm.VisibilityMode.AUTO)
    )
    for index, (expr, name) in enumerate(queries):
        made = made.with_target(_query(expr, name, index))
    if stacked:
        stacking = common.StackingConfig().mode(cm.StackingMode.NORMAL).group("A")
        made = made.stacking(stacking)
    if log:
        scale = common.ScaleDistributionConfig().type(cm.ScaleDistribution.LOG).log(10)
        made = made.scale_distribution(scale)
    if least is not None:
        made = made.min(least)
    if most is not None:
        made = made.max(most)
    if steps is not None:
        lines = common.GraphThresholdsStyleConfig().mode(cm.GraphThresholdsStyleMode.DASHED)
        made = made.thresholds(_thresholds(steps)).thresholds_style(lines)
    for name, color in (colors or {}).items():
        fixed = dm.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})
        made = made.override_by_name(name, [fixed])
    return made if decimals is None else made.decimals(decimals)


def bars(
    title: str,
    description: str,
    queries: Iterable[Query],
    unit: str,
    *,
    width: int = 12,
    least: float = 0,
    most: float | None = None,
    steps: Sequence[Step] | None = None,
) -> bargauge.Panel:
    """One bar for each series as it is now, to compare ranks or machines."""
    made = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .orientation(cm.VizOrientation.HORIZONTAL)
        .display_mode(cm.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(_thresholds(steps or [(None, "blue")]))
        .min(least)
    )
    for index, (expr, name) in enumerate(queries):
        made = made.with_target(_query(expr, name, index).instant())
    return made if most is None else made.max(most)


def states(
    title: str,
    description: str,
    queries: Iterable[Query],
    mappings: Sequence[Mapping],
    *,
    width: int = 12,
) -> statetimeline.Panel:
    """What was the case when: one band for each series."""
    made = (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(width)
        .height(8)
        .unit("short")
        .mappings(_mappings(mappings))
        .merge_values(True)
        .show_value(cm.VisibilityMode.AUTO)
        .row_height(0.9)
        .legend(common.VizLegendOptions().display_mode(cm.LegendDisplayMode.LIST).show_legend(True))
    )
    for index, (expr, name) in enumerate(queries):
        made = made.with_target(_query(expr, name, index))
    return made


def listing(
    title: str, description: str, expr: str, *, hidden: Sequence[str], width: int = 12
) -> table.Panel:
    """A table of labels: one line for each series as it is now."""
    excluded = dict.fromkeys(("Time", "Value", "__name__", "instance", "job", *hidden), True)
    organize = dm.DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": excluded, "indexByName": {}, "renameByName": {}},
    )
    query = _query(expr, "", 0).instant().format(PromQueryFormat.TABLE)
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit("short")
        .span(width)
        .height(6)
        .with_target(query)
        .with_transformation(organize)
    )


def _variables(name: str) -> list[Builder[dm.VariableModel]]:
    made: list[Builder[dm.VariableModel]] = [
        dashboard.DatasourceVariable("datasource")
        .label("Prometheus")
        .description("Ray's dashboard sets it where it embeds this one.")
        .type("prometheus"),
        dashboard.QueryVariable("run")
        .label("Run")
        .description("Runs that trained in the chosen time.")
        .datasource(SOURCE)
        .query({"query": "label_values(babelray_steps_total, run)", "refId": "run"})
        .refresh(dm.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dm.VariableSort.NATURAL_ASC)
        .multi(True),
    ]
    if name == "cluster":
        hosts = 'label_values({__name__=~"babelray_live_ranks|ray_node_cpu_count"}, instance)'
        made.append(
            dashboard.QueryVariable("instance")
            .label("Machine")
            .description("Address of a machine, without the port.")
            .datasource(SOURCE)
            .query({"query": hosts, "refId": "instance"})
            .regex("/^(.*?)(?::[0-9]+)?$/")
            .refresh(dm.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dm.VariableSort.NATURAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(dm.VariableOption(selected=True, text=["All"], value=["$__all"]))
        )
    address = "http://127.0.0.1:8265"
    made.append(
        dashboard.TextBoxVariable("ray")
        .label("Ray dashboard")
        .description("Where the link at the top leads.")
        .default_value(address)
        .current(dm.VariableOption(selected=True, text=address, value=address))
    )
    return made


def _links() -> list[Builder[dm.DashboardLink]]:
    others = (
        dashboard.DashboardLink("babelray")
        .type(dm.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
    ray = (
        dashboard.DashboardLink("Ray dashboard")
        .type(dm.DashboardLinkType.LINK)
        .url("${ray:raw}")
        .icon("external link")
        .tooltip("Jobs, actors and logs of the Ray cluster")
        .target_blank(True)
    )
    return [others, ray]


def _annotations() -> list[Builder[dm.AnnotationQuery]]:
    restarts = 'sum by (run, cause) (increase(babelray_restarts_total{run=~"$run"}[1m])) > 0'
    alerts = 'ALERTS{alertname=~"Babelray.*",alertstate="firing",run=~"$run|"}'
    return [
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(color)
        .expr(expr)
        for name, color, expr in (("Restarts", "orange", restarts), ("Alerts", "red", alerts))
    ]


def assemble(name: str, description: str, rows: Sequence[Row]) -> dm.Dashboard:
    """Lay the rows out, number the panels and add what all dashboards have.

    Panels flow from left to right and start a new line where one does not fit. A number that a
    panel already has is kept.
    """
    built = [(row, [panel.build() for panel in row.panels]) for row in rows]
    taken = {panel.id_val for _, panels in built for panel in panels if panel.id_val}
    taken |= {RAY_NODES_ID, RAY_UTILIZATION_ID}
    ids = (number for number in range(1, 1000) if number not in taken)
    made = (
        dashboard.Dashboard(f"babelray: {TITLES[name]}")
        .uid(f"{TAG}-{name}")
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .tooltip(dm.DashboardCursorSync.CROSSHAIR)
        .time("now-3h", "now")
        .refresh("30s")
        .variables(_variables(name))
        .links(_links())
        .annotations(_annotations())
        .editable()
        .build()
    )
    made.panels = []
    y = 0
    for row, panels in built:
        head = dm.RowPanel(
            title=row.title,
            collapsed=row.collapsed,
            id_val=next(ids),
            grid_pos=dm.GridPos(x=0, y=y, w=_WIDTH, h=1),
        )
        made.panels.append(head)
        bottom = _place(panels, y + 1)
        for panel in panels:
            panel.id_val = panel.id_val or next(ids)
        if row.collapsed:
            head.panels = panels
            y += 1
        else:
            made.panels.extend(panels)
            y = bottom
    return made


def _place(panels: Sequence[dm.Panel], y: int) -> int:
    """Give each panel its place from line ``y`` down; the first free line under them."""
    x, height = 0, 0
    for panel in panels:
        position = panel.grid_pos
        assert position is not None
        if x + position.w > _WIDTH:
            x, y, height = 0, y + height, 0
        position.x, position.y = x, y
        x, height = x + position.w, max(height, position.h)
    return y + height

"""The Grafana dashboards of the chart, made with Grafana's own SDK.

`python charts/dashboards.py --write` writes `charts/moeserving/dashboards/*.json`, `--check` compares them and ends
with status 1 when one is stale (`make generate`, `make verify`).
"""

import sys
from pathlib import Path
from typing import Any

from dashboard_panels import EXPERTS, FLEET, REQUESTS, Dashboard, Panel
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from moe_contract.generated_files import read_choice, write_or_check

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("charts/moeserving/dashboards")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")


DASHBOARDS = (FLEET, REQUESTS, EXPERTS)


def render_dashboard(shown: Dashboard) -> str:
    """The dashboard as Grafana imports it (JSON)."""
    built = (
        dashboard.Dashboard(shown.title)
        .uid(f"moeserving-{shown.name}")
        .description(shown.text)
        .tags(["moeserving"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Other dashboards of MoEServing")
            .tags(["moeserving"])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "label_values(moeserving_gateway_held_requests, namespace)"))
        .with_variable(
            _variable(
                "resource", "Resource", 'label_values(moeserving_gateway_held_requests{namespace="$namespace"}, pod)'
            ).regex("/^(.+?)-gateway(-[a-z0-9]+){1,2}$/")
        )
    )
    for heading, panels in shown.rows.items():
        built = built.with_row(dashboard.Row(heading))
        for panel in panels:
            built = built.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    return variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


def _panel(panel: Panel) -> Any:
    kinds = {"timeseries": _time_series, "stat": _stat, "table": _table}
    built = kinds[panel.kind](panel)
    built = built.title(panel.title).description(panel.text).span(panel.width).height(8).datasource(SOURCE)
    for number, (legend, query) in enumerate(panel.queries.items()):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + number))
        if panel.kind != "timeseries":
            kind = PromQueryFormat.TABLE if panel.kind == "table" else PromQueryFormat.TIME_SERIES
            target = target.instant().format(kind)
        built = built.with_target(target)
    return built


def _time_series(panel: Panel) -> Any:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    legend = legend.show_legend(True)
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    built = timeseries.Panel().unit(panel.unit).min(0).fill_opacity(10).legend(legend).tooltip(tooltip)
    if panel.most is not None:
        built = built.max(panel.most)
    if panel.is_stacked:
        built = built.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return built


def _stat(panel: Panel) -> Any:
    return stat.Panel().unit(panel.unit).color_mode(BigValueColorMode.NONE)


def _table(panel: Panel) -> Any:
    return table.Panel()


def main(arguments: list[str] | None = None) -> int:
    """Runs `--write` or `--check`; returns the exit status."""
    program, description = "python charts/dashboards.py", "The chart's dashboards."
    choice = read_choice(arguments, program=program, description=description, root=ROOT)
    files = {FOLDER / f"{shown.name}.json": render_dashboard(shown) for shown in DASHBOARDS}
    return write_or_check(files, choice)


if __name__ == "__main__":
    sys.exit(main())

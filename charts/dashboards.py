"""The Grafana dashboards of the chart, made with Grafana's own SDK.

`python charts/dashboards.py --write` writes `charts/moeserving/dashboards/*.json`, `--check` compares them and ends
with status 1 when one is stale (`make generate`, `make verify`).

Queries find the pods of a resource by the labels `namespace` and `pod`, which every usual scrape configuration sets, as
the autoscaler does.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("charts/moeserving/dashboards")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GATEWAY = '{namespace="$namespace",pod=~"$resource-gateway(-[a-z0-9]+){1,2}"}'
ENGINE = '{namespace="$namespace",pod=~"$resource-engine(-canary|-prefill|-decode)?(-[a-z0-9]+){1,2}"}'
RESOURCE = '{resource_namespace="$namespace",resource="$resource"}'
# Four scrapes of the monitors that the operator makes fit into it at any zoom.
WINDOW = "[$__rate_interval]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        text: how to read it.
        queries: legend and PromQL of each series or group of series.
        unit: Grafana's name of the unit.
        width: of 24.
        kind: `timeseries`, `stat` or `table`.
        most: upper end of the axis; None: that of the data.
        is_stacked: whether the series add up.
    """

    title: str
    text: str
    queries: Mapping[str, str]
    unit: str = "short"
    width: int = 12
    kind: str = "timeseries"
    most: float | None = None
    is_stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard: its rows of panels, each under a heading."""

    name: str
    title: str
    text: str
    rows: Mapping[str, tuple[Panel, ...]] = field(default_factory=dict)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels."""
        return tuple(panel for row in self.rows.values() for panel in row)


def quantiles(metric: str) -> dict[str, str]:
    """Three quantiles of a histogram of the gateways."""
    return {
        f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) (rate({metric}_bucket{GATEWAY}{WINDOW})))"
        for percent in (50, 95, 99)
    }


FLEET = Board(
    name="fleet",
    title="MoEServing: fleet",
    text="Engines and gateways of one resource: whether they work, what they hold, and what is wrong.",
    rows={
        "Now": (
            Panel(
                title="Engines that take work",
                text="Engines whose agent says that they accept requests.",
                queries={"engines": f"sum(moeserving_engine_accepting{ENGINE})"},
                width=4,
                kind="stat",
            ),
            Panel(
                title="Gateways",
                text="Gateways that are scraped.",
                queries={"gateways": f"count(moeserving_gateway_held_requests{GATEWAY})"},
                width=4,
                kind="stat",
            ),
            Panel(
                title="Held requests",
                text="Requests that wait in the gateways because all engines are saturated, or none is there.",
                queries={"held": f"sum(moeserving_gateway_held_requests{GATEWAY})"},
                width=4,
                kind="stat",
            ),
            Panel(
                title="Conditions",
                text="The condition Ready, and all others that hold or want a person to act. Needs the operator's "
                "metrics (the chart's `serviceMonitor.enabled`).",
                queries={"": f"max by (condition, status, reason) (moeserving_operator_condition{RESOURCE})"},
                width=12,
                kind="table",
            ),
        ),
        "Load": (
            Panel(
                title="Requests in the engines",
                text="Running and waiting requests of all ranks.",
                queries={
                    "running": f"sum(moeserving_engine_running_requests{ENGINE})",
                    "waiting": f"sum(moeserving_engine_waiting_requests{ENGINE})",
                },
                is_stacked=True,
            ),
            Panel(
                title="Used KV blocks",
                text="Of the fullest rank of each engine. Near 100 % vLLM preempts requests.",
                queries={"{{pod}}": f"max by (pod) (moeserving_engine_kv_usage_ratio{ENGINE})"},
                unit="percentunit",
                most=1,
            ),
            Panel(
                title="Computed tokens",
                text="Prompt and output tokens of each engine.",
                queries={"{{pod}}": f"sum by (pod) (rate(moeserving_engine_computed_tokens_total{ENGINE}{WINDOW}))"},
                unit="short",
                is_stacked=True,
            ),
            Panel(
                title="Prompt tokens that wait",
                text="Uncached prompt tokens that each engine has still to compute.",
                queries={
                    "{{pod}}": f"sum by (pod) (moeserving_engine_waiting_prefill_tokens{ENGINE} "
                    f"+ moeserving_engine_running_prefill_tokens{ENGINE})"
                },
                is_stacked=True,
            ),
            Panel(
                title="Preemptions",
                text="Requests whose KV blocks were taken away, a second: the engine has too few of them.",
                queries={"{{pod}}": f"sum by (pod) (rate(moeserving_engine_preemptions_total{ENGINE}{WINDOW}))"},
                unit="reqps",
            ),
            Panel(
                title="Steps",
                text="Engine steps a second of the slowest rank of each engine.",
                queries={"{{pod}}": f"min by (pod) (rate(moeserving_engine_steps_total{ENGINE}{WINDOW}))"},
                unit="ops",
            ),
        ),
        "Health": (
            Panel(
                title="Phases of the engines",
                text="Number of engines in each phase; `backoff` waits before it starts vLLM again.",
                queries={"{{phase}}": f"sum by (phase) (moeserving_engine_phase{ENGINE})"},
                is_stacked=True,
            ),
            Panel(
                title="Restarts and ejections",
                text="Restarts of vLLM by its agent, and failures after which a gateway sends nothing to an engine for "
                "a while.",
                queries={
                    "restarts {{pod}}": f"sum by (pod) (increase(moeserving_engine_restarts_total{ENGINE}{WINDOW}))",
                    "ejections {{engine}}": "sum by (engine) "
                    f"(increase(moeserving_gateway_ejections_total{GATEWAY}{WINDOW}))",
                },
            ),
            Panel(
                title="Stalled engines and old signals",
                text="Targets that make no step though they have a request, and targets whose signal is too old to be "
                "used, over all gateways.",
                queries={
                    "stalled": f"sum(max by (engine, rank) (moeserving_gateway_engine_stalled{GATEWAY}))",
                    "old signal": f"sum(max by (engine, rank) (moeserving_gateway_signal_stale{GATEWAY}))",
                },
            ),
            Panel(
                title="Age of the signals",
                text="Age of the newest signal of each engine as the gateways have it.",
                queries={"{{engine}}": f"max by (engine) (moeserving_gateway_signal_age_seconds{GATEWAY})"},
                unit="s",
            ),
        ),
        "Prefill and decode apart": (
            Panel(
                title="Roles",
                text="Engines by the role that the gateway gives them (`engine.roles`).",
                queries={
                    "{{role}}": f"sum by (role) (max by (engine, role) (moeserving_gateway_engine_role{GATEWAY}))"
                },
                is_stacked=True,
            ),
            Panel(
                title="Split requests",
                text="Answers that began at another engine than the one that computed their prompt, and pairs that "
                "were left for one engine.",
                queries={
                    "transfers": f"sum(rate(moeserving_gateway_split_transfers_total{GATEWAY}{WINDOW}))",
                    "fall-back: {{reason}}": "sum by (reason) "
                    f"(rate(moeserving_gateway_split_fallbacks_total{GATEWAY}{WINDOW}))",
                },
                unit="reqps",
            ),
            Panel(
                title="Changes of roles",
                text="Engines that got another role, by reason.",
                queries={
                    "{{reason}}": f"sum by (reason) (increase(moeserving_gateway_role_changes_total{GATEWAY}{WINDOW}))"
                },
            ),
            Panel(
                title="Rate of the transfers",
                text="Measured rate of the KV transfers to each engine.",
                queries={"{{pod}}": f"max by (pod) (moeserving_engine_kv_transfer_bytes_per_second{ENGINE})"},
                unit="Bps",
            ),
        ),
    },
)

REQUESTS = Board(
    name="requests",
    title="MoEServing: requests",
    text="How fast users are served, and where and why requests wait.",
    rows={
        "Served": (
            Panel(
                title="Time to first token",
                text="From the arrival of a request at the gateway to the first token of its stream.",
                queries=quantiles("moeserving_gateway_ttft_seconds"),
                unit="s",
            ),
            Panel(
                title="Requests by status",
                text="Finished requests by HTTP status.",
                queries={"{{code}}": f"sum by (code) (rate(moeserving_gateway_requests_total{GATEWAY}{WINDOW}))"},
                unit="reqps",
                is_stacked=True,
            ),
            Panel(
                title="Prompt tokens that arrive",
                text="Estimated prompt tokens of the requests that an engine has to compute for.",
                queries={"tokens": f"sum(rate(moeserving_gateway_prompt_tokens_total{GATEWAY}{WINDOW}))"},
            ),
            Panel(
                title="Refusals",
                text="Requests that ended without an engine's answer, by outcome.",
                queries={"{{outcome}}": f"sum by (outcome) (rate(moeserving_gateway_refusals_total{GATEWAY}{WINDOW}))"},
                unit="reqps",
                is_stacked=True,
            ),
        ),
        "Waiting": (
            Panel(
                title="Held requests",
                text="Requests that wait in the gateways, and how many they hold at most.",
                queries={
                    "held": f"sum(moeserving_gateway_held_requests{GATEWAY})",
                    "limit": f"sum(moeserving_gateway_held_requests_limit{GATEWAY})",
                },
            ),
            Panel(
                title="Longest wait",
                text="Time that the longest held request waits, and the predicted wait of a new request before an "
                "engine computes it.",
                queries={
                    "held": f"max(moeserving_gateway_held_seconds{GATEWAY})",
                    "predicted for a new one": f"min(moeserving_gateway_wait_seconds{GATEWAY})",
                },
                unit="s",
            ),
        ),
        "Choice of the engine": (
            Panel(
                title="Requests in flight",
                text="Requests at each engine that have not ended.",
                queries={"{{engine}}": f"sum by (engine) (moeserving_gateway_in_flight_requests{GATEWAY})"},
                is_stacked=True,
            ),
            Panel(
                title="Choices by reason",
                text="Why an engine was chosen (docs/gateway.md has the reasons).",
                queries={"{{reason}}": f"sum by (reason) (rate(moeserving_gateway_dispatch_total{GATEWAY}{WINDOW}))"},
                unit="reqps",
                is_stacked=True,
            ),
            Panel(
                title="Error of the predicted time to first token",
                text="Predicted less measured seconds.",
                queries=quantiles("moeserving_gateway_prediction_error_seconds"),
                unit="s",
            ),
            Panel(
                title="Measured over predicted time to first token",
                text="Mean of each engine; the gateway corrects its predictions by it.",
                queries={
                    "{{engine}}": f"sum by (engine) (rate(moeserving_gateway_prediction_ratio_sum{GATEWAY}{WINDOW})) / "
                    f"sum by (engine) (rate(moeserving_gateway_prediction_ratio_count{GATEWAY}{WINDOW}))"
                },
            ),
            Panel(
                title="Further attempts",
                text="Attempts after a request's first, and streams that went on at another engine, by way.",
                queries={
                    "attempts": f"sum(rate(moeserving_gateway_retries_total{GATEWAY}{WINDOW}))",
                    "went on: {{way}}": f"sum by (way) (rate(moeserving_gateway_continuations_total{GATEWAY}{WINDOW}))",
                },
                unit="reqps",
            ),
        ),
    },
)

EXPERTS = Board(
    name="experts",
    title="MoEServing: experts",
    text="How even the experts' work is, which are hot, and what moving them won.",
    rows={
        "Balance": (
            Panel(
                title="Busiest rank over the mean",
                text="1 is even. Of all layers together; steps wait for the busiest rank.",
                queries={"{{engine}}": f"max by (engine) (moeserving_engine_expert_balance_ratio{ENGINE})"},
            ),
            Panel(
                title="Least balanced layers",
                text="The five layers with the greatest share of their busiest rank.",
                queries={"layer {{layer}}": f"topk(5, max by (layer) (moeserving_expert_balance_ratio{ENGINE}))"},
            ),
            Panel(
                title="Tokens of each rank over the mean",
                text="Ranks above 1 have more expert tokens than the others.",
                queries={"{{engine}} rank {{rank}}": f"moeserving_expert_pressure_ratio{ENGINE}"},
            ),
            Panel(
                title="Tokens whose expert is on another rank",
                text="Part of the tokens that cross the network between ranks.",
                queries={"{{engine}}": f"moeserving_expert_remote_ratio{ENGINE}"},
                unit="percentunit",
                most=1,
            ),
            Panel(
                title="Hottest experts: tokens a step",
                text="Of the hottest expert (1), the second, ...; the next two panels have its layer and number.",
                queries={"{{place}}": f"max by (place) (moeserving_expert_hottest_tokens{ENGINE})"},
            ),
            Panel(
                title="Hottest experts: layer",
                text="Layer of the hottest expert (1), the second, ...",
                queries={"{{place}}": f"max by (place) (moeserving_expert_hottest_layer{ENGINE})"},
                width=6,
            ),
            Panel(
                title="Hottest experts: number",
                text="Number of the hottest expert (1), the second, ... within its layer.",
                queries={"{{place}}": f"max by (place) (moeserving_expert_hottest_expert{ENGINE})"},
                width=6,
            ),
        ),
        "Moves": (
            Panel(
                title="Decisions",
                text="Decisions by outcome.",
                queries={
                    "{{outcome}}": f"sum by (outcome) (increase(moeserving_expert_decisions_total{ENGINE}{WINDOW}))"
                },
                is_stacked=True,
            ),
            Panel(
                title="Why experts stayed",
                text="Decisions that left the experts where they are, by reason.",
                queries={"{{reason}}": f"sum by (reason) (increase(moeserving_expert_stayed_total{ENGINE}{WINDOW}))"},
                is_stacked=True,
            ),
            Panel(
                title="Moved experts",
                text="Experts moved since the engine started.",
                queries={"{{engine}}": f"sum by (engine) (moeserving_expert_moves_total{ENGINE})"},
            ),
            Panel(
                title="Time won and lost by moves",
                text="As measured, since the engine started.",
                queries={
                    "won": f"sum(moeserving_expert_won_seconds_total{ENGINE})",
                    "lost": f"sum(moeserving_expert_lost_seconds_total{ENGINE})",
                },
                unit="s",
            ),
            Panel(
                title="Problems",
                text="1 while an expert group reports the problem (docs/troubleshooting.md).",
                queries={"{{engine}} {{kind}}": f"max by (engine, kind) (moeserving_expert_problem{ENGINE})"},
            ),
            Panel(
                title="Mode",
                text="Number of expert groups in each mode (`scheduling.expert.mode`).",
                queries={"{{mode}}": f"sum by (mode) (moeserving_expert_mode{ENGINE})"},
                is_stacked=True,
            ),
        ),
    },
)
BOARDS = (FLEET, REQUESTS, EXPERTS)


def render_board(board: Board) -> str:
    """The dashboard as Grafana imports it (JSON)."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(f"moeserving-{board.name}")
        .description(board.text)
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
    for heading, panels in board.rows.items():
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
            target = target.instant().format("table" if panel.kind == "table" else "time_series")
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
    parser = argparse.ArgumentParser(prog="python charts/dashboards.py", description="The chart's dashboards.")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true", help="write the dashboards below --root")
    choice.add_argument("--check", action="store_true", help="compare the dashboards below --root")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: this one)")
    options = parser.parse_args(arguments)
    stale = 0
    for board in BOARDS:
        path, text = options.root / FOLDER / f"{board.name}.json", render_board(board)
        if options.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path.relative_to(options.root)}: differs from its source; run `make generate`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())

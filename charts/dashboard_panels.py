"""The panels of the chart's Grafana dashboards: what each shows, its queries, how to read it.

Queries find the pods of a resource by the labels `namespace` and `pod`, which every usual scrape configuration sets, as
the autoscaler does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
class Dashboard:
    """One dashboard: its rows of panels, each under a heading."""

    name: str
    title: str
    text: str
    rows: Mapping[str, tuple[Panel, ...]] = field(default_factory=dict)

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The panels of all rows, in their order."""
        return tuple(panel for row in self.rows.values() for panel in row)


def quantiles(metric: str) -> dict[str, str]:
    """Three quantiles of a histogram of the gateways."""
    return {
        f"p{percent}": f"histogram_quantile({percent / 100}, sum by (le) (rate({metric}_bucket{GATEWAY}{WINDOW})))"
        for percent in (50, 95, 99)
    }


FLEET = Dashboard(
    name="fleet",
    title="MoEServing: fleet",
    text="Engines and gateways of one resource: whether they work, what they hold, and their problems.",
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

REQUESTS = Dashboard(
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
                title="Latencies and their bounds",
                text="95th percentile of the last five minutes beside each bound of `scheduling.engine.targets`, of "
                "the gateway with the greatest; without bounds nothing is measured.",
                queries={
                    "{{target}}": f"max by (target) (moeserving_gateway_target_p95_seconds{GATEWAY})",
                    "{{target}} bound": f"max by (target) (moeserving_gateway_target_seconds{GATEWAY})",
                },
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

EXPERTS = Dashboard(
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

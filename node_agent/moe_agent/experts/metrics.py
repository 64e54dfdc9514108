"""Prometheus metrics of an expert group, from its published document.

The number of series is bounded by the layers, the ranks and `HOTTEST`, never by the experts: the hottest experts are
series by their rank in the order, with layer, expert and tokens as values.
"""

from collections.abc import Iterator
from typing import Any

from moe_scheduling.expert.decision import ExpertMode, StayReason
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe_agent.experts.bookkeeping import DecisionOutcome, ProblemKind


def expert_metrics(name: str, document: dict[str, Any]) -> Iterator[Metric]:
    """Yields the series of the expert group of the engine `name`; `document` may be the short form."""
    yield from _balance_metrics(name, document)
    yield from _hottest_metrics(name, document["load"]["hottest"])
    yield from _decision_metrics(name, document)
    yield _states("moeserving_expert_mode", "1 for the mode in force.", name, "mode", ExpertMode, {document["mode"]})
    kinds = {problem["kind"] for problem in document["problems"]}
    yield _states("moeserving_expert_problem", "1 while the problem is present.", name, "kind", ProblemKind, kinds)


def _balance_metrics(name: str, document: dict[str, Any]) -> Iterator[Metric]:
    balance = document["balance"]
    text = "Tokens of the busiest rank over the mean, by layer."
    yield _rows("moeserving_expert_balance_ratio", text, name, "layer", balance["by_layer"])
    text = "Tokens of a rank over the mean of the group."
    yield _rows("moeserving_expert_pressure_ratio", text, name, "rank", balance["by_rank"])
    text = "Part of the tokens whose expert is on another rank than their request."
    remote = GaugeMetricFamily("moeserving_expert_remote_ratio", text, labels=["engine"])
    remote.add_metric([name], document["remote_fraction"])
    yield remote
    version = GaugeMetricFamily(
        "moeserving_expert_placement_version", "Version of the placement in force.", labels=["engine"]
    )
    version.add_metric([name], document["placement"]["version"])
    yield version


def _hottest_metrics(name: str, hottest: list[dict[str, Any]]) -> Iterator[Metric]:
    for key, text in (
        ("layer", "Layer of the expert with the most tokens, the second most, ..."),
        ("expert", "Number of the expert with the most tokens, the second most, ..."),
        ("tokens", "Tokens a step of the expert with the most tokens, the second most, ..."),
    ):
        yield _rows(f"moeserving_expert_hottest_{key}", text, name, "place", [row[key] for row in hottest], first=1)


def _decision_metrics(name: str, document: dict[str, Any]) -> Iterator[Metric]:
    totals = document["totals"]
    for metric, text, value in (
        ("moeserving_expert_moves", "Experts moved since the engine started.", totals["moves"]),
        ("moeserving_expert_lost_seconds", "Time that moving took since the engine started.", totals["lost_s"]),
        ("moeserving_expert_won_seconds", "Time gained by moves, as measured.", totals["won_s"]),
    ):
        counter = CounterMetricFamily(metric, text, labels=["engine"])
        counter.add_metric([name], value)
        yield counter
    decisions = CounterMetricFamily(
        "moeserving_expert_decisions", "Decisions since the engine started.", labels=["engine", "outcome"]
    )
    for outcome in DecisionOutcome:
        decisions.add_metric([name, outcome.value], totals["decisions"].get(outcome.value, 0))
    yield decisions
    stayed = CounterMetricFamily(
        "moeserving_expert_stayed", "Decisions that left the experts where they are.", labels=["engine", "reason"]
    )
    for reason in StayReason:
        stayed.add_metric([name, reason.value], totals["stayed"].get(reason.value, 0))
    yield stayed


def _rows(metric: str, text: str, name: str, label: str, values: list[float], first: int = 0) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(metric, text, labels=["engine", label])
    for number, value in enumerate(values, first):
        gauge.add_metric([name, str(number)], value)
    return gauge


def _states(metric: str, text: str, name: str, label: str, known: Any, active: set[str]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(metric, text, labels=["engine", label])
    for choice in known:
        gauge.add_metric([name, choice.value], float(choice.value in active))
    return gauge

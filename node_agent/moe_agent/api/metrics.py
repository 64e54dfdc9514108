"""Prometheus metrics of the agent, made from its snapshot at each scrape: nothing is counted twice."""

from collections.abc import Callable, Iterator
from typing import Any

from moe_contract.agent_state import AgentState, RankTrouble
from moe_contract.kv_transfer import KvTransferState
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from moe_agent.experts.metrics import expert_metrics
from moe_agent.supervisor.supervisor import Phase

_RANK_GAUGES = {
    "running": ("moeserving_engine_running_requests", "Requests in the running set."),
    "waiting": ("moeserving_engine_waiting_requests", "Requests in the waiting queues."),
    "waiting_prefill_tokens": (
        "moeserving_engine_waiting_prefill_tokens",
        "Prompt tokens of waiting requests that are not in the prefix cache.",
    ),
    "running_prefill_tokens": (
        "moeserving_engine_running_prefill_tokens",
        "Prompt tokens of running requests that are not yet computed.",
    ),
    "decode_tokens": ("moeserving_engine_decode_tokens", "Tokens that a step spends on decoding."),
    "kv_usage": ("moeserving_engine_kv_usage_ratio", "Used part of the KV blocks."),
    "expert_balance": (
        "moeserving_engine_expert_balance_ratio",
        "Max over mean of the tokens of expert-parallel ranks.",
    ),
    "expert_pressure": (
        "moeserving_engine_expert_pressure_ratio",
        "Expert tokens of the rank over the mean of its expert group.",
    ),
    "age_s": ("moeserving_engine_signal_age_seconds", "Age of what the rank last published."),
}
_RANK_COUNTERS = {
    "step": ("moeserving_engine_steps", "Engine steps since the engine started."),
    "preemptions": ("moeserving_engine_preemptions", "Preempted requests since the engine started."),
    "computed_tokens": (
        "moeserving_engine_computed_tokens",
        "Prompt and output tokens computed since the engine started.",
    ),
}
_STEP_TIME_GAUGES = {
    "base_s": ("moeserving_engine_step_base_seconds", "Fitted time of a step whatever it carries."),
    "prefill_s": ("moeserving_engine_step_prefill_token_seconds", "Fitted time for each prefill token in a step."),
    "decode_s": ("moeserving_engine_step_decode_request_seconds", "Fitted time for each decoding request in a step."),
    "decode_root_s": (
        "moeserving_engine_step_decode_root_seconds",
        "Fitted time for the square root of the decoding requests in a step.",
    ),
    "prefill_base_s": (
        "moeserving_engine_step_prefill_base_seconds",
        "Fitted time that any prefill tokens in a step add.",
    ),
}


class AgentCollector(Collector):
    """Registered once; `snapshot` gives the document of `GET /v1/state`, `experts` that of `GET /v1/experts`."""

    def __init__(self, snapshot: Callable[[], AgentState], experts: Callable[[], dict[str, Any] | None]) -> None:
        self._snapshot, self._experts = snapshot, experts

    def describe(self) -> list[Metric]:
        """No names ahead of the first scrape: a registry would otherwise take a snapshot to learn them."""
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._snapshot()
        yield from _engine_metrics(state)
        yield from _rank_metrics(state)
        if (experts := self._experts()) is not None:
            yield from expert_metrics(state.name, experts)


def _engine_metrics(state: AgentState) -> Iterator[Metric]:
    name = state.name
    phase = GaugeMetricFamily(
        "moeserving_engine_phase", "1 for the phase the engine is in.", labels=["engine", "phase"]
    )
    for known in Phase:
        phase.add_metric([name, known.value], float(state.phase == known.value))
    yield phase
    accepting = GaugeMetricFamily("moeserving_engine_accepting", "1 while work is accepted.", labels=["engine"])
    accepting.add_metric([name], float(state.accepting))
    yield accepting
    restarts = CounterMetricFamily("moeserving_engine_restarts", "Restarts after a failure.", labels=["engine"])
    restarts.add_metric([name], state.engine.restarts)
    yield restarts
    version = GaugeMetricFamily("moeserving_engine_config_version", "Version of the settings.", labels=["engine"])
    version.add_metric([name], state.config.version)
    yield version
    policy = InfoMetricFamily("moeserving_engine_request_policy", "Order of the waiting queue.", labels=["engine"])
    policy.add_metric([name], {key: str(value) for key, value in state.config.document()["request"].items()})
    yield policy
    if (transfer := state.kv_transfer) is not None:
        yield from _transfer_metrics(name, transfer)


def _transfer_metrics(name: str, transfer: KvTransferState) -> Iterator[Metric]:
    for metric, text, count in (
        ("moeserving_engine_kv_transfers", "Transfers of KV blocks to the engine since its start.", transfer.transfers),
        ("moeserving_engine_kv_transfers_failed", "Failed transfers of KV blocks to the engine.", transfer.failed),
    ):
        counter = CounterMetricFamily(metric, text, labels=["engine", "role"])
        counter.add_metric([name, transfer.role.value], count)
        yield counter
    text = "Measured rate of the transfers to the engine; 0 before the first."
    rate = GaugeMetricFamily("moeserving_engine_kv_transfer_bytes_per_second", text, labels=["engine"])
    rate.add_metric([name], transfer.bytes_per_s)
    yield rate


def _rank_metrics(state: AgentState) -> Iterator[Metric]:
    rows = [([state.name, str(row.rank)], row) for row in state.ranks]
    for key, (metric, text) in _RANK_GAUGES.items():
        gauge = GaugeMetricFamily(metric, text, labels=["engine", "rank"])
        for labels, row in rows:
            gauge.add_metric(labels, getattr(row, key))
        yield gauge
    text = "1 while the rank keeps the others of its group from going on, by why."
    trouble = GaugeMetricFamily("moeserving_engine_rank_trouble", text, labels=["engine", "rank", "trouble"])
    for labels, row in rows:
        for known in RankTrouble:
            trouble.add_metric([*labels, known.value], float(row.trouble == known.value))
    yield trouble
    for key, (metric, text) in _RANK_COUNTERS.items():
        counter = CounterMetricFamily(metric, text, labels=["engine", "rank"])
        for labels, row in rows:
            counter.add_metric(labels, getattr(row, key))
        yield counter
    for key, (metric, text) in _STEP_TIME_GAUGES.items():
        gauge = GaugeMetricFamily(metric, text, labels=["engine", "rank"])
        for labels, row in rows:
            if row.step_time is not None:
                gauge.add_metric(labels, getattr(row.step_time, key))
        yield gauge

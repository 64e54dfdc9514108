"""The gateway's state document for people, peers and the autoscaler, built from its dispatcher. Pure."""

from moe_contract.gateway_config import GatewaySettings
from moe_contract.gateway_state import GatewayState, RequestTotals, SplitTotals, TargetReport
from moe_contract.pod_identity import PodIdentity
from moe_scheduling.signals import Target

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.load_report import find_source, least_wait_s
from moe_gateway.request_stats import RequestStats


def build_state(
    dispatcher: Dispatcher,
    stats: RequestStats,
    settings: GatewaySettings,
    *,
    draining: bool,
    now_s: float,
    pod: PodIdentity,
) -> GatewayState:
    """The answer of `GET /v1/state`; `now_s` is the gateway's clock."""
    recent, bounded = stats.recent, stats.bounded
    return GatewayState(
        accepting=dispatcher.accepting and not draining,
        held=dispatcher.held,
        held_since_s=dispatcher.held_since_s(now_s),
        in_flight=dispatcher.in_flight,
        wait_s=least_wait_s(dispatcher, now_s),
        ttft_s=recent.mean_ttft_s(now_s),
        prompt_tokens_per_s=recent.prompt_tokens_per_s(now_s),
        arrivals_per_s=recent.arrivals_per_s(now_s),
        ttft=None if bounded.ttft is None else bounded.ttft.record(now_s),
        inter_token=None if bounded.inter_token is None else bounded.inter_token.record(now_s),
        config=settings,
        engines=tuple(build_target(dispatcher, target, now_s) for target in dispatcher.target_states),
        totals=RequestTotals(requests=stats.finished, failed=stats.failed, retried=stats.retried),
        splits=_build_splits(dispatcher),
        pod=pod,
    )


def _build_splits(dispatcher: Dispatcher) -> SplitTotals | None:
    if (placements := dispatcher.placements) is None:
        return None
    return SplitTotals(
        transfers=placements.transfers,
        fall_backs=dict(placements.fall_backs),
        role_changes=dict(placements.role_changes),
    )


def build_target(dispatcher: Dispatcher, target: Target, now_s: float) -> TargetReport:
    """The row of one target."""
    state, engine = dispatcher.target_states[target], dispatcher.engines[target.server]
    return TargetReport(
        name=target.server,
        rank=target.rank,
        group=engine.group or None,
        reachable=engine.is_reachable,
        accepting=state.accepting,
        stalled=target in dispatcher.stalled,
        in_flight=state.in_flight,
        unanswered_prefill_tokens=state.unanswered_prefill_tokens,
        signal_age_s=state.signal_age_s(now_s),
        signal_source=find_source(dispatcher, target, now_s).value,
        signal=state.signal,
        role=dispatcher.placements.roles.get(target.server, "") if dispatcher.placements is not None else "",
    )

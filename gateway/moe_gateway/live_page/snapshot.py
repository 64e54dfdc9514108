"""One moment of the gateway for the live page, built from its dispatcher and its newest requests. Reads alone."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from moe_contract.agent_state import EngineState
from moe_contract.gateway_config import Limits
from moe_contract.live_page import EngineRow, HeldGroup, LiveSnapshot, RequestRow, TimePoint
from moe_contract.pod_identity import PodIdentity
from moe_contract.quantities import describe_time
from moe_scheduling.signals import Target

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.fleet import Engine
from moe_gateway.engines.hold_queue import Waiter
from moe_gateway.engines.load_report import find_source, least_wait_s
from moe_gateway.live_page.rates import RankRate
from moe_gateway.request.dispatched import DispatchedRequest
from moe_gateway.request.recent_requests import BriefRequest, RecentRequests
from moe_gateway.request_stats import RequestStats

# Rows of a snapshot. A tenant's or model's name comes from clients, and may be of any length.
NEWEST, MOST_GROUPS, LONGEST_NAME = 40, 50, 128
# Of the hold queue, and characters of why an engine ended.
MOST_HELD, LONGEST_EXIT = 8, 300


def build_snapshot(
    dispatcher: Dispatcher,
    stats: RequestStats,
    recent: RecentRequests,
    *,
    limits: Limits,
    point: TimePoint,
    rates: Mapping[Target, RankRate],
    draining: bool,
    pod: PodIdentity,
    now_s: float,
    gateways: tuple[str, ...] = (),
    tenants: Mapping[str, str] = {},
) -> LiveSnapshot:
    """The event `snapshot` without findings and events; `now_s` is the gateway's clock, at `point.at_s`.

    `tenants` has the names of tenants by their digest.
    """
    settings, targets = dispatcher.settings, dispatcher.settings.targets
    refused = stats.refused()
    return LiveSnapshot(
        at_s=round(point.at_s, 3),
        pod=pod.name,
        gateways=gateways,
        models=tuple(sorted(_shorten(name) for name in dispatcher.models))[:MOST_GROUPS],
        accepting=dispatcher.accepting and not draining,
        draining=draining,
        hold_limit=limits.hold_requests,
        hold_timeout_s=limits.hold_timeout_s,
        wait_s=least_wait_s(dispatcher, now_s),
        ttft_target_s=targets.ttft_s,
        step_target_s=targets.inter_token_s,
        policy=settings.policy.value,
        order=dispatcher.request_settings.policy.value,
        requests=stats.finished,
        failed=stats.failed,
        refused=sum(refused.values()),
        refused_status=max(refused, key=lambda status: refused[status], default=0),
        retried=stats.retried,
        point=point,
        engines=tuple(_build_row(dispatcher, target, rates.get(target), now_s) for target in dispatcher.target_states),
        held=group_held(dispatcher.waiting, now_s, tenants),
        newest=list_requests(dispatcher.waiting, recent, point.at_s - now_s, now_s),
    )


# Status by the phase of the agent.
_NOT_READY = {"starting": "starting", "backoff": "failed", "stopped": "stopped"}


def find_status(engine: Engine, target: Target, stalled: Iterable[Target], now_s: float) -> str:
    """The status of an engine's rank in one word, the worst first."""
    if target in stalled:
        return "stalled"
    if engine.is_draining:
        return "draining"
    if is_new(engine):
        return "starting"
    if not engine.is_ready or not engine.is_offered:
        phase = "" if engine.reported is None else engine.reported.phase
        return _NOT_READY.get(phase, "notReady") if engine.is_reachable else "unreachable"
    if max(engine.ejected_until_s, engine.suspended_until_s) > now_s:
        return "ejected"
    return "ready" if engine.is_reachable else "unreachable"


def is_new(engine: Engine) -> bool:
    """Whether it is a pod that is not ready, whose agent has not answered yet: it has just been made."""
    return engine.reported is None and not engine.is_reachable and not engine.is_offered


def describe_start(state: EngineState | None) -> str:
    """How far an engine is that starts, or how it ended last, by what its agent says."""
    if state is None or state.phase not in ("starting", "backoff"):
        return ""
    words = []
    if state.start is not None:
        words.append(f"{state.start.words}, for {describe_time(state.start.age_s)}")
    if state.engine.last_exit:
        times = f" {state.engine.restarts} times, the last time" if state.engine.restarts > 1 else ""
        words.append(f"ended{times} with: {_shorten(state.engine.last_exit, LONGEST_EXIT)}")
    return "; ".join(words)


def _describe(engine: Engine) -> str:
    return "its agent does not answer yet" if is_new(engine) else describe_start(engine.reported)


def _build_row(dispatcher: Dispatcher, target: Target, rate: RankRate | None, now_s: float) -> EngineRow:
    state, engine = dispatcher.target_states[target], dispatcher.engines[target.server]
    signal, age_s = state.signal, state.signal_age_s(now_s)
    roles = {} if dispatcher.placements is None else dispatcher.placements.roles
    status = find_status(engine, target, dispatcher.stalled, now_s)
    # Nothing is known of a rank without a signal but what stands in the defaults.
    known: dict[str, Any] = (
        {}
        if signal is None
        else {
            "running": signal.running,
            "waiting": signal.waiting,
            "waiting_prefill_tokens": signal.waiting_prefill_tokens,
            "kv_usage": round(signal.kv_usage, 3),
            "preemptions": signal.preemptions,
            "expert_balance": round(signal.expert_balance, 3),
        }
    )
    return EngineRow(
        name=target.server,
        rank=target.rank,
        group=engine.group,
        role=roles.get(target.server, ""),
        status=status,
        words=_describe(engine) if status in ("starting", "failed") else "",
        in_flight=state.in_flight,
        step_s=None if rate is None else rate.step_s,
        tokens_per_s=None if rate is None else rate.tokens_per_s,
        signal_age_s=None if age_s is None else round(age_s, 2),
        signal_source=find_source(dispatcher, target, now_s).value,
        ttft_factor=round(state.ttft_factor, 3),
        **known,
    )


def group_held(waiters: Iterable[Waiter], now_s: float, tenants: Mapping[str, str] = {}) -> tuple[HeldGroup, ...]:
    """Held requests by class and tenant, the longest wait first; at most `MOST_GROUPS` groups."""
    groups: dict[tuple[int, str], HeldGroup] = {}
    for waiter in waiters:
        job, waits_s = waiter.job, now_s - waiter.attempts.waiting_since_s
        key = job.priority, job.tenant
        before = groups.get(key)
        groups[key] = HeldGroup(
            priority=job.priority,
            tenant=_shorten(tenants.get(job.tenant, job.tenant)),
            requests=1 if before is None else before.requests + 1,
            prompt_tokens=job.prompt_tokens + (0 if before is None else before.prompt_tokens),
            oldest_s=round(waits_s if before is None else max(before.oldest_s, waits_s), 3),
        )
    return tuple(sorted(groups.values(), key=lambda row: -row.oldest_s)[:MOST_GROUPS])


def list_requests(
    waiters: Iterable[Waiter], recent: RecentRequests, from_clock_s: float, now_s: float
) -> tuple[RequestRow, ...]:
    """At most `MOST_HELD` held requests, the longest wait first, then the newest ones.

    Args:
        waiters: the hold queue; in a gateway these are requests of clients.
        recent: the remembered requests.
        from_clock_s: time of day less the gateway's clock.
        now_s: the gateway's clock.
    """
    held = [(now_s - waiter.attempts.waiting_since_s, cast(DispatchedRequest, waiter)) for waiter in waiters]
    held = sorted(held, key=lambda row: -row[0])[:MOST_HELD]
    rows = [_build_request(recent.describe(request), from_clock_s, round(waits_s, 3)) for waits_s, request in held]
    rows += [_build_request(row, from_clock_s) for row in recent.newest(NEWEST)]
    # A client may use an id again, and the page finds a row by its id: the first one has it.
    found: dict[str, RequestRow] = {}
    for row in rows:
        found.setdefault(row.record.request_id, row)
    return tuple(found.values())


def _build_request(row: BriefRequest, from_clock_s: float, held_s: float | None = None) -> RequestRow:
    return RequestRow(
        arrived_at_s=round(row.arrived_s + from_clock_s, 3),
        record=row.record,
        chosen=row.chosen,
        other=row.other,
        engines=row.targets,
        held_s=held_s,
    )


def _shorten(name: str, most: int = LONGEST_NAME) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"

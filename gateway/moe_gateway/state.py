"""The gateway's snapshot for people, peers and metrics. Pure."""

from dataclasses import asdict
from typing import Any

from moe_scheduling.signals import Target

from moe_gateway.configuration import InForce
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.request_stats import RequestStats


def build_state(
    dispatcher: Dispatcher, stats: RequestStats, in_force: InForce, *, draining: bool, now_s: float
) -> dict[str, Any]:
    """The document of `GET /v1/state`."""
    recent = stats.recent
    return {
        "accepting": dispatcher.accepting and not draining,
        "held": dispatcher.held,
        "held_since_s": dispatcher.held_since_s(now_s),
        "in_flight": dispatcher.in_flight,
        "wait_s": dispatcher.least_wait_s(now_s),
        "ttft_s": recent.mean_ttft_s(now_s),
        "prompt_tokens_per_s": recent.prompt_tokens_per_s(now_s),
        "arrivals_per_s": recent.arrivals_per_s(now_s),
        "config": in_force.document(),
        "engines": [build_target(dispatcher, target, now_s) for target in dispatcher.target_states],
        "totals": {"requests": stats.finished, "failed": stats.failed, "retried": stats.retried},
    }


def build_target(dispatcher: Dispatcher, target: Target, now_s: float) -> dict[str, Any]:
    """The row of one target."""
    state, engine = dispatcher.target_states[target], dispatcher.engines[target.server]
    return {
        "name": target.server,
        "rank": target.rank,
        "group": engine.group or None,
        "reachable": engine.is_reachable,
        "accepting": state.accepting,
        "in_flight": state.in_flight,
        "unanswered_prefill_tokens": state.unanswered_prefill_tokens,
        "signal_age_s": state.signal_age_s(now_s),
        "signal_source": dispatcher.source(target, now_s).value,
        "signal": None if state.signal is None else asdict(state.signal),
    }

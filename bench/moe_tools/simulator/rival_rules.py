"""Published rules for the choice of an engine, as pure functions that the simulator's rivals call.

Each rule picks one of the candidates. The order of the candidates rotates by one with each request, so that ties go
round. All rules read `TargetState`; where a rule needs something that it does not hold, the function says so. Each is
O(candidates), `pick_of_two` O(1).

Invariants: the result is one of the candidates and depends on the arguments alone.
"""

from collections.abc import Sequence
from enum import Enum

from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import Target

# vLLM 0.32: KV use from which what waits counts for more, and how much more.
VLLM_KV_FROM = 0.5
VLLM_KV_WEIGHT = 6.0
# Gimbal's theta_k, theta_diff and theta_load.
GIMBAL_KV = 0.9
GIMBAL_KV_DIFFERENCE = 0.1
GIMBAL_LOAD_TOKENS = 3000
# Knuth's multiplicative hash: the golden ratio of 64 bits, which spreads numbers that follow one another.
_SPREAD = 0x9E3779B97F4A7C15
_BITS = 0xFFFFFFFFFFFFFFFF


def pick_of_two(candidates: Sequence[TargetState], turn: int) -> TargetState:
    """Of two that are drawn the one with fewer own requests in flight: `power_of_two` of vllm-router 0.1.17."""
    count = len(candidates)
    if count == 1:
        return candidates[0]
    mixed = (turn * _SPREAD & _BITS) >> 16
    first = mixed % count
    second = (first + 1 + mixed // count % (count - 1)) % count
    one, other = candidates[first], candidates[second]
    return one if one.in_flight <= other.in_flight else other


def pick_as_vllm(candidates: Sequence[TargetState], now_s: float, stale_after_s: float) -> TargetState:
    """The least score of vLLM's own data-parallel balancer (0.32, `DPLBAsyncMPClient.get_core_engine_for_request`).

    `max(clients * own in flight, waiting + running)`, and where requests wait `6 * waiting * max(0, kv - 0.5)` on top.
    How many clients there are, here gateways, is read from the own share. Requests sent since a signal count as
    waiting, as vLLM counts each choice until the next statistics.
    """
    scores = [_vllm_score(state, now_s, stale_after_s) for state in candidates]
    return candidates[scores.index(min(scores))]


def _vllm_score(state: TargetState, now_s: float, stale_after_s: float) -> float:
    score = max(state.in_flight / state.traffic_share, state.requests(now_s, stale_after_s))
    signal = state.signal
    if signal is None or not state.is_fresh(now_s, stale_after_s):
        return score
    waiting = signal.waiting + int(state.sent_since_signal / state.traffic_share)
    return score + waiting * VLLM_KV_WEIGHT * max(0.0, signal.kv_usage - VLLM_KV_FROM)


def kv_usage(state: TargetState, now_s: float, stale_after_s: float) -> float:
    """Returns the used part of the KV blocks by a fresh signal, 0 to 1; 0 without one."""
    signal = state.signal
    return 0.0 if signal is None or not state.is_fresh(now_s, stale_after_s) else signal.kv_usage


class GimbalRule(Enum):
    """Which step of the cascade decided."""

    KV = "kv"
    LOAD = "load"
    USER = "user"
    TURN = "turn"


def pick_as_gimbal(
    candidates: Sequence[TargetState], session: Target | None, now_s: float, stale_after_s: float
) -> tuple[TargetState, GimbalRule]:
    """The threshold cascade of Gimbal's dispatcher (arXiv 2602.21626), reconstructed: its code is not published.

    Engines with KV use of 0.9 or more drop out, unless all do. If KV use differs by more than 0.1, the least used; if
    the load differs by more than 3,000 tokens, the least loaded; else the user's last engine, else each in turn. The
    load is the prefill tokens ahead.
    """
    uses = [kv_usage(state, now_s, stale_after_s) for state in candidates]
    usable = [(use, state) for use, state in zip(uses, candidates, strict=True) if use < GIMBAL_KV]
    usable = usable or list(zip(uses, candidates, strict=True))
    uses = [use for use, _ in usable]
    if max(uses) - min(uses) > GIMBAL_KV_DIFFERENCE:
        return usable[uses.index(min(uses))][1], GimbalRule.KV
    loads = [state.ahead_prefill_tokens(now_s, stale_after_s) for _, state in usable]
    if max(loads) - min(loads) > GIMBAL_LOAD_TOKENS:
        return usable[loads.index(min(loads))][1], GimbalRule.LOAD
    for _, state in usable:
        if state.target == session:
            return state, GimbalRule.USER
    return usable[0][1], GimbalRule.TURN

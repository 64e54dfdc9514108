"""Published rules for the choice of an engine, to choose from and to compare with our own.

Called by `engine.py`, and by the simulator's rivals. Each picks one of the candidates, which come in an order that
begins one further with each request, so that the first of equals is whose turn it is. All read the same books; what a
rule needs and the books do not have is said where it stands. Each is O(candidates), but for the draw of two.

Invariants: the answer is one of the candidates and depends on the arguments alone.
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
    How many clients there are, here gateways, is read from the own share. What was sent since a signal counts as
    waiting, as vLLM counts each choice until the next statistics.
    """
    scores = [_vllm_score(books, now_s, stale_after_s) for books in candidates]
    return candidates[scores.index(min(scores))]


def _vllm_score(books: TargetState, now_s: float, stale_after_s: float) -> float:
    score = max(books.in_flight / books.traffic_share, books.requests(now_s, stale_after_s))
    waiting = books.waiting(now_s, stale_after_s)
    return score + waiting * VLLM_KV_WEIGHT * max(0.0, books.kv_usage(now_s, stale_after_s) - VLLM_KV_FROM)


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
    uses = [books.kv_usage(now_s, stale_after_s) for books in candidates]
    usable = [(use, books) for use, books in zip(uses, candidates, strict=True) if use < GIMBAL_KV]
    usable = usable or list(zip(uses, candidates, strict=True))
    uses = [use for use, _ in usable]
    if max(uses) - min(uses) > GIMBAL_KV_DIFFERENCE:
        return usable[uses.index(min(uses))][1], GimbalRule.KV
    loads = [books.ahead_prefill_tokens(now_s, stale_after_s) for _, books in usable]
    if max(loads) - min(loads) > GIMBAL_LOAD_TOKENS:
        return usable[loads.index(min(loads))][1], GimbalRule.LOAD
    for _, books in usable:
        if books.target == session:
            return books, GimbalRule.USER
    return usable[0][1], GimbalRule.TURN

"""The order in which engines end when the fleet shrinks: least remaining work first.

Called by the operator before each scale-down. The result becomes the annotation
`controller.kubernetes.io/pod-deletion-cost`: Kubernetes deletes pods of lower cost first.

Invariants: draining engines come first, then engines that are not ready, then idle ones, then all others; a cost
changes only when the remaining work leaves its bucket by more than the slack, so that small changes write nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_scheduling.engine.ttft_model import DEFAULT_STEP_TIME
from moe_scheduling.signals import EngineSignal

DRAINING_COST = -2
NOT_READY_COST = -1
IDLE_COST = 0
# Output tokens that a request is assumed to have left: outputs are some hundred tokens long, and an observed request is
# half done on average.
TOKENS_LEFT = 128
# Costs of working engines are buckets of work, each twice as long as the one before, the first in seconds.
_FIRST_BUCKET_S = 0.1
_SLACK = 1.25
_MOST_BUCKETS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """Load of an engine, and its present deletion cost.

    Attributes:
        name: its name.
        ready: whether it serves.
        draining: whether it takes no new requests and finishes the present ones.
        ranks: the newest signals of its data-parallel ranks; empty when its load is unknown.
        cost: its present deletion cost; None without one.
    """

    name: str
    ready: bool = True
    draining: bool = False
    ranks: tuple[EngineSignal, ...] = ()
    cost: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """An engine with its deletion cost.

    Attributes:
        name: the engine.
        cost: its deletion cost; an engine with a lower cost ends first.
        work_s: remaining work of all its ranks (`work_left_s`), in seconds.
    """

    name: str
    cost: int
    work_s: float


def order_victims(engines: Iterable[EngineWork]) -> tuple[Victim, ...]:
    """Returns the engines in the order in which they end: by cost, then by remaining work, then by name."""
    victims = [_victim(engine) for engine in engines]
    return tuple(sorted(victims, key=lambda victim: (victim.cost, victim.work_s, victim.name)))


def work_left_s(rank: EngineSignal) -> float:
    """Returns the remaining work of a rank in request-seconds; infinite when the signal is implausible.

    The prompt tokens that are not computed yet, and `TOKENS_LEFT` steps of each request, through the step-time model.
    Steps count once for each request, although requests decode together, because a drain has to wait for requests.
    """
    step_time = rank.step_time or DEFAULT_STEP_TIME
    requests = max(0, max(rank.running, rank.decode_tokens) + rank.waiting)
    prefill_tokens = rank.waiting_prefill_tokens + rank.running_prefill_tokens
    if not requests and prefill_tokens <= 0:
        return 0.0
    work_s = prefill_tokens * step_time.prefill_s
    work_s += requests * TOKENS_LEFT * step_time.decode_step_s(requests)
    return work_s if work_s > 0.0 else math.inf


def _victim(engine: EngineWork) -> Victim:
    work_s = sum(map(work_left_s, engine.ranks)) if engine.ranks else math.inf
    return Victim(name=engine.name, cost=_cost(engine, work_s), work_s=work_s)


def _cost(engine: EngineWork, work_s: float) -> int:
    if engine.draining:
        return DRAINING_COST
    if not engine.ready:
        return NOT_READY_COST
    if work_s == 0.0:
        return IDLE_COST
    present = engine.cost
    if present is not None and 0 < present <= _MOST_BUCKETS and _within(present, work_s):
        return present
    return _bucket(work_s)


def _bucket(work_s: float) -> int:
    if work_s <= _FIRST_BUCKET_S:
        return 1
    return 1 + math.ceil(min(math.log2(work_s / _FIRST_BUCKET_S), _MOST_BUCKETS - 1))


def _within(bucket: int, work_s: float) -> bool:
    """Returns whether the work is in the bucket, widened by the slack."""
    upper_s = math.inf if bucket == _MOST_BUCKETS else _FIRST_BUCKET_S * 2.0 ** (bucket - 1)
    lower_s = 0.0 if bucket == 1 else _FIRST_BUCKET_S * 2.0 ** (bucket - 2)
    return lower_s / _SLACK < work_s <= upper_s * _SLACK

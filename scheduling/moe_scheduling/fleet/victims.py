"""Which engine is let go first: the one with the least work left. Called by the operator before each scale-down.

The answer is the annotation `controller.kubernetes.io/pod-deletion-cost`: Kubernetes deletes pods of lower cost first.

Invariants: an engine that drains comes before one that is not ready, that before an idle one, and that before all that
work; a cost changes only when the work left has changed by more than a bucket's slack, so that small steps of the load
write no annotation.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_scheduling.engine.ttft_model import DEFAULT_STEP_TIME
from moe_scheduling.signals import EngineSignal

DRAINING_COST = -2
NOT_READY_COST = -1
IDLE_COST = 0
# Output tokens that a request still has before it, as long as nobody knows better: outputs are some hundred long, and
# a request is on average met half-way.
TOKENS_LEFT = 128
# Costs of working engines are buckets of work: each twice the one before, from a tenth of a second on.
_FIRST_BUCKET_S = 0.1
_SLACK = 1.25
_MOST_BUCKETS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """What is known of an engine.

    Attributes:
        name: its name.
        ready: whether it serves.
        draining: whether it takes no new work and ends what it has.
        ranks: the last signals of its data-parallel ranks; none when nothing is known of it.
        cost: the cost that it carries; None without one.
    """

    name: str
    ready: bool = True
    draining: bool = False
    ranks: tuple[EngineSignal, ...] = ()
    cost: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """An engine's place in the order.

    Attributes:
        name: the engine.
        cost: its deletion cost; lower is let go first.
        work_s: work left (see `work_left_s`), over all its ranks.
    """

    name: str
    cost: int
    work_s: float


def order_victims(engines: Iterable[EngineWork]) -> tuple[Victim, ...]:
    """The engines, the first to let go first: by cost, then by the work left, then by name."""
    victims = [_victim(engine) for engine in engines]
    return tuple(sorted(victims, key=lambda victim: (victim.cost, victim.work_s, victim.name)))


def work_left_s(rank: EngineSignal) -> float:
    """Seconds that the requests of a rank still take, each request's counted.

    The prompt tokens that are not computed yet and `TOKENS_LEFT` steps of each request, through the fitted step time.
    Steps are counted for each request although they decode together: what a drain may not cut short is requests. What
    is no plausible number counts as endless.
    """
    line = rank.step_time or DEFAULT_STEP_TIME
    requests = max(rank.running, rank.decode_tokens) + rank.waiting
    prefill_tokens = rank.waiting_prefill_tokens + rank.running_prefill_tokens
    if requests <= 0 and prefill_tokens <= 0:
        return 0.0
    work_s = prefill_tokens * line.prefill_s + requests * TOKENS_LEFT * (line.base_s + requests * line.decode_s)
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
    carried = engine.cost
    if carried is not None and 0 < carried <= _MOST_BUCKETS and _within(carried, work_s):
        return carried
    return _bucket(work_s)


def _bucket(work_s: float) -> int:
    if work_s <= _FIRST_BUCKET_S:
        return 1
    return 1 + math.ceil(min(math.log2(work_s / _FIRST_BUCKET_S), _MOST_BUCKETS - 1))


def _within(bucket: int, work_s: float) -> bool:
    """Whether the work is in the bucket or beside it by no more than the slack."""
    upper_s = math.inf if bucket == _MOST_BUCKETS else _FIRST_BUCKET_S * 2.0 ** (bucket - 1)
    lower_s = 0.0 if bucket == 1 else _FIRST_BUCKET_S * 2.0 ** (bucket - 2)
    return lower_s / _SLACK < work_s <= upper_s * _SLACK

"""Layer 1: policies, settings and keys of the order of waiting requests, in engines and in the gateway's hold queue.

A policy is a function from a request to a key. The key does not change while the request waits, but for an engine that
is found to be faster (`prefill_speed.py`), so a sorted list serves (`waiting_queue.py`). Where several tenants wait
under `sjf`, the lag of a request's tenant is added to its key (`fairness.py`).

Invariants: equal keys are ordered by arrival; no size, priority or arrival that a client sends gives a key that does
not compare (NaN).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_scheduling.request.prefill_speed import UNMEASURED_TOKENS_PER_S
from moe_scheduling.settings import check_settings, setting

# Whole numbers up to here are exact in a float; no prompt length and no level of priority is near it.
LARGEST_EXACT = 2**53
_LARGEST_SHIFT_S = 1e300
# Under `sjf` without an `ageing_rate`: a request of twice the size comes later by the time that the engine takes for
# this many prompt tokens, and sizes below the second figure count as nearly equal. On an engine so slow that the
# horizon would be reached sooner, it is reached after this many doublings. How they were chosen:
# docs/adr/0048-a-prompt-stands-back-by-the-engines-measured-speed.md.
DOUBLING_TOKENS = 4096
SMALL_TOKENS = 256
HORIZON_DOUBLINGS = 4


class RequestPolicy(StrEnum):
    """How the waiting queue is ordered."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    SJF = "sjf"

    # Enum's own hash is a function in Python; this one is called for each push.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSettings:
    """Order of the waiting queue, and the prefills of a step.

    Under `fcfs` and `priority` an engine does what vLLM does, step for step: all other fields act under `sjf` alone.

    Attributes:
        yield_prefills: whether a prompt that is computed in chunks lets waiting requests go first whose key is less
            than the key of its rest.
        cut_prefills: whether a step may take fewer prompt tokens than it has room for, where further tokens cost more
            than in the next step (`prefill_budget.py`).
        defer_scheduling: whether, with vLLM's asynchronous scheduling, the next step is scheduled just before the end
            of the running one, and not at its begin (`deferred_scheduling.py`).
        kv_growth_blocks: KV blocks that stay free for each running request when another is admitted, so that running
            requests can grow without a preemption. 0: none, as in vLLM.
        inter_token_s: longest step of an engine while requests decode (seconds): prompts are cut so that the step is
            predicted to keep it. None: no bound. A resource says it as `scheduling.engine.targets.interToken`.

    The first four are switches for ablations and calibration; the others are declared below, with their meaning.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    policy: RequestPolicy = setting(
        RequestPolicy.SJF,
        "`sjf` takes the request with the fewest uncached prefill tokens first and lets waiting requests age, `fcfs` "
        "keeps the order of arrival, `priority` the order of the priority field, then of arrival.",
    )
    ageing_rate: float | None = setting(
        None,
        "Uncached prefill tokens that one second of waiting makes up for (tokens/s), under `sjf`. Greater is nearer to "
        "the order of arrival, less has a lower mean wait and longer waits of long prompts. Absent: by the speed that "
        "each engine is measured to have, so that long prompts wait hardly longer than by arrival.",
        above=0,
    )
    ageing_horizon_s: float = setting(
        10.0,
        "Under `sjf`, no request is overtaken by one of its priority that arrived later by more than this.",
        least=0,
    )
    priority_step_s: float = setting(
        2.0,
        "Head start that one level of a request's priority is worth under `sjf` (lower is more urgent).",
        least=0,
    )
    fairness_horizon_s: float = setting(
        10.0,
        "Under `sjf`, requests of a tenant that was served more than another that waits come later by up to this; "
        "`gateway.tenantHeader` names the tenant of a request. 0s: tenants are not distinguished.",
        least=0,
    )
    output_weight: float = setting(
        2.0,
        "Under `sjf`, prompt tokens that one token of an answer counts as in the service that a tenant received; such "
        "as the ratio of their prices. 0: prompts alone count.",
        least=0,
        most=1000,
    )
    yield_prefills: bool = True
    cut_prefills: bool = True
    defer_scheduling: bool = True
    kv_growth_blocks: int = 1
    inter_token_s: float | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.kv_growth_blocks <= LARGEST_EXACT:
            raise ValueError("kv_growth_blocks must be at least 0")
        if self.inter_token_s is not None and not 0.0 < self.inter_token_s < math.inf:
            raise ValueError("inter_token_s must be greater than 0 and finite")

    @property
    def is_fair(self) -> bool:
        """Whether service is shared among tenants."""
        return self.policy is RequestPolicy.SJF and self.fairness_horizon_s > 0.0


def order_key(
    settings: RequestSettings,
    *,
    size_tokens: float,
    arrival_s: float,
    priority: int = 0,
    speed: float = UNMEASURED_TOKENS_PER_S,
) -> tuple[float, float]:
    """Returns the static key of a request: the smaller is served first; the second part, the arrival, breaks ties.

    Under `sjf` the key is `min(shift_s, ageing_horizon_s) + arrival_s + priority * priority_step_s`, with a shift for
    the request's size: `size_tokens / ageing_rate`, or without a rate

        min(DOUBLING_TOKENS / speed, ageing_horizon_s / HORIZON_DOUBLINGS) * log2(1 + size_tokens / SMALL_TOKENS)

    A request of twice the size lets those go first that arrive while the engine computes `DOUBLING_TOKENS`; where that
    takes long, by a part of the horizon, so that sizes still decide within it. Where a long prompt lets a short
    one pass, the short one gains the time of the long one and the long one loses that of the short one: what counts is
    the ratio of the sizes. And the longer a prompt is, the less it is held up for its length. The key orders like "size
    less ageing", because all waiting requests age alike, so that the clock cancels out.

    The bound on waiting. Let `shift_s` be that of a request that arrives at a, `ageing_horizon_s` at most. Another's
    shift is never negative, so it overtakes only if it arrives before `a + shift_s`: no request of the
    same priority that arrives more than `shift_s` later does. The request is thus served after, at most, the work that
    was there at a and the work that arrives within `shift_s` of a, whatever comes afterwards: at a service of r
    tokens/s it waits at most `(work_at_arrival + work_arriving_within_shift) / r`. Each level by which another request
    is more urgent widens that one's window by `priority_step_s`: priority delays, but does not starve.
    Between tenants the window is wider by `fairness_horizon_s`, the greatest lag: a request of another tenant that
    arrives more than `shift_s + fairness_horizon_s` later never overtakes, whatever service was and will be charged.
    Within a tenant the bound is the one above.

    Args:
        settings: the policy and its figures.
        size_tokens: uncached prefill tokens. Negative values count as 0, NaN as infinite.
        arrival_s: arrival on any clock that all requests of a queue share.
        priority: level; lower is more urgent.
        speed: prompt tokens that the engine computes in a second (`SpeedHistory`), positive.

    Raises:
        ValueError: the arrival is not finite.
    """
    if not math.isfinite(arrival_s):
        raise ValueError(f"arrival_s must be finite, got {arrival_s!r}")
    return _PRIMARY_KEYS[settings.policy](settings, size_tokens, arrival_s, priority, speed), arrival_s


def _sjf_key(settings: RequestSettings, size_tokens: float, arrival_s: float, priority: int, speed: float) -> float:
    shift_s = settings.ageing_horizon_s
    if size_tokens < LARGEST_EXACT:
        shift_s = min(_size_shift_s(settings, max(size_tokens, 0), speed), shift_s)
    if priority:
        head_start_s = clamp_priority(priority) * settings.priority_step_s
        arrival_s += max(-_LARGEST_SHIFT_S, min(_LARGEST_SHIFT_S, head_start_s))
    return arrival_s + shift_s


def _size_shift_s(settings: RequestSettings, size_tokens: float, speed: float) -> float:
    if settings.ageing_rate is not None:
        return size_tokens / settings.ageing_rate
    doubling_s = min(DOUBLING_TOKENS / speed, settings.ageing_horizon_s / HORIZON_DOUBLINGS)
    return doubling_s * math.log2(1.0 + size_tokens / SMALL_TOKENS)


def _fcfs_key(
    _settings: RequestSettings, _size_tokens: float, arrival_s: float, _priority: int, _speed: float
) -> float:
    return arrival_s


def _priority_key(
    _settings: RequestSettings, _size_tokens: float, _arrival_s: float, priority: int, _speed: float
) -> float:
    return clamp_priority(priority)


def clamp_priority(priority: int) -> int:
    """Returns the nearest level that every reader takes: a client may write any integer."""
    return max(-LARGEST_EXACT, min(LARGEST_EXACT, priority))


_PRIMARY_KEYS: Mapping[RequestPolicy, Callable[[RequestSettings, float, float, int, float], float]] = {
    RequestPolicy.FCFS: _fcfs_key,
    RequestPolicy.PRIORITY: _priority_key,
    RequestPolicy.SJF: _sjf_key,
}

"""Layer 1: the order of requests (see the settings; the queue follows)."""

from dataclasses import dataclass
from enum import StrEnum


class RequestPolicy(StrEnum):
    """How the waiting queue is ordered."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    SJF = "sjf"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSettings:
    """Order of the waiting queue.

    Attributes:
        policy: `sjf` orders by uncached prefill tokens with ageing, `fcfs` by arrival, `priority` by (priority, arrival).
        ageing_rate: uncached prefill tokens that one second of waiting makes up for, tokens/s. Under `sjf` a request of
            S tokens is never overtaken by one that arrived more than S / ageing_rate seconds after it.
        ageing_horizon_s: upper bound of that time: no request is overtaken by one of its priority that arrived later by more.
        priority_step_s: under `sjf`, the head start in seconds that one level of priority is worth (lower is more urgent).
    """

    policy: RequestPolicy = RequestPolicy.SJF
    ageing_rate: float = 1000.0
    ageing_horizon_s: float = 10.0
    priority_step_s: float = 2.0

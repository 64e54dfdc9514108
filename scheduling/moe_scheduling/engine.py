"""Layer 2: the choice of the engine for a request (see the settings; the policies follow)."""

from dataclasses import dataclass
from enum import StrEnum


class DispatchPolicy(StrEnum):
    """How a target is chosen."""

    LEAST_REQUESTS = "leastRequests"
    PREDICTED = "predicted"
    ROUND_ROBIN = "roundRobin"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Choice of the engine.

    Attributes:
        policy: `predicted` takes the least predicted time to first token.
        stickiness_s: a session stays at its last target while that one's prediction is worse by at most so many seconds.
        stale_after_s: age at which a signal is no longer believed and the gateway's own books stand alone.
        saturation_s: predicted wait before the own prefill at which a target is saturated; the request is held in the
            gateway's queue when every target is. None never holds.
    """

    policy: DispatchPolicy = DispatchPolicy.PREDICTED
    stickiness_s: float = 0.1
    stale_after_s: float = 2.0
    saturation_s: float | None = None

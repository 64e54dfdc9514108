"""The autoscaler of one resource: keeps what decisions look back on. Owned by the operator's reconciler."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from moe_scheduling.fleet.settings import FleetSettings
from moe_scheduling.fleet.size import (
    FleetHistory,
    FleetObservation,
    FleetSignal,
    Keep,
    KeepReason,
    Limit,
    Scale,
    plan_fleet,
)

from moe_operator.api.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was decided.

    Attributes:
        replicas: engines from now on.
        reason: why.
        limited: reason and message of the condition AutoscalingLimited; None when nothing holds the number back.
    """

    replicas: int
    reason: str
    limited: tuple[Reason, str] | None


_LIMITS = {
    Limit.MAX_REPLICAS: (Reason.TOO_FEW_REPLICAS, "the load asks for more engines than autoscaling.maxReplicas"),
    Limit.MIN_REPLICAS: (Reason.TOO_MANY_REPLICAS, "the load asks for fewer engines than autoscaling.minReplicas"),
}


class Autoscaler:
    """The autoscaler of one resource, with its history of recommendations."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._history = FleetHistory()
        self._loading_since: dict[str, float] = {}
        self._startup_s: float | None = None

    def decide(
        self,
        replicas: int,
        ready: set[str],
        loading: set[str],
        signal: FleetSignal | None,
        settings: FleetSettings,
        *,
        asked: bool = False,
        source: str = "gateways and engines",
    ) -> Outcome:
        """How many engines should run.

        Args:
            replicas: engines wanted now.
            ready: names of the engines that accept requests.
            loading: names of those that start.
            signal: the newest state of the fleet.
            settings: bounds, targets, behaviour.
            asked: some source knows of a request, independent of the signal.
            source: of the signal, in words.
        """
        now_s = self._clock()
        self._learn_startup(ready, loading, now_s)
        observation = FleetObservation(
            replicas=replicas, ready=len(ready), loading=len(loading), startup_s=self._startup_s, asked=asked
        )
        decision = plan_fleet(observation, signal, settings, self._history, now_s)
        self._history = decision.history
        number = decision.replicas if isinstance(decision, Scale) else replicas
        return Outcome(replicas=number, reason=decision.reason.value, limited=_limited(decision, source))

    def _learn_startup(self, ready: set[str], loading: set[str], now_s: float) -> None:
        for name in loading:
            self._loading_since.setdefault(name, now_s)
        for name in list(self._loading_since):
            if name in ready:
                self._startup_s = now_s - self._loading_since.pop(name)
            elif name not in loading:
                del self._loading_since[name]


def _limited(decision: Scale | Keep, source: str) -> tuple[Reason, str] | None:
    if isinstance(decision, Keep) and decision.reason in (KeepReason.STALE, KeepReason.MISSING):
        what = f"the signals of {source} are {decision.reason.value}"
        return Reason.NO_SIGNAL, f"the number of engines stays as it is: {what}"
    return _LIMITS.get(decision.limit) if decision.limit is not None else None

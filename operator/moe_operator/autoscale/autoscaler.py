"""The autoscaler of one resource: keeps what decisions look back on. Owned by the operator's reconciler."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_scheduling.engine.disaggregation import EngineRole
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
        roles: engines of each fixed role from now on; empty where the operator does not scale roles.
    """

    replicas: int
    reason: str
    limited: tuple[Reason, str] | None
    roles: Mapping[EngineRole, int] = field(default_factory=dict)


_LIMITS = {
    Limit.MAX_REPLICAS: (Reason.TOO_FEW_REPLICAS, "the load asks for more {} than {}.maxReplicas"),
    Limit.MIN_REPLICAS: (Reason.TOO_MANY_REPLICAS, "the load asks for fewer {} than {}.minReplicas"),
}


class Autoscaler:
    """The autoscaler of the engines of one resource, or of one role of them, with its history of recommendations."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, what: str = "engines", path: str = "autoscaling"
    ) -> None:
        self._clock, self._what, self._path = clock, what, path
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
        return Outcome(replicas=number, reason=decision.reason.value, limited=self._limited(decision, source))

    def _limited(self, decision: Scale | Keep, source: str) -> tuple[Reason, str] | None:
        if isinstance(decision, Keep) and decision.reason in (KeepReason.STALE, KeepReason.MISSING):
            signals = f"the signals of {source} are {decision.reason.value}"
            return Reason.NO_SIGNAL, f"the number of {self._what} stays as it is: {signals}"
        found = None if decision.limit is None else _LIMITS.get(decision.limit)
        return None if found is None else (found[0], found[1].format(self._what, self._path))

    def _learn_startup(self, ready: set[str], loading: set[str], now_s: float) -> None:
        for name in loading:
            self._loading_since.setdefault(name, now_s)
        for name in list(self._loading_since):
            if name in ready:
                self._startup_s = now_s - self._loading_since.pop(name)
            elif name not in loading:
                del self._loading_since[name]

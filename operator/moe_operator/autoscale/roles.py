"""The autoscalers of fixed roles: one for each role of each resource, from states or from Prometheus.

Prefill engines follow the backlog of prompts, decode engines their KV caches and the time of a step.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.settings import FleetSettings

from moe_operator.api.autoscaling import Autoscaling
from moe_operator.api.reasons import Reason
from moe_operator.api.resource import MoEServing
from moe_operator.autoscale.autoscaler import Autoscaler, Outcome
from moe_operator.autoscale.prometheus import Reading, build_role_queries, fetch_reading
from moe_operator.autoscale.settings import role_settings
from moe_operator.autoscale.signal import Fleet, asks, build_role_signal
from moe_operator.autoscale.token_rate import TokenRate, sum_rates
from moe_operator.plan import Observed
from moe_operator.plan.names import Names
from moe_operator.plan.roles import role_numbers

# What hides the load, then what is too few for it, then what only costs.
_GRAVEST_FIRST = (Reason.NO_SIGNAL, Reason.TOO_FEW_REPLICAS, Reason.TOO_MANY_REPLICAS)

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleEngines:
    """The stable engines of one role, by the names of their pods.

    Attributes:
        ready: those that are ready.
        loading: those that are not yet.
    """

    ready: frozenset[str] = frozenset()
    loading: frozenset[str] = frozenset()


class RoleAutoscalers:
    """An autoscaler for each fixed role of each resource.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._autoscalers: dict[tuple[str, str], dict[EngineRole, Autoscaler]] = {}

    def forget(self, key: tuple[str, str]) -> None:
        """Drops the records of a resource that is deleted, or whose roles are scaled no more."""
        self._autoscalers.pop(key, None)

    async def decide(
        self,
        key: tuple[str, str],
        resource: MoEServing,
        observed: Observed,
        fleet: Fleet,
        engines: Mapping[EngineRole, RoleEngines],
        rates: Mapping[str, TokenRate],
    ) -> Outcome:
        """How many engines of each role should run.

        Args:
            key: of the resource.
            resource: the resource, whose autoscaling is of roles.
            observed: what is there now.
            fleet: the newest states.
            engines: of each role.
            rates: tokens per second of each engine, by pod.
        """
        section = resource.spec.autoscaling
        if section is None or not observed.role_replicas:
            numbers = role_numbers(resource, observed.role_replicas)
            return Outcome(replicas=sum(numbers.values()), reason="first", limited=None)
        outcomes = {}
        for role, number in role_numbers(resource, observed.role_replicas).items():
            outcomes[role] = await self._decide(
                key, resource, section, role, observed.role_replicas.get(role, number), fleet, engines[role], rates
            )
        return _sum_up(outcomes)

    async def _decide(
        self,
        key: tuple[str, str],
        resource: MoEServing,
        section: Autoscaling,
        role: EngineRole,
        replicas: int,
        fleet: Fleet,
        engines: RoleEngines,
        rates: Mapping[str, TokenRate],
    ) -> Outcome:
        settings = role_settings(section, role)
        reading = await _read(key, resource, role, settings, fleet, engines, rates)
        path = f"autoscaling.roles.{role.value}"
        own = self._autoscalers.setdefault(key, {})
        outcome = own.setdefault(role, Autoscaler(self._clock, f"{role.value} engines", path)).decide(
            replicas,
            set(engines.ready),
            set(engines.loading),
            reading.signal,
            settings,
            asked=asks(fleet.gateways),
            source="gateways and engines" if resource.spec.metrics.prometheus is None else "Prometheus",
        )
        if outcome.replicas != replicas:
            log.info("%s/%s: %d -> %d %s engines: %s", *key, replicas, outcome.replicas, role, outcome.reason)
        return outcome


async def _read(
    key: tuple[str, str],
    resource: MoEServing,
    role: EngineRole,
    settings: FleetSettings,
    fleet: Fleet,
    engines: RoleEngines,
    rates: Mapping[str, TokenRate],
) -> Reading:
    """The signal of a role, from the source that the resource names."""
    inter_token_s, prometheus = settings.targets.inter_token_s, resource.spec.metrics.prometheus
    if prometheus is not None:
        queries = build_role_queries(key[0], Names(key[1]), role, inter_token_s)
        return await fetch_reading(prometheus.url, key, fleet, queries)
    pods = engines.ready | engines.loading
    tokens_per_s = sum_rates(rate for pod, rate in rates.items() if pod in pods)
    return Reading(signal=build_role_signal(fleet, role, pods, inter_token_s, tokens_per_s))


def _sum_up(outcomes: Mapping[EngineRole, Outcome]) -> Outcome:
    """The decisions over all roles as one; the limits of each role are named, the gravest first."""
    found = [outcome.limited for outcome in outcomes.values() if outcome.limited is not None]
    limits = sorted(found, key=lambda limit: _GRAVEST_FIRST.index(limit[0]))
    return Outcome(
        replicas=sum(outcome.replicas for outcome in outcomes.values()),
        reason=", ".join(f"{role}: {outcome.reason}" for role, outcome in outcomes.items()),
        limited=(limits[0][0], "; ".join(dict.fromkeys(message for _, message in limits))) if limits else None,
        roles={role: outcome.replicas for role, outcome in outcomes.items()},
    )

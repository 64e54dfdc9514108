"""Where the autoscaler of each resource gets its signal: from gateways and agents, or from Prometheus."""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.reasons import Reason
from moe_operator.api.resource import MoEServing
from moe_operator.autoscale.autoscaler import Autoscaler, Outcome
from moe_operator.autoscale.prometheus import Reading, fetch_reading
from moe_operator.autoscale.roles import RoleAutoscalers, RoleEngines
from moe_operator.autoscale.settings import fleet_settings
from moe_operator.autoscale.signal import Fleet, Freshness, States, asks, build_signal
from moe_operator.autoscale.token_rate import TokenCount, TokenRate, measure_rates, sum_rates
from moe_operator.plan import Observed
from moe_operator.plan.cluster import STABLE, plan_replicas
from moe_operator.plan.names import REVISION, ROLE
from moe_operator.plan.pod_status import GATEWAY, component_of, is_engine, is_live, is_ready, label_of

Document = dict[str, Any]
log = logging.getLogger("moeserving.operator")


class Sources:
    """An autoscaler for each resource that has the mode `internal`."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._autoscalers: dict[tuple[str, str], Autoscaler] = {}
        self._roles = RoleAutoscalers()
        self._rates: dict[tuple[str, str], dict[str, TokenRate]] = {}
        self._due_s: dict[tuple[str, str], tuple[float, Outcome]] = {}

    def forget(self, key: tuple[str, str]) -> None:
        """Drops the records of a deleted resource."""
        for kept in (self._autoscalers, self._rates, self._due_s):
            kept.pop(key, None)
        self._roles.forget(key)

    async def decide(
        self,
        key: tuple[str, str],
        resource: MoEServing,
        observed: Observed,
        pods: Sequence[Document],
        states: States,
        whole: Collection[str] | None = None,
    ) -> Outcome:
        """Engines that should run; without autoscaling, what the resource says.

        Args:
            key: of the resource.
            resource: the resource.
            observed: what is there now.
            pods: of the resource.
            states: of its agents and gateways.
            whole: names of the pods that stand for an engine all of whose pods are ready; None where each ready pod
                does.
        """
        replicas = plan_replicas(resource, observed)
        section = resource.spec.autoscaling
        if section is None or section.mode is AutoscalingMode.EXTERNAL:
            self.forget(key)
            return Outcome(replicas=replicas, reason="resource", limited=_external_limit(resource))
        if observed.replicas is None:
            return Outcome(replicas=replicas, reason="first", limited=None)
        now_s = time.monotonic()
        fleet = _read_fleet(pods, states, now_s)
        self._rates[key] = measure_rates(self._rates.get(key, {}), _counts(fleet, states, now_s))
        if section.roles is not None:
            return await self._roles.decide(key, resource, observed, fleet, _engines_of_roles(pods), self._rates[key])
        self._roles.forget(key)
        ready, loading = _engines(pods, whole)
        settings = fleet_settings(section)
        reading = await self._read(key, resource, fleet, asleep=observed.replicas == 0)
        outcome = self._autoscalers.setdefault(key, Autoscaler()).decide(
            observed.replicas,
            ready,
            loading,
            reading.signal,
            settings,
            asked=asks(fleet.gateways) or reading.asks(time.monotonic() - settings.stale_after_s),
            source="gateways and engines" if resource.spec.metrics.prometheus is None else "Prometheus",
        )
        if outcome.replicas != observed.replicas:
            log.info("%s/%s: %d -> %d engines: %s", *key, observed.replicas, outcome.replicas, outcome.reason)
        return outcome

    async def _read(self, key: tuple[str, str], resource: MoEServing, fleet: Fleet, *, asleep: bool) -> Reading:
        """The signal of the source that the resource names.

        A request that a gateway has wakes the first engine without waiting for Prometheus.
        """
        prometheus = resource.spec.metrics.prometheus
        if prometheus is None:
            return Reading(signal=build_signal(fleet, sum_rates(self._rates[key].values())))
        if asleep and asks(fleet.gateways):
            return Reading()
        return await fetch_reading(prometheus.url, key, fleet)


def _external_limit(resource: MoEServing) -> tuple[Reason, str] | None:
    section, replicas = resource.spec.autoscaling, resource.spec.engine.replicas
    if section is None or section.min_replicas <= replicas <= section.max_replicas:
        return None
    bounds = f"{section.min_replicas} to {section.max_replicas}"
    return Reason.OUT_OF_BOUNDS, f"engine.replicas is {replicas}, outside of autoscaling's {bounds}"


def _read_fleet(pods: Sequence[Document], states: States, now_s: float) -> Fleet:
    ready = [pod["metadata"]["name"] for pod in pods if component_of(pod) == GATEWAY and is_ready(pod)]
    names = {pod["metadata"]["name"] for pod in pods if is_engine(pod)}
    engines = {name: state for name, state in states.engines.items() if name in names}
    signs = [states.freshness[name].alive_s for name in (*states.gateways, *engines) if name in states.freshness]
    return Fleet(
        gateways=tuple(states.gateways.values()),
        engines=engines,
        silent=sum(name not in states.gateways for name in ready),
        ready=len(ready),
        observed_s=min(signs, default=now_s),
    )


def _counts(fleet: Fleet, states: States, now_s: float) -> dict[str, TokenCount]:
    asked = Freshness(as_of_s=now_s, alive_s=now_s)
    return {
        name: TokenCount(tokens=state.computed_tokens, as_of_s=states.freshness.get(name, asked).as_of_s)
        for name, state in fleet.engines.items()
    }


def with_outcome(observed: Observed, outcome: Outcome) -> Observed:
    """What is observed, with the numbers of engines that were decided."""
    roles = outcome.roles or observed.role_replicas
    return replace(observed, replicas=outcome.replicas, role_replicas=roles)


def _engines_of_roles(pods: Sequence[Document]) -> dict[EngineRole, RoleEngines]:
    found = {}
    for role in (EngineRole.PREFILL, EngineRole.DECODE):
        ready, loading = _engines([pod for pod in pods if label_of(pod, ROLE) == role.value])
        found[role] = RoleEngines(ready=frozenset(ready), loading=frozenset(loading))
    return found


def _engines(pods: Sequence[Document], whole: Collection[str] | None = None) -> tuple[set[str], set[str]]:
    """Names of stable engines that are ready, and of those that are not yet."""
    stable = [pod for pod in pods if is_engine(pod) and label_of(pod, REVISION) == STABLE and is_live(pod)]
    names = {pod["metadata"]["name"] for pod in stable}
    ready = {pod["metadata"]["name"] for pod in stable if is_ready(pod)}
    ready = ready if whole is None else ready & {*whole}
    return ready, names - ready

"""Whether a request that comes in would reach an engine: the Service's endpoints, and what gateways see of engines.

A ready pod is not yet an endpoint, and a ready engine is not yet known to a gateway: the condition `Ready` waits for
both. `GatewayEndpoints` is owned by the reconciler; all else is pure.
"""

import logging
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from moe_contract.api_server import ApiError, Kind
from moe_contract.gateway_state import GatewayState

from moe_operator.api.reasons import Reason
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.diagnosis import parse_time
from moe_operator.kubernetes.finding import Finding, build_finding
from moe_operator.kubernetes.store import Key
from moe_operator.plan.pod_status import GATEWAY, component_of, condition_of, is_engine, is_ready

log = logging.getLogger("moeserving.operator")

Document = dict[str, Any]
ENDPOINT_SLICE = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
SERVICE_LABEL = "kubernetes.io/service-name"
# A gateway learns of an engine within a second; both have been ready for so long when it counts as a fault.
SEEN_WITHIN = timedelta(seconds=60)


class GatewayEndpoints:
    """Asks for the endpoints of a gateway's Service when other gateways are ready than at the last answer.

    While the same gateways stay ready they stay endpoints, so a resource that is well costs no call.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[Key, frozenset[str]] = {}

    def forget(self, key: Key) -> None:
        """Drops what is kept for a resource that was deleted."""
        self._known.pop(key, None)

    async def has_ready(self, key: Key, service: str, pods: Iterable[Document]) -> bool:
        """Whether clients of the Service reach a ready gateway; False without one."""
        ready = frozenset(pod["metadata"].get("uid", "") for pod in pods if is_gateway(pod) and is_ready(pod))
        if not ready:
            self.forget(key)
            return False
        if self._known.get(key) == ready:
            return True
        try:
            slices = await self._api.select(ENDPOINT_SLICE, key.namespace, labels=f"{SERVICE_LABEL}={service}")
        except ApiError as error:
            # It is asked again soon; the status must be written all the same.
            log.warning("%s: the endpoints of its gateways cannot be read: %s", key, error)
            return key in self._known
        if any_ready(slices):
            self._known[key] = ready
            return True
        return False


def any_ready(slices: Iterable[Document]) -> bool:
    """Whether one of the endpoints is ready; an absent condition counts as ready, as the API has it."""
    return any(
        (endpoint.get("conditions") or {}).get("ready") is not False
        for row in slices
        for endpoint in row.get("endpoints") or ()
    )


def is_gateway(pod: Document) -> bool:
    """Whether the pod is a gateway."""
    return component_of(pod) == GATEWAY


def sees_engines(gateways: Iterable[GatewayState]) -> bool | None:
    """Whether a gateway that answered can send requests to an engine; None when none answered."""
    seen = [sees_engine(state) for state in gateways]
    return any(seen) if seen else None


def sees_engine(state: GatewayState) -> bool:
    """Whether a gateway has an engine that takes requests."""
    return state.accepting or any(row.accepting for row in state.engines)


def find_blind_gateways(pods: Sequence[Document], states: States, now: datetime) -> list[Finding]:
    """Gateways that see no engine, though engines have been ready for longer than it takes to notice them."""
    if not any(is_engine(pod) and _ready_for(pod, now) > SEEN_WITHIN for pod in pods):
        return []
    advice = (
        "the gateway sees none of the ready engines; look at its log, at the EndpointSlices of the engines' Service "
        "and at NetworkPolicies"
    )
    return [
        build_finding(Reason.ENGINES_NOT_SEEN, advice, where=f"pod {name}", detail="", component=GATEWAY, pod=name)
        for pod in pods
        if is_gateway(pod) and _ready_for(pod, now) > SEEN_WITHIN
        if (name := pod["metadata"]["name"]) in states.gateways and not sees_engine(states.gateways[name])
    ]


def _ready_for(pod: Document, now: datetime) -> timedelta:
    """For how long a pod has been ready; zero when it is not, or since when is not known."""
    since = parse_time((condition_of(pod, "Ready") or {}).get("lastTransitionTime")) if is_ready(pod) else None
    return now - since if since is not None else timedelta()

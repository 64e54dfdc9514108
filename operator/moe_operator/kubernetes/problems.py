"""Finds what is wrong with a resource's objects, from the store, the agents' states and, where needed, from events.

Owned by the reconciler. It keeps for each resource what its events said, so that one that stays broken is not asked for
at each pass; a resource that is well costs no call.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moe_contract.api_server import ApiError

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.children import WORKLOADS
from moe_operator.kubernetes.diagnosis import find_gated, find_problems, first_of_each_reason
from moe_operator.kubernetes.disruptions import find_disrupted, find_lost
from moe_operator.kubernetes.event_problems import Suspect, find_suspects, read_events
from moe_operator.kubernetes.finding import Finding
from moe_operator.kubernetes.group_history import GroupHistory
from moe_operator.kubernetes.kinds import AUTOSCALER, EVENT
from moe_operator.kubernetes.scaler_problems import find_inactive_scalers
from moe_operator.kubernetes.serving import find_blind_gateways
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.workload_problems import (
    find_deadlines,
    find_failures_to_create,
    find_failures_to_delete,
)

Document = dict[str, Any]
# Kubelets and controllers repeat a failure every few seconds to minutes.
EVENTS_EVERY_S = 10.0

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What was found.

    Attributes:
        findings: what is wrong, the first of each reason; what keeps pods from being made comes first.
        gated: pods that a queueing system holds back, in words.
        disrupted: pods that Kubernetes takes away, in words.
        ripens: something may become a finding by time alone, though no pod does.
    """

    findings: tuple[Finding, ...] = ()
    gated: tuple[str, ...] = ()
    disrupted: tuple[str, ...] = ()
    ripens: bool = False


class ProblemFinder:
    """Looks for problems of one resource after the other.

    Args:
        api: for events.
        store: the cluster as it was last seen.
        clock: seconds that only rise.
    """

    def __init__(self, api: Api, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._store, self._clock = api, store, clock
        self._groups = GroupHistory()
        self._read: dict[Key, tuple[float, list[Suspect], list[Finding]]] = {}

    def forget(self, key: Key) -> None:
        """Drops what is kept for a resource that was deleted."""
        self._read.pop(key, None)
        self._groups.forget(key)

    async def find(self, key: Key, pods: Sequence[Document], states: States, nodes: int = 1) -> Problems:
        """The problems of a resource as of now; `nodes` is how many one engine spans."""
        now = datetime.now(UTC)
        workloads = [live for _, live in self._store.children(key, WORKLOADS)]
        inactive, ripens = find_inactive_scalers((live for _, live in self._store.children(key, (AUTOSCALER,))), now)
        found = [
            *find_failures_to_create(workloads),
            *find_problems(pods, states, now, workloads),
            *find_lost(pods, workloads, nodes, now),
            *self._groups.observe(key, pods, nodes, now),
            *await self._from_events(key, find_suspects(pods, workloads, now), now),
            *find_blind_gateways(pods, states, now),
            *find_failures_to_delete(workloads),
            *find_deadlines(workloads),
            *inactive,
        ]
        return Problems(
            findings=tuple(first_of_each_reason(found)),
            gated=tuple(find_gated(pods)),
            disrupted=tuple(find_disrupted(pods)),
            ripens=ripens,
        )

    async def _from_events(self, key: Key, suspects: list[Suspect], now: datetime) -> list[Finding]:
        if not suspects:
            self._read.pop(key, None)
            return []
        read_s, of, findings = self._read.get(key, (0.0, [], []))
        if of == suspects and self._clock() - read_s < EVENTS_EVERY_S:
            return findings
        findings = [found for suspect in suspects if (found := await self._ask(key, suspect, now)) is not None]
        self._read[key] = (self._clock(), suspects, findings)
        return findings

    async def _ask(self, key: Key, suspect: Suspect, now: datetime) -> Finding | None:
        fields = f"involvedObject.kind={suspect.kind},involvedObject.name={suspect.name}"
        try:
            events = await self._api.select(EVENT, key.namespace, fields=fields)
        except ApiError as error:
            log.warning("%s: no events of %s %s: %s", key, suspect.kind, suspect.name, error)
            return None
        return read_events(suspect, events, now)

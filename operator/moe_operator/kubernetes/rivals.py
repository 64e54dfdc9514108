"""Other releases of the operator that serve a namespace of this one, found by their Leases.

Each release has a Lease of its own, which says in an annotation which namespaces it serves. Of two that would serve the
same one, the second to come stands by and says why: two of them would write to the same objects.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_contract.api_server import FORBIDDEN, ApiError, Document

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import LEASE
from moe_operator.plan.names import COMPONENT, GROUP, MANAGED_BY, MANAGER

log = logging.getLogger("moeserving.operator")

# Of releases before the Lease took the release's name; without labels.
FORMER_LEASE = "moeserving-operator"
SERVES = f"{GROUP}/namespaces"
ALL = "*"
LABELS = {MANAGED_BY: MANAGER, COMPONENT: "operator"}


def render_scope(namespaces: Iterable[str]) -> str:
    """The namespaces that an operator serves, as its Lease has them."""
    return ",".join(sorted(namespaces)) or ALL


def overlaps(one: str, other: str) -> bool:
    """Whether two operators serve a namespace in common."""
    return ALL in (one, other) or bool({*one.split(",")} & {*other.split(",")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another release.

    Attributes:
        place: namespace and name of its Lease.
        scope: its namespaces, by `render_scope`.
    """

    place: str
    scope: str

    def __str__(self) -> str:
        return f"{self.place} (serves {'all namespaces' if self.scope == ALL else self.scope})"


class Rivals:
    """Looks for releases whose namespaces overlap.

    Args:
        api: reads Leases.
        namespace: of the own Lease.
        name: of the own Lease.
        scope: the own namespaces, by `render_scope`.
        clock: monotonic seconds.
    """

    def __init__(
        self, api: Api, namespace: str, name: str, scope: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api, self._namespace, self._name, self._scope, self._clock = api, namespace, name, scope, clock
        self._seen: dict[tuple[str, str], tuple[str, float]] = {}

    async def find(self) -> list[Rival]:
        """Returns each other release that lives and serves a namespace of this one, sorted by its Lease.

        Raises:
            ApiError: the call failed.
        """
        found = []
        for lease in await self._leases():
            scope = _scope(lease)
            if self._is_live(lease) and overlaps(scope, self._scope):
                place = f"{lease['metadata']['namespace']}/{lease['metadata']['name']}"
                found.append(Rival(place=place, scope=scope))
        return sorted(found, key=lambda rival: rival.place)

    async def _leases(self) -> list[Document]:
        """Those of other releases, as far as they may be read."""
        try:
            listing = await self._api.list(LEASE, None)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            try:
                listing = await self._api.list(LEASE, self._namespace)
            except ApiError as refusal:
                if refusal.status != FORBIDDEN:
                    raise
                log.warning("Leases cannot be listed, so other releases are not noticed: %s", refusal)
                listing = None
        rows = [] if listing is None else listing.items
        former = await self._api.get(LEASE, self._namespace, FORMER_LEASE)
        if former is not None and former["metadata"].get("labels", {}).get(MANAGED_BY) != MANAGER:
            rows = [*rows, former]
        own = (self._namespace, self._name)
        return [row for row in rows if (row["metadata"]["namespace"], row["metadata"]["name"]) != own]

    def _is_live(self, lease: Document) -> bool:
        """Whether its holder renews it; clocks of machines need not agree, so changes are what counts."""
        metadata, spec = lease["metadata"], lease.get("spec", {})
        place, now_s = (metadata["namespace"], metadata["name"]), self._clock()
        version, since_s = self._seen.get(place, ("", 0.0))
        if version != metadata["resourceVersion"]:
            since_s = now_s
        self._seen[place] = (metadata["resourceVersion"], since_s)
        return bool(spec.get("holderIdentity")) and now_s - since_s <= float(spec.get("leaseDurationSeconds") or 0)


def _scope(lease: Mapping[str, Any]) -> str:
    return str((lease["metadata"].get("annotations") or {}).get(SERVES, ALL))

"""Which engines there are, read from the EndpointSlices of the groups' Services. Pure; called by `discovery`.

Invariants: the answer depends on the slices alone, not on their order; each name and each address is there once.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from moe_contract.addresses import http_url
from moe_contract.api_server import Document
from moe_contract.engine_process import AGENT_PORT_NAME, ENGINE_PORT_NAME
from moe_contract.gateway_config import EngineAddress
from pydantic import ValidationError

SERVICE_LABEL = "kubernetes.io/service-name"
# The order in which one of an endpoint's addresses is chosen; slices of names are no longer made by Kubernetes.
ADDRESS_TYPES = ("IPv4", "IPv6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One engine behind a Service.

    Attributes:
        address: where it is.
        group: name of the Service.
        ready: as Kubernetes says; an absent condition counts as ready.
        terminating: its pod is about to end.
    """

    address: EngineAddress
    group: str
    ready: bool
    terminating: bool

    @property
    def offered(self) -> bool:
        """Whether it may get new work."""
        return self.ready and not self.terminating


def read_endpoints(slices: Iterable[Document], groups: Iterable[str], ranks: int) -> tuple[Endpoint, ...]:
    """The engines, in the order of their names.

    Args:
        slices: all that are known; those of other Services are left out.
        groups: names of the Services; an engine behind several belongs to the first.
        ranks: data-parallel ranks of each engine.
    """
    places = {group: place for place, group in enumerate(groups)}
    rows = sorted(
        (row for row in slices if _group_of(row) in places and row.get("addressType") in ADDRESS_TYPES),
        key=lambda row: (places[_group_of(row)], ADDRESS_TYPES.index(row["addressType"]), name_of_slice(row)),
    )
    found: dict[str, Endpoint] = {}
    addresses: dict[str, str] = {}
    for row in rows:
        for endpoint in _endpoints_of(row, ranks):
            name = endpoint.address.name
            # An address without a pod is named by itself, unless another slice names its pod.
            if addresses.setdefault(endpoint.address.url, name) == name:
                found[name] = _merge(found.get(name), endpoint)
    return tuple(found[name] for name in sorted(found))


def list_ready(slices: Iterable[Document], services: Collection[str]) -> tuple[str, ...]:
    """Names of the pods that are ready behind these Services; one that has addresses of two families stands once."""
    rows = [row for row in slices if _group_of(row) in services]
    given = [given for row in rows for given in row.get("endpoints") or () if given.get("addresses")]
    return tuple(sorted({_name_of(row) for row in given if (row.get("conditions") or {}).get("ready") is not False}))


def name_of_slice(row: Document) -> str:
    """Its name, which every slice of an API server has."""
    return str(row["metadata"].get("name") or "")


def _group_of(row: Document) -> str:
    return str((row["metadata"].get("labels") or {}).get(SERVICE_LABEL, ""))


def _endpoints_of(row: Document, ranks: int) -> Iterator[Endpoint]:
    rows = [port for port in row.get("ports") or () if port.get("port") and port.get("protocol") in (None, "TCP")]
    ports = {port.get("name"): port["port"] for port in rows}
    if (engine_port := ports.get(ENGINE_PORT_NAME)) is None:
        return
    for given in row.get("endpoints") or ():
        if not given.get("addresses"):
            continue
        host = given["addresses"][0]
        agent_port = ports.get(AGENT_PORT_NAME)
        try:
            address = EngineAddress(
                name=_name_of(given),
                url=http_url(host, engine_port),
                agent_url=None if agent_port is None else http_url(host, agent_port),
                ranks=ranks,
            )
        except ValidationError:
            continue
        yield _with_conditions(given, address, _group_of(row))


def _name_of(given: Document) -> str:
    return str((given.get("targetRef") or {}).get("name") or given["addresses"][0])


def _with_conditions(given: Document, address: EngineAddress, group: str) -> Endpoint:
    """`ready` and `serving` count as true where they are absent, `terminating` as false, as the API has it.

    A Service that publishes addresses which are not ready has `ready` true for all of them: there `serving` counts.
    """
    conditions = given.get("conditions") or {}
    ready = conditions.get("ready") is not False and conditions.get("serving") is not False
    return Endpoint(address=address, group=group, ready=ready, terminating=bool(conditions.get("terminating")))


def _merge(known: Endpoint | None, again: Endpoint) -> Endpoint:
    """The same engine in another slice: an endpoint that moves is in two for a while, with two families it always is.

    Which of the two is newer is unknown: ready in one is ready, and a pod that terminates in one terminates.
    """
    if known is None:
        return again
    return replace(known, ready=known.ready or again.ready, terminating=known.terminating or again.terminating)

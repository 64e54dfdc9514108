"""Engines found in Kubernetes: follows the EndpointSlices of the groups' Services and reports which engines there are.

Made by the gateway, whose callback gets all engines after each change; one task runs it. While the API server does not
answer, the engines known last stay.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import replace

from moe_contract.api_server import ApiError, ApiServer, Document, Kind, Listing, LoginError
from moe_contract.gateway_config import Discovery as Settings
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.list_watch import ListWatch, Times

from moe_gateway.engines.endpoints import SERVICE_LABEL, Endpoint, list_ready, name_of_slice, read_endpoints

ENDPOINT_SLICE = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
TIMES = Times(watch_s=60.0, relist_s=60.0)

log = logging.getLogger("moeserving.gateway")


def connect(settings: Settings, on_endpoints: "OnEndpoints", on_gateways: "OnGateways") -> "Discovery":
    """A discovery that has not begun; inside a cluster by the pod's own account, elsewhere by `KUBECONFIG`.

    Raises:
        InvalidInput: neither is there.
    """
    try:
        server = ApiServer()
    except LoginError as error:
        raise InvalidInput([InputError("discovery", str(error))]) from None
    discovery = Discovery(server, settings.namespace, settings.ranks, on_endpoints)
    if settings.gateways is not None:
        discovery.follow_gateways(settings.gateways, on_gateways)
    return discovery


OnEndpoints = Callable[[tuple[Endpoint, ...]], None]
OnGateways = Callable[[tuple[str, ...]], None]


class Discovery:
    """Keeps the list of engines equal to the EndpointSlices; a listener of one `ListWatch`.

    Args:
        server: the API server.
        namespace: where the Services are; None is the pod's own.
        ranks: data-parallel ranks of each engine.
        on_endpoints: called with all engines after each change of a slice.
        relist_s: longest time until the slices are listed again.

    Attributes:
        synced: whether the API server has answered once.
    """

    def __init__(
        self,
        server: ApiServer,
        namespace: str | None,
        ranks: int,
        on_endpoints: OnEndpoints,
        *,
        relist_s: float = TIMES.relist_s,
    ) -> None:
        self.synced = False
        self._server, self._namespace = server, namespace or server.namespace
        self._ranks, self._on_endpoints = ranks, on_endpoints
        self._times = replace(TIMES, relist_s=relist_s)
        self._groups: tuple[str, ...] = ()
        self._gateways: tuple[str, ...] = ()
        self._on_gateways: OnGateways | None = None
        self._slices: dict[str, Document] = {}

    def follow_gateways(self, service: str, on_gateways: OnGateways) -> None:
        """Reports the names of the ready endpoints of the gateways' own Service too; called before `run`."""
        self._gateways, self._on_gateways = (service,), on_gateways

    async def run(self, groups: Collection[str]) -> None:
        """Follows these Services until it is cancelled."""
        self._groups = tuple(groups)
        if not self._groups:
            # Nothing can be found, which is known at once.
            self._replace({})
            return
        selector = f"{SERVICE_LABEL} in ({','.join([*self._groups, *self._gateways])})"
        await ListWatch(self._server, ENDPOINT_SLICE, self._namespace, selector, self, self._times).run()

    async def close(self) -> None:
        """Closes the connections to the API server."""
        await self._server.close()

    def listed(self, listing: Listing) -> None:
        """Takes all slices there are."""
        self._replace({name_of_slice(row): row for row in listing.items})

    def changed(self, document: Document) -> None:
        """Takes a slice that is new or was changed."""
        self._replace(self._slices | {name_of_slice(document): document})

    def deleted(self, document: Document) -> None:
        """Forgets an EndpointSlice that was deleted."""
        gone = name_of_slice(document)
        self._replace({name: row for name, row in self._slices.items() if name != gone})

    def absent(self) -> None:
        """Never called: every cluster has EndpointSlices, so their kind is not optional."""

    def lost(self, error: ApiError) -> None:
        """Logs the first of a row of failures; the engines stay."""
        log.warning("lost the API server", extra={"reason": str(error)})

    def recovered(self) -> None:
        """Logs the end of such a row."""
        log.info("the API server answers again")

    def _replace(self, slices: dict[str, Document]) -> None:
        self._slices, self.synced = slices, True
        self._on_endpoints(read_endpoints(slices.values(), self._groups, self._ranks))
        if self._on_gateways is not None:
            self._on_gateways(list_ready(slices.values(), self._gateways))

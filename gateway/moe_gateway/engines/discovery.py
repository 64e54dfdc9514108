"""Engines found in Kubernetes: watches the EndpointSlices of the groups' Services and tells what engines there are.

Made by the gateway, which is told of each change by a call; one task runs it. While the API server does not answer, the
engines known last stay as they are.

A list, then a watch from its resource version; every minute, and after any error, a list again. So nothing that a watch
missed, or a connection that died unseen, stays wrong for longer.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import cast

from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.resources.discovery_v1 import EndpointSlice
from moe_contract.gateway_config import Discovery as Settings
from moe_contract.input_errors import InputError, InvalidInput

from moe_gateway.engines.endpoints import SERVICE_LABEL, Endpoint, name_of_slice, read_endpoints

WATCH_S = 60
# The server ends a watch; this is for the one whose end does not arrive.
RELIST_S = WATCH_S + 5.0
FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 5.0
GONE = 410

log = logging.getLogger("moeserving.gateway")


def connect(settings: Settings, tell: "Tell") -> "Discovery":
    """A discovery that has not begun; inside a cluster by the pod's own account, elsewhere by `KUBECONFIG`.

    Raises:
        InvalidInput: neither is there.
    """
    try:
        client = AsyncClient()
    except (ConfigError, OSError, ValueError, AttributeError) as error:
        message = f"neither a pod's account nor a usable kubeconfig: {error or type(error).__name__}"
        raise InvalidInput([InputError("discovery", message)]) from None
    return Discovery(client, settings.namespace, settings.ranks, tell)


Tell = Callable[[tuple[Endpoint, ...]], None]


class Discovery:
    """See the module.

    Args:
        client: of the API server.
        namespace: where the Services are; None is the client's own.
        ranks: data-parallel ranks of each engine.
        tell: called with all engines after each change of a slice.
        relist_s: longest time until the slices are listed again.

    Attributes:
        synced: whether the API server has answered once.
    """

    def __init__(
        self,
        client: AsyncClient,
        namespace: str | None,
        ranks: int,
        tell: Tell,
        *,
        relist_s: float = RELIST_S,
    ) -> None:
        self.synced = False
        self._client, self._namespace, self._ranks, self._tell = client, namespace, ranks, tell
        self._relist_s = relist_s
        self._slices: dict[str, EndpointSlice] = {}

    async def run(self, groups: Collection[str]) -> None:
        """Follows these Services until it is cancelled."""
        if not groups:
            # Nothing can be found, which is known at once.
            self._replace({}, groups)
            return
        wait_s, lost = FIRST_RETRY_S, False
        while True:
            try:
                version = await self._list(groups)
                if lost:
                    log.info("the API server answers again")
                wait_s, lost = FIRST_RETRY_S, False
                await self._watch(groups, version)
                continue
            except Exception as error:
                # Whatever an API server says or fails to say, the engines stay and it is asked again.
                if not lost and not _is_gone(error):
                    log.warning("lost the API server", extra={"reason": repr(error)})
                    lost = True
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(LONGEST_RETRY_S, 2 * wait_s)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def _list(self, groups: Collection[str]) -> str:
        """All slices; answers the version to watch from."""
        listed = self._client.list(EndpointSlice, namespace=self._namespace, labels={SERVICE_LABEL: list(groups)})
        slices = {name_of_slice(row): row async for row in listed}
        self._replace(slices, groups)
        return listed.resourceVersion

    async def _watch(self, groups: Collection[str], version: str) -> None:
        """Follows the changes until it is time for another list."""
        watched = self._client.watch(
            EndpointSlice,
            namespace=self._namespace,
            labels={SERVICE_LABEL: list(groups)},
            server_timeout=WATCH_S,
            resource_version=version,
        )
        events = cast(AsyncGenerator[tuple[str, EndpointSlice]], watched)
        async with aclosing(events), _at_most(self._relist_s):
            async for kind, row in events:
                changed = name_of_slice(row)
                slices = {name: known for name, known in self._slices.items() if name != changed}
                self._replace(slices if kind == "DELETED" else {**slices, changed: row}, groups)

    def _replace(self, slices: dict[str, EndpointSlice], groups: Collection[str]) -> None:
        self._slices, self.synced = slices, True
        self._tell(read_endpoints(slices.values(), groups, self._ranks))


@asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    """Ends what is within after so long; its own failures pass, those that are timeouts too."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise


def _is_gone(error: Exception) -> bool:
    """The version to watch from is too old, said by an event or by the status: it takes another list, no more."""
    if isinstance(error, ApiError):
        return error.status.code == GONE
    return getattr(getattr(error, "response", None), "status_code", None) == GONE

"""Keeps the operator's store equal to the cluster: a list-watch for pods and one for each kind of object of a plan.

The resource itself is watched by kopf, but in an operator of some namespaces alone: one that may not be read would end
kopf, and so all others. Made by the operator, which runs it as one task.

A kind that cannot be read in a namespace (no right, or a server that fails) keeps no other namespace waiting: `sight`
says what is not known, and resources there are left as they are.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial

from moe_contract.api_server import ApiError, ApiServer, Document, Kind, Listing
from moe_contract.list_watch import ListWatch, Times

from moe_operator.kubernetes.api import selector_of
from moe_operator.kubernetes.kinds import CHILDREN, POD, SERVING
from moe_operator.kubernetes.own_writes import OwnWrites, take_event
from moe_operator.kubernetes.sight import Sight, place_text
from moe_operator.kubernetes.store import Store, pack

# Time for a kind that fails again and again after the first was read, before the work begins without it.
PATIENCE_S = 30.0

log = logging.getLogger("moeserving.operator")


class Watches:
    """All list-watches of one operator.

    Args:
        server: the API server.
        store: gets the objects.
        namespaces: those that are followed; None is all of them.
        own: gets each resource of which an object changed, and says what changed otherwise than by the operator.
        calls: the lists are counted here, by verb and kind.
        times: of each list-watch.

    Attributes:
        kinds: those that the cluster has, as far as they were listed.
        sight: what could not be read.
        synced: set once every kind was listed, is known to be absent, or has had its time.
    """

    def __init__(
        self,
        server: ApiServer,
        store: Store,
        namespaces: Iterable[str | None],
        own: OwnWrites,
        calls: Counter[tuple[str, str]],
        times: Times,
    ) -> None:
        self.kinds: frozenset[Kind] = frozenset()
        self.synced = asyncio.Event()
        self._store, self._own, self._calls = store, own, calls
        places = [*namespaces]
        kinds = (POD, *CHILDREN) if None in places else (POD, *CHILDREN, SERVING)
        self.sight = Sight((kind, place) for kind in kinds for place in places)
        self._has_answered = asyncio.Event()
        self._follow = [
            ListWatch(server, kind, place, selector_of(kind), _Following(self, kind, place), times, partial(pack, kind))
            for kind in kinds
            for place in places
        ]

    async def run(self) -> None:
        """Follows everything until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._bound_sync())
            for one in self._follow:
                tasks.create_task(one.run())

    async def _bound_sync(self) -> None:
        """Lets the work begin without what still fails when all else has long been read."""
        await self._has_answered.wait()
        await asyncio.sleep(PATIENCE_S)
        self.synced.set()

    def listed(self, kind: Kind, namespace: str | None, listing: Listing) -> None:
        """Takes a list of a kind; a kind that the cluster lacked before concerns every resource."""
        changed = self._store.replace(kind, listing, namespace)
        if kind not in self.kinds:
            self.kinds |= {kind}
            if self.synced.is_set():
                log.info("the cluster has %s now", kind.name)
                changed = set(self._store.known())
        if self.sight.seen(kind, namespace) and self.synced.is_set():
            log.info("%s can be read", place_text(kind, namespace))
            changed |= {key for key in self._store.known() if namespace in (None, key.namespace)}
        self._count(kind, namespace)
        for key in changed:
            self._own.on_change(key)

    def absent(self, kind: Kind, namespace: str | None) -> None:
        """Notes that the cluster lacks a kind."""
        self.kinds -= {kind}
        self.sight.seen(kind, namespace)
        self._count(kind, namespace)

    def failed(self, kind: Kind, namespace: str | None, error: ApiError) -> None:
        """Notes that a kind cannot be read; its resources report it unless the failure passes by itself."""
        log.warning("%s cannot be read: %s", place_text(kind, namespace), error)
        if self.sight.failed(kind, namespace, error):
            self._sync()
            for key in self._store.known():
                if namespace in (None, key.namespace):
                    self._own.on_change(key)

    def changed(self, kind: Kind, document: Document) -> None:
        """Takes an object that is new or was changed."""
        take_event(self._store, self._own, kind, document)

    def deleted(self, kind: Kind, document: Document) -> None:
        """Removes a deleted object from the store."""
        if (key := self._store.remove(kind, document)) is not None:
            self._own.on_change(key)

    def _count(self, kind: Kind, namespace: str | None) -> None:
        self._calls["list", kind.name] += 1
        self._has_answered.set()
        self._sync()

    def _sync(self) -> None:
        if not self.sight.awaited:
            self.synced.set()


class _Following:
    """Listener of one kind in one namespace."""

    def __init__(self, watches: Watches, kind: Kind, namespace: str | None) -> None:
        self._watches, self._kind, self._namespace = watches, kind, namespace

    def listed(self, listing: Listing) -> None:
        self._watches.listed(self._kind, self._namespace, listing)

    def changed(self, document: Document) -> None:
        self._watches.changed(self._kind, document)

    def deleted(self, document: Document) -> None:
        self._watches.deleted(self._kind, document)

    def absent(self) -> None:
        self._watches.absent(self._kind, self._namespace)

    def lost(self, error: ApiError) -> None:
        self._watches.failed(self._kind, self._namespace, error)

    def recovered(self) -> None:
        log.info("%s: the API server answers again", place_text(self._kind, self._namespace))

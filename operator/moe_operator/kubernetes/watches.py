"""Keeps the operator's store equal to the cluster: a list-watch for pods and one for each kind of object of a plan.

The resource itself is watched by kopf. Made by the operator, which runs it as one task.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable

from moe_contract.api_server import ApiError, ApiServer, Document, Kind, Listing
from moe_contract.list_watch import ListWatch, Times

from moe_operator.kubernetes.api import selector_of
from moe_operator.kubernetes.kinds import CHILDREN, POD
from moe_operator.kubernetes.store import Key, Store

log = logging.getLogger("moeserving.operator")


class Watches:
    """All list-watches of one operator.

    Args:
        server: the API server.
        store: gets the objects.
        namespaces: those that are followed; None is all of them.
        on_change: called with each resource of which an object changed.
        calls: the lists are counted here, by verb and kind.
        times: of each list-watch.

    Attributes:
        kinds: those that the cluster has, as far as they were listed.
        synced: set once every kind was listed, or is known to be absent.
    """

    def __init__(
        self,
        server: ApiServer,
        store: Store,
        namespaces: Iterable[str | None],
        on_change: Callable[[Key], None],
        calls: Counter[tuple[str, str]],
        times: Times,
    ) -> None:
        self.kinds: frozenset[Kind] = frozenset()
        self.synced = asyncio.Event()
        self._store, self._on_change, self._calls = store, on_change, calls
        places = [*namespaces]
        self._waiting = {(kind, place) for kind in (POD, *CHILDREN) for place in places}
        self._follow = [
            ListWatch(server, kind, place, selector_of(kind), _Following(self, kind, place), times)
            for kind, place in self._waiting
        ]

    async def run(self) -> None:
        """Follows everything until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for one in self._follow:
                tasks.create_task(one.run())

    def listed(self, kind: Kind, namespace: str | None, listing: Listing) -> None:
        """Takes a list of a kind; a kind that the cluster lacked before concerns every resource."""
        changed = self._store.replace(kind, listing, namespace)
        if kind not in self.kinds:
            self.kinds |= {kind}
            if self.synced.is_set():
                log.info("the cluster has %s now", kind.name)
                changed = set(self._store.known())
        self._count(kind, namespace)
        for key in changed:
            self._on_change(key)

    def absent(self, kind: Kind, namespace: str | None) -> None:
        """Notes that the cluster lacks a kind."""
        self.kinds -= {kind}
        self._count(kind, namespace)

    def changed(self, kind: Kind, document: Document) -> None:
        """Takes an object that is new or was changed."""
        self._report(self._store.put(kind, document))

    def deleted(self, kind: Kind, document: Document) -> None:
        """Removes a deleted object from the store."""
        self._report(self._store.remove(kind, document))

    def _report(self, key: Key | None) -> None:
        if key is not None:
            self._on_change(key)

    def _count(self, kind: Kind, namespace: str | None) -> None:
        self._calls["list", kind.name] += 1
        self._waiting.discard((kind, namespace))
        if not self._waiting:
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
        log.warning("%s: lost the API server: %s", self._kind.plural, error)

    def recovered(self) -> None:
        log.info("%s: the API server answers again", self._kind.plural)

"""An operator without watches: what one knows right after its start, and passes one by one. Exact, and in this process.

What stands here for the cluster's controllers (no one runs at the API level) is `let_go_of_claims`.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
from moe_contract.api_server import ApiServer, Kind
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import CHILDREN, CLAIM, SERVING, WATCHED
from moe_operator.kubernetes.reconciler import Reconciler
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan import Defaults
from moe_operator.plan.names import APPLIED, OWNER
from serving_documents import serving

Document = dict[str, Any]
NO_WRITES = ("get", "list", "dry run")
MOST_PASSES = 12
# Differ from object to object and from time to time, and are the API server's.
_SERVERS_OWN = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "ownerReferences")


def writes(api: Api) -> dict[tuple[str, str], int]:
    """Number of changing calls by verb and kind."""
    return {call: count for call, count in api.calls.items() if call[0] not in NO_WRITES}


@contextlib.asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[ApiServer]:
    """A connection to the API server."""
    server = ApiServer(kubeconfig, trust_env=False)
    try:
        yield server
    finally:
        await server.close()


class FreshOperator:
    """A store filled from lists, and a reconciler."""

    def __init__(self, api: Api, session: aiohttp.ClientSession, namespaces: Iterable[str]) -> None:
        self.api, self.namespaces = api, tuple(namespaces)
        self.store = Store()
        self.kinds: frozenset[Kind] = frozenset()
        self.reconciler = Reconciler(api, self.store, session, Defaults(), lambda: self.kinds)

    async def relist(self) -> None:
        """As the operator at its start and at each resync."""
        present = set()
        for kind in WATCHED:
            for namespace in self.namespaces:
                listing = await self.api.list(kind, namespace)
                if listing is not None:
                    present.add(kind)
                    self.store.replace(kind, listing, namespace)
        self.kinds = frozenset(present)

    async def settle(self, key: Key) -> int:
        """Passes until one writes nothing; how many it took."""
        for number in range(MOST_PASSES):
            before = writes(self.api)
            await self.reconciler.reconcile(key)
            if writes(self.api) == before:
                return number
            await let_go_of_claims(self.api, self.store, key)
        raise AssertionError(f"{key}: still writes after {MOST_PASSES} passes: {writes(self.api)}")

    def children(self, key: Key) -> dict[tuple[str, str], Document]:
        """What the store knows, by kind and name."""
        return {(kind.name, doc["metadata"]["name"]): doc for kind, doc in self.store.children(key, CHILDREN)}


@contextlib.asynccontextmanager
async def started(kubeconfig: Path, *namespaces: str) -> AsyncIterator[FreshOperator]:
    """A fresh operator that has listed what there is."""
    async with connect(kubeconfig) as server, aiohttp.ClientSession() as session:
        operator = FreshOperator(Api(server), session, namespaces)
        await operator.relist()
        yield operator


async def let_go_of_claims(api: Api, store: Store, key: Key) -> None:
    """The API server protects claims; the controller that lets them go once no pod has them does not run here."""
    for live in store.of(key, CLAIM):
        now = await api.get(CLAIM, key.namespace, live["metadata"]["name"])
        if now is None:
            store.remove(CLAIM, live)
        elif "deletionTimestamp" in now["metadata"]:
            await api.merge(CLAIM, key.namespace, now["metadata"]["name"], {"metadata": {"finalizers": None}})
            store.remove(CLAIM, now)


async def fetch_all(api: Api, kind: Kind, namespace: str) -> list[Document]:
    """The operator's objects of a kind in a namespace."""
    listing = await api.list(kind, namespace)
    return [] if listing is None else listing.items


async def fetch_children(api: Api, namespace: str) -> dict[tuple[str, str], Document]:
    """All children in a namespace, by kind and name."""
    found: dict[tuple[str, str], Document] = {}
    for kind in CHILDREN:
        for document in await fetch_all(api, kind, namespace):
            found[kind.name, document["metadata"]["name"]] = document
    return found


async def fetch_serving(api: Api, key: Key) -> Document | None:
    """The resource as the API server has it, None when it is gone."""
    return await api.get(SERVING, key.namespace, key.name)


def comparable(document: Document) -> Document:
    """An object without what differs between two that are made alike: what the API server chose, and the token."""
    metadata = {name: value for name, value in document["metadata"].items() if name not in _SERVERS_OWN}
    # Both tell of the owner's uid.
    metadata["annotations"] = {
        name: value for name, value in metadata.get("annotations", {}).items() if name not in (APPLIED, OWNER)
    }
    rest = {name: value for name, value in document.items() if name != "status"}
    if document["kind"] == "Secret":
        rest["data"] = sorted(document.get("data", {}))
    if document["kind"] == "Service" and document["spec"]["clusterIP"] != "None":
        rest["spec"] = {name: value for name, value in document["spec"].items() if not name.startswith("clusterIP")}
    return rest | {"metadata": metadata}


def conditions(document: Document) -> dict[str, Document]:
    """The conditions of a resource by type."""
    return {row["type"]: row for row in document.get("status", {}).get("conditions", [])}


__all__ = [
    "FreshOperator",
    "comparable",
    "conditions",
    "connect",
    "fetch_all",
    "fetch_children",
    "fetch_serving",
    "let_go_of_claims",
    "started",
    "writes",
]


async def served(operator: FreshOperator, namespace: str, document: Document | None = None) -> Key:
    """Creates a resource and settles it; returns its key."""
    document = document or serving()
    made = await operator.api.create(SERVING, document | {"metadata": document["metadata"] | {"namespace": namespace}})
    operator.store.put(SERVING, made)
    key = Key(namespace, document["metadata"]["name"])
    await operator.settle(key)
    return key


async def change(operator: FreshOperator, key: Key, **spec: Any) -> None:
    """Fields of the resource's spec, and what comes of it."""
    await operator.api.merge(SERVING, *key, {"spec": spec})
    await operator.relist()
    await operator.settle(key)


async def fetch(operator: FreshOperator, kind: Kind, key: Key, name: str) -> Document:
    """An object of the resource's namespace that has to be there."""
    found = await operator.api.get(kind, key.namespace, name)
    assert found is not None, f"{kind.name} {name}"
    return found


async def fetch_conditions(operator: FreshOperator, key: Key) -> dict[str, Document]:
    """The resource's conditions by type."""
    return conditions(await fetch_serving(operator.api, key) or {})

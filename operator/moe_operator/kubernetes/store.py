"""The operator's copy of the cluster: the newest version seen of each object, found by resource and kind.

Fed by watches, by the answers to the operator's own writes, and by whole lists (which alone show what vanished while no
watch was open). Owned by the operator's event loop.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson
from moe_contract.api_server import Document, Kind, Listing

from moe_operator.kubernetes.kinds import DEPLOYMENT, LEADER_WORKER_SET, SERVING
from moe_operator.plan.names import INSTANCE

# Of these is asked who set the number of replicas; all other managed fields, half of an object, are left out.
SCALED = (DEPLOYMENT, LEADER_WORKER_SET)
_REPLICAS: Document = {"f:spec": {"f:replicas": {}}}
_FOUND_BY = ("namespace", "name", "uid", "resourceVersion", "labels")


class Key(NamedTuple):
    """A resource: namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Mark(NamedTuple):
    """Which object, and which version of it."""

    uid: str
    version: int


class _Kept(NamedTuple):
    """An object as JSON, which takes a tenth of the memory of the same in Python's objects, and what is asked often."""

    namespace: str
    version: int
    uid: str
    text: bytes


class Packed(dict[str, Any]):
    """An object of a list as the store keeps it, beside the metadata by which the store finds it."""

    def __init__(self, kind: Kind, document: Document) -> None:
        metadata = document["metadata"]
        super().__init__(metadata={name: metadata[name] for name in _FOUND_BY if name in metadata})
        self.text = _text(kind, document)


def pack(kind: Kind, document: Document) -> Packed:
    """Makes of a listed object what the store takes; the whole of it takes ten times the memory meanwhile."""
    return Packed(kind, document)


class Store:
    """The objects of the cluster by resource, kind and name.

    A document that is read from it is the reader's own.
    """

    def __init__(self) -> None:
        self._objects: dict[Key, dict[tuple[Kind, str], _Kept]] = {}

    def put(self, kind: Kind, document: Document) -> Key | None:
        """Keeps an object unless a newer version is known; returns its resource, None when nothing changed."""
        key = key_of(kind, document)
        if key is None:
            return self._forget(kind, document)
        place, shelf = (kind, document["metadata"]["name"]), self._objects.setdefault(key, {})
        known = shelf.get(place)
        if known is not None and _version(document) <= known.version and _uid(document) == known.uid:
            return None
        shelf[place] = _keep(kind, document)
        return key

    def remove(self, kind: Kind, document: Document) -> Key | None:
        """Forgets an object, unless another of its name has taken its place."""
        key = key_of(kind, document)
        if key is None:
            return None
        place, shelf = (kind, document["metadata"]["name"]), self._objects.get(key, {})
        known = shelf.get(place)
        if known is not None and known.uid == _uid(document):
            del shelf[place]
        if not shelf:
            self._objects.pop(key, None)
        return key

    def _forget(self, kind: Kind, document: Document) -> Key | None:
        """Forgets an object whose label no longer names its resource; returns the resource that had it."""
        metadata = document["metadata"]
        for key, shelf in self._objects.items():
            known = shelf.get((kind, metadata["name"]))
            if known is not None and key.namespace == metadata.get("namespace") and known.uid == _uid(document):
                return self.remove(kind, orjson.loads(known.text))
        return None

    def replace(self, kind: Kind, listing: Listing, namespace: str | None) -> set[Key]:
        """Takes a whole list of a kind in a namespace (None: all); returns the resources of what is new or gone.

        An object that is newer than the list was made after it, so its absence from the list says nothing.
        """
        touched = {self.put(kind, document) for document in listing.items}
        seen = {(row["metadata"]["namespace"], row["metadata"]["name"]) for row in listing.items}
        for shelf in [*self._objects.values()]:
            for (of_kind, name), kept in [*shelf.items()]:
                in_scope = of_kind == kind and namespace in (None, kept.namespace)
                if in_scope and (kept.namespace, name) not in seen and kept.version <= int(listing.version):
                    touched.add(self.remove(kind, orjson.loads(kept.text)))
        return {key for key in touched if key is not None}

    def get(self, key: Key, kind: Kind, name: str) -> Document | None:
        """One object of a resource, None when it is not known."""
        kept = self._objects.get(key, {}).get((kind, name))
        return None if kept is None else orjson.loads(kept.text)

    def serving(self, key: Key) -> Document | None:
        """The resource itself, None when it is not known."""
        return self.get(key, SERVING, key.name)

    def of(self, key: Key, kind: Kind) -> list[Document]:
        """The objects of a kind that belong to a resource."""
        return [document for _, document in self.children(key, (kind,))]

    def children(self, key: Key, kinds: Iterable[Kind]) -> Iterator[tuple[Kind, Document]]:
        """The objects of these kinds that belong to a resource, by name, whatever came first."""
        wanted = set(kinds)
        for (kind, _), kept in sorted(self._objects.get(key, {}).items(), key=lambda row: row[0][1]):
            if kind in wanted:
                yield kind, orjson.loads(kept.text)

    def marks(self, kind: Kind) -> Iterator[tuple[Key, Mark]]:
        """The resource and the mark of every object of a kind, without reading the objects."""
        for key, shelf in self._objects.items():
            yield from ((key, Mark(kept.uid, kept.version)) for (of_kind, _), kept in shelf.items() if of_kind == kind)

    def count(self, kind: Kind) -> int:
        """How many objects of a kind there are."""
        return sum(of_kind == kind for shelf in self._objects.values() for of_kind, _ in shelf)

    def known(self) -> list[Key]:
        """All resources with at least one known object."""
        return list(self._objects)


def _keep(kind: Kind, document: Document) -> _Kept:
    text = document.text if isinstance(document, Packed) else _text(kind, document)
    return _Kept(sys.intern(document["metadata"]["namespace"]), _version(document), _uid(document), text)


def _text(kind: Kind, document: Document) -> bytes:
    metadata = document["metadata"]
    if "managedFields" in metadata:
        metadata = {name: value for name, value in metadata.items() if name != "managedFields"}
        if kind in SCALED:
            metadata["managedFields"] = _scaling_fields(document["metadata"]["managedFields"])
    # A copy: orjson returns its text in a buffer that is three to four times as large, and keeps its size.
    return bytes(memoryview(orjson.dumps({**document, "metadata": metadata})))


def _scaling_fields(entries: Iterable[Document]) -> list[Document]:
    """The managers of the number of replicas, in the form of managed fields."""
    owners = (row for row in entries if "f:replicas" in row.get("fieldsV1", {}).get("f:spec", {}))
    return [{"manager": row.get("manager", ""), "fieldsV1": _REPLICAS} for row in owners]


def key_of(kind: Kind, document: Document) -> Key | None:
    """The resource that an object is or belongs to."""
    metadata = document["metadata"]
    name = metadata["name"] if kind == SERVING else metadata.get("labels", {}).get(INSTANCE)
    return None if name is None else Key(metadata["namespace"], name)


def _version(document: Document) -> int:
    # Comparable as numbers since Kubernetes says so (KEP-5504); before, etcd made them so.
    return int(document["metadata"].get("resourceVersion") or 0)


def _uid(document: Document) -> str:
    return str(document["metadata"].get("uid", ""))

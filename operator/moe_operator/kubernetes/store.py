"""What the operator knows of the cluster: the newest version seen of each object, found by resource and kind.

Fed by the watches, by the answers to the operator's own writes, and by whole lists (which alone see what vanished while
no watch was open). Owned by the operator's event loop.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from moe_operator.kubernetes.kinds import SERVING, Kind
from moe_operator.plan.names import INSTANCE

Document = dict[str, Any]


class Key(NamedTuple):
    """A resource: namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Store:
    """See the module."""

    def __init__(self) -> None:
        self._objects: dict[Key, dict[tuple[Kind, str], Document]] = defaultdict(dict)

    def put(self, kind: Kind, document: Document) -> Key | None:
        """Keeps an object unless a newer version is known; the resource that it belongs to, None when it is no news."""
        key = key_of(kind, document)
        if key is None:
            return None
        place, shelf = (kind, document["metadata"]["name"]), self._objects[key]
        known = shelf.get(place)
        if known is not None and _version(document) <= _version(known) and _uid(document) == _uid(known):
            return None
        shelf[place] = document
        return key

    def remove(self, kind: Kind, document: Document) -> Key | None:
        """Forgets an object, unless another of its name has taken its place."""
        key = key_of(kind, document)
        if key is None:
            return None
        place = (kind, document["metadata"]["name"])
        known = self._objects[key].get(place)
        if known is not None and _uid(known) == _uid(document):
            del self._objects[key][place]
        if not self._objects[key]:
            del self._objects[key]
        return key

    def replace(self, kind: Kind, documents: Iterable[Document], before: frozenset[tuple[str, str]]) -> set[Key]:
        """Takes a whole list of a kind: what was known `before` it was asked for and is not in it is gone."""
        touched: set[Key] = set()
        seen = set()
        for document in documents:
            seen.add((document["metadata"]["namespace"], document["metadata"]["name"]))
            touched |= {key for key in [self.put(kind, document)] if key is not None}
        for document in [*self.every(kind)]:
            place = (document["metadata"]["namespace"], document["metadata"]["name"])
            if place in before and place not in seen:
                touched |= {key for key in [self.remove(kind, document)] if key is not None}
        return touched

    def get(self, key: Key, kind: Kind, name: str) -> Document | None:
        """One object."""
        return self._objects.get(key, {}).get((kind, name))

    def serving(self, key: Key) -> Document | None:
        """The resource itself."""
        return self.get(key, SERVING, key.name)

    def of(self, key: Key, kind: Kind) -> list[Document]:
        """The objects of a kind that belong to a resource."""
        shelf = self._objects.get(key, {})
        return [document for (of_kind, _), document in shelf.items() if of_kind == kind]

    def children(self, key: Key, kinds: Iterable[Kind]) -> Iterator[tuple[Kind, Document]]:
        """The objects of these kinds that belong to a resource."""
        wanted = set(kinds)
        for (kind, _), document in [*self._objects.get(key, {}).items()]:
            if kind in wanted:
                yield kind, document

    def every(self, kind: Kind) -> Iterator[Document]:
        """All objects of a kind."""
        for shelf in self._objects.values():
            yield from (document for (of_kind, _), document in shelf.items() if of_kind == kind)

    def places(self, kind: Kind) -> frozenset[tuple[str, str]]:
        """Namespace and name of all objects of a kind."""
        return frozenset((doc["metadata"]["namespace"], doc["metadata"]["name"]) for doc in self.every(kind))

    def known(self) -> list[Key]:
        """All resources of which anything is known."""
        return list(self._objects)


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

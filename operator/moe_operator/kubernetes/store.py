"""The operator's copy of the cluster: the newest version seen of each object, found by resource and kind.

Fed by watches, by the answers to the operator's own writes, and by whole lists (which alone show what vanished while no
watch was open). Owned by the operator's event loop.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe_contract.api_server import Document, Kind, Listing

from moe_operator.kubernetes.kinds import SERVING
from moe_operator.plan.names import INSTANCE


class Key(NamedTuple):
    """A resource: namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Store:
    """The objects of the cluster by resource, kind and name."""

    def __init__(self) -> None:
        self._objects: dict[Key, dict[tuple[Kind, str], Document]] = defaultdict(dict)

    def put(self, kind: Kind, document: Document) -> Key | None:
        """Keeps an object unless a newer version is known; returns its resource, None when nothing changed."""
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

    def replace(self, kind: Kind, listing: Listing, namespace: str | None) -> set[Key]:
        """Takes a whole list of a kind in a namespace (None: all); returns the resources of what is new or gone.

        An object that is newer than the list was made after it, so its absence from the list says nothing.
        """
        touched = {self.put(kind, document) for document in listing.items}
        seen = {_place(document) for document in listing.items}
        for document in [*self.every(kind)]:
            in_scope = namespace in (None, document["metadata"]["namespace"])
            if in_scope and _place(document) not in seen and _version(document) <= int(listing.version):
                touched.add(self.remove(kind, document))
        return {key for key in touched if key is not None}

    def get(self, key: Key, kind: Kind, name: str) -> Document | None:
        """One object of a resource, None when it is not known."""
        return self._objects.get(key, {}).get((kind, name))

    def serving(self, key: Key) -> Document | None:
        """The resource itself, None when it is not known."""
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

    def known(self) -> list[Key]:
        """All resources with at least one known object."""
        return list(self._objects)


def key_of(kind: Kind, document: Document) -> Key | None:
    """The resource that an object is or belongs to."""
    metadata = document["metadata"]
    name = metadata["name"] if kind == SERVING else metadata.get("labels", {}).get(INSTANCE)
    return None if name is None else Key(metadata["namespace"], name)


def _place(document: Document) -> tuple[str, str]:
    return document["metadata"]["namespace"], document["metadata"]["name"]


def _version(document: Document) -> int:
    # Comparable as numbers since Kubernetes says so (KEP-5504); before, etcd made them so.
    return int(document["metadata"].get("resourceVersion") or 0)


def _uid(document: Document) -> str:
    return str(document["metadata"].get("uid", ""))

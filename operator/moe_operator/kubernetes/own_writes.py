"""The operator's own writes beside the changes of others: the first call for no pass, none of the second is missed.

The event of a write often comes before the answer to it. The pass that writes knows what it wrote, so one more would
find nothing to do; an event of any other version of the object, even in that moment, is a change like every other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moe_contract.api_server import Document, Kind

from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key, Store, key_of

Place = tuple[Kind, str, str]


@dataclass(slots=True)
class _Awaited:
    """Answers that are still to come for one object, and the versions of it that were seen meanwhile."""

    answers: int = 0
    seen: dict[str, Key] = field(default_factory=dict)


class OwnWrites:
    """The applies that have no answer yet, by object. Owned by the operator's event loop.

    Attributes:
        on_change: called with each resource of which somebody else changed an object meanwhile.
    """

    def __init__(self, on_change: Callable[[Key], None] = lambda key: None) -> None:
        self.on_change = on_change
        self._awaited: defaultdict[Place, _Awaited] = defaultdict(_Awaited)

    @contextmanager
    def awaiting(self, kind: Kind, document: Document) -> Iterator[list[Document]]:
        """The time of one write; its answer, where one comes, is to be put into the list."""
        place, answers = _place(kind, document), list[Document]()
        awaited = self._awaited[place]
        awaited.answers += 1
        try:
            yield answers
        finally:
            for answer in answers:
                awaited.seen.pop(_version(answer), None)
            awaited.answers -= 1
            if not awaited.answers:
                del self._awaited[place]
                for key in dict.fromkeys(awaited.seen.values()):
                    self.on_change(key)

    def is_awaited(self, kind: Kind, document: Document) -> bool:
        """Whether an answer for this object is still to come."""
        return _place(kind, document) in self._awaited

    def see(self, kind: Kind, document: Document, key: Key) -> None:
        """Takes an event of an object of a resource: reported now, or when the answer shows that it is not our own."""
        place = _place(kind, document)
        if place in self._awaited:
            self._awaited[place].seen[_version(document)] = key
        else:
            self.on_change(key)


def take_event(store: Store, own: OwnWrites, kind: Kind, document: Document) -> None:
    """Keeps an object of an event, and reports it where it may be news.

    An event that shows what others alone write is theirs, whatever the answer says: an apply that changes nothing is
    answered with the version that somebody else has just made.
    """
    key = key_of(kind, document)
    before = None
    if key is not None and own.is_awaited(kind, document):
        before = store.get(key, kind, document["metadata"]["name"])
    if store.put(kind, document) is None or key is None:
        return
    if before is not None and _of_others(kind, before) != _of_others(kind, document):
        own.on_change(key)
    else:
        own.see(kind, document, key)


def keep_serving(store: Store, own: OwnWrites, answer: Document) -> None:
    """Keeps the answer to a write of a resource; a change of a person that it is the first to show brings a pass.

    Events that come together are passed on as one, the last: the change would stand behind the write for good.
    """
    before = store.serving(Key(answer["metadata"]["namespace"], answer["metadata"]["name"]))
    key = store.put(SERVING, answer)
    if key is not None and before is not None and _of_others(SERVING, before) != _of_others(SERVING, answer):
        own.on_change(key)


def _of_others(kind: Kind, document: Document) -> list[object]:
    """The part of an object that others than the operator write; of a resource the specification by its generation."""
    metadata = document["metadata"]
    if kind != SERVING:
        return [metadata.get("uid"), metadata.get("deletionTimestamp"), document.get("status")]
    return [metadata.get(name) for name in ("uid", "generation", "labels", "annotations", "deletionTimestamp")]


def _place(kind: Kind, document: Document) -> Place:
    metadata = document["metadata"]
    return kind, metadata.get("namespace", ""), metadata["name"]


def _version(document: Document) -> str:
    return str(document["metadata"].get("resourceVersion", ""))

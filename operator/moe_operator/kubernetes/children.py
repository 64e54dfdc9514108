"""Brings a resource's children to what the plan says: applies what differs, deletes what is no longer planned.

A plan is refused as a whole where that is known beforehand: a dry run of the workloads, whose pod templates users write
in part, and of claims, which cannot shrink, precedes every change.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_contract.api_server import BAD_REQUEST, CONFLICT, FORBIDDEN, UNPROCESSABLE, ApiError, Kind

from moe_operator.api.resource import KIND
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.difference import needs_apply, was_applied, with_digest
from moe_operator.kubernetes.kinds import CHILDREN, CLAIM, DEPLOYMENT, LEADER_WORKER_SET, kind_of
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan.names import MANAGED_BY, MANAGER

Document = dict[str, Any]
WORKLOADS = (DEPLOYMENT, LEADER_WORKER_SET)
_TRIED = (*WORKLOADS, CLAIM)
_REFUSALS = {BAD_REQUEST, FORBIDDEN, CONFLICT, UNPROCESSABLE}
# An error of the server by its number, and none that goes away by itself: no address or port is left for a Service.
_EXHAUSTED = "failed to allocate"
_TERSE = 500

log = logging.getLogger("moeserving.operator")


@dataclass(slots=True, kw_only=True)
class Applied:
    """Result of applying a plan.

    Attributes:
        refused: refusals of the API server, one text for each object.
        missing: names of kinds that the plan has and the cluster lacks.
        waiting: an object is being deleted and must be gone first.
    """

    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    waiting: bool = False


class Children:
    """Applies and prunes the objects of a plan.

    Args:
        api: for every change.
        store: the objects as they were last seen; gets the answers to changes.
    """

    def __init__(self, api: Api, store: Store) -> None:
        self._api, self._store = api, store
        # Objects whose text differs from the plan's in form alone, as they were at the dry run that showed it.
        self._in_other_words: dict[str, tuple[Any, ...]] = {}
        # Resources that met an object of somebody else: it is looked for before anything is applied.
        self._careful: set[Key] = set()

    async def apply(self, key: Key, objects: Iterable[Document], kinds: frozenset[Kind], owner: str) -> Applied:
        """Applies the objects that differ, in order; returns the result, without a change when one is refused."""
        result = Applied()
        changed = [
            wanted
            for wanted in self._find_changed(key, objects, kinds, owner, result)
            if not await self._is_in_other_words(key, wanted)
        ]
        if result.waiting:
            return result
        if key in self._careful:
            result.refused += await _together(self._find_foreign(key, wanted) for wanted in changed)
        if not result.refused:
            tried = (wanted for wanted in changed if kind_of(wanted) in _TRIED)
            result.refused += await _together(self._apply(key, wanted) for wanted in tried)
        if not result.refused:
            result.refused += await self._apply_all(key, changed)
        if not result.refused:
            self._careful.discard(key)
        return result

    async def _apply_all(self, key: Key, changed: list[Document]) -> list[str]:
        """Applies the objects; returns the refusals. What the pods of a workload need is there before the workload."""
        made: list[tuple[Kind, Document]] = []
        before = [wanted for wanted in changed if kind_of(wanted) not in WORKLOADS]
        refused = await _together(self._apply(key, wanted, made) for wanted in before)
        if any(_foreign(wanted) in refused for wanted in before):
            # As if the stranger's object had been looked for first; the next passes do.
            self._careful.add(key)
            for kind, live in made:
                await self.delete(kind, live)
            return refused
        workloads = [wanted for wanted in changed if kind_of(wanted) in WORKLOADS]
        return refused + await _together(self._apply(key, wanted, made) for wanted in workloads)

    def _find(self, key: Key, wanted: Document) -> Document | None:
        return self._store.get(key, kind_of(wanted), wanted["metadata"]["name"])

    def _find_changed(
        self, key: Key, objects: Iterable[Document], kinds: frozenset[Kind], owner: str, result: Applied
    ) -> list[Document]:
        changed = []
        for planned in objects:
            wanted, kind = with_digest(planned), kind_of(planned)
            if kind not in kinds:
                result.missing.append(kind.name)
                continue
            live = self._store.get(key, kind, wanted["metadata"]["name"])
            if live is not None and not _is_owned(live, owner) and not _is_child(live):
                result.refused.append(_foreign(wanted))
            elif live is not None and ("deletionTimestamp" in live["metadata"] or not _is_owned(live, owner)):
                # Of a resource of the same name that is gone: its remains go first.
                result.waiting = True
            elif needs_apply(wanted, live):
                changed.append(wanted)
        return changed

    async def _is_in_other_words(self, key: Key, wanted: Document) -> bool:
        """Whether an object that was applied already means the same, though its text differs.

        Users write quantities in any form that the API takes (`1e3`, `.5`); only the API server normalises them.
        """
        kind, metadata = kind_of(wanted), wanted["metadata"]
        live = self._store.get(key, kind, metadata["name"])
        if live is None or not was_applied(wanted, live):
            return False
        uid, mark = live["metadata"]["uid"], (wanted["metadata"]["annotations"], _content(live))
        if self._in_other_words.get(uid) == mark:
            return True
        try:
            answer = await self._api.apply(kind, wanted, dry_run=True)
        except ApiError:
            return False
        if _content(answer) != _content(live):
            return False
        self._in_other_words[uid] = mark
        return True

    async def _is_foreign(self, key: Key, wanted: Document) -> bool:
        """Whether an object of this name exists that the operator does not manage."""
        kind, metadata = kind_of(wanted), wanted["metadata"]
        if self._store.get(key, kind, metadata["name"]) is not None:
            return False
        live = await self._api.get(kind, metadata["namespace"], metadata["name"])
        if live is None:
            return False
        labels = live["metadata"].get("labels", {})
        return bool(labels.get(MANAGED_BY) != MANAGER or not _is_owned(live, metadata["ownerReferences"][0]["uid"]))

    async def _find_foreign(self, key: Key, wanted: Document) -> str:
        return _foreign(wanted) if await self._is_foreign(key, wanted) else ""

    async def _apply(self, key: Key, wanted: Document, made: list[tuple[Kind, Document]] | None = None) -> str:
        """Applies one object, or only tries to without `made`; returns why it was refused, empty when it was not.

        Args:
            key: its resource.
            wanted: the object.
            made: gets the object when it did not exist before.
        """
        kind, is_new = kind_of(wanted), self._find(key, wanted) is None
        try:
            live = await self._api.apply(kind, wanted, dry_run=made is None, create_only=is_new)
        except ApiError as error:
            if not is_new or error.status != CONFLICT:
                return _refusal(wanted, error)
            if await self._is_foreign(key, wanted):
                return _foreign(wanted)
            # It is the resource's own and not in the store yet.
            return await self._apply_again(wanted, dry_run=made is None)
        if made is not None:
            self._store.put(kind, live)
            if is_new:
                made.append((kind, live))
            log.info("applied %s", _title(wanted))
        return ""

    async def _apply_again(self, wanted: Document, *, dry_run: bool) -> str:
        kind = kind_of(wanted)
        try:
            live = await self._api.apply(kind, wanted, dry_run=dry_run)
        except ApiError as error:
            return _refusal(wanted, error)
        if not dry_run:
            self._store.put(kind, live)
            log.info("applied %s", _title(wanted))
        return ""

    async def prune(self, key: Key, objects: Iterable[Document], owner: str) -> bool:
        """Deletes the children that the plan lacks; returns whether there was any."""
        planned = {(kind_of(entry), entry["metadata"]["name"]) for entry in objects}
        found = False
        for kind, live in self._store.children(key, CHILDREN):
            name = live["metadata"]["name"]
            if _is_child(live) and ((kind, name) not in planned or not _is_owned(live, owner)):
                found = True
                if "deletionTimestamp" not in live["metadata"]:
                    await self.delete(kind, live)
        return found

    async def delete(self, kind: Kind, live: Document) -> None:
        """Deletes one object of a resource and forgets it, unless a finalizer delays its end."""
        log.info("deleting %s", _title(live))
        self._in_other_words.pop(live["metadata"].get("uid", ""), None)
        await self._api.delete(kind, live)
        if not live["metadata"].get("finalizers"):
            self._store.remove(kind, live)


async def _together(calls: Iterable[Coroutine[Any, Any, str]]) -> list[str]:
    """The texts that are not empty, in order; returns when all calls have ended, with the first error as its own."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, str) and answer]


def _is_owned(live: Mapping[str, Any], owner: str) -> bool:
    return any(entry.get("uid") == owner for entry in live["metadata"].get("ownerReferences", ()))


def _is_child(live: Mapping[str, Any]) -> bool:
    """Objects that carry our labels and have no MoEServing for an owner were made by people: they stay."""
    return any(entry.get("kind") == KIND for entry in live["metadata"].get("ownerReferences", ()))


def _content(document: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its status and without metadata of the API server and of others."""
    metadata = document["metadata"]
    kept = {name: metadata.get(name) for name in ("labels", "annotations", "ownerReferences", "deletionTimestamp")}
    return {name: value for name, value in document.items() if name != "status"} | {"metadata": kept}


def _foreign(wanted: Document) -> str:
    return f"{_title(wanted)} exists and is not this resource's own"


def _title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['namespace']}/{document['metadata']['name']}"


def _refusal(document: Document, error: ApiError) -> str:
    if error.status not in _REFUSALS and _EXHAUSTED not in error.message:
        raise error
    return f"{_title(document)}: {error.message[:_TERSE]}"

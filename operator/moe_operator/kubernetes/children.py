"""Brings a resource's children to what the plan says: applies what differs, deletes what is no longer planned.

A plan is refused as a whole where that can be told beforehand: the workloads, whose pod templates people write in part,
are tried without effect before anything else is changed.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightkube import ApiError

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.difference import needs_apply, with_digest
from moe_operator.kubernetes.kinds import CHILDREN, DEPLOYMENT, LEADER_WORKER_SET, Kind, kind_of
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan.names import MANAGED_BY, MANAGER

Document = dict[str, Any]
WORKLOADS = (DEPLOYMENT, LEADER_WORKER_SET)
_REFUSALS = {400, 403, 409, 422}
_TERSE = 500

log = logging.getLogger("moeserving.operator")


@dataclass(slots=True, kw_only=True)
class Applied:
    """What came of it.

    Attributes:
        refused: what the API server did not take, in words.
        missing: kinds that the plan has and the cluster lacks.
        waiting: something is on its way out and has to be gone first.
    """

    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    waiting: bool = False


class Children:
    """See the module."""

    def __init__(self, api: Api, store: Store) -> None:
        self._api, self._store = api, store

    async def apply(self, key: Key, objects: Iterable[Document], kinds: frozenset[Kind], owner: str) -> Applied:
        """Applies what differs, in order."""
        result = Applied()
        changed = self._find_changed(key, objects, kinds, owner, result)
        if result.waiting:
            return result
        foreign = [wanted for wanted in changed if await self._is_foreign(key, wanted)]
        result.refused += [f"{_title(wanted)} exists and is not this resource's own" for wanted in foreign]
        if not result.refused:
            result.refused += await self._try(changed)
        if result.refused:
            return result
        for wanted in changed:
            await self._apply(wanted, result)
        return result

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
            if live is not None and ("deletionTimestamp" in live["metadata"] or not _is_owned(live, owner)):
                # Of a resource of the same name that is gone: its remains go first.
                result.waiting = True
            elif needs_apply(wanted, live):
                changed.append(wanted)
        return changed

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

    async def _try(self, changed: Iterable[Document]) -> list[str]:
        refused = []
        for wanted in changed:
            kind = kind_of(wanted)
            if kind in WORKLOADS:
                try:
                    await self._api.apply(kind, wanted, dry_run=True)
                except ApiError as error:
                    refused.append(_refusal(wanted, error))
        return refused

    async def _apply(self, wanted: Document, result: Applied) -> None:
        kind = kind_of(wanted)
        try:
            self._store.put(kind, await self._api.apply(kind, wanted))
        except ApiError as error:
            result.refused.append(_refusal(wanted, error))
        else:
            log.info("applied %s", _title(wanted))

    async def prune(self, key: Key, objects: Iterable[Document], owner: str) -> bool:
        """Deletes children that no plan has; whether any was there."""
        planned = {(kind_of(entry), entry["metadata"]["name"]) for entry in objects}
        found = False
        for kind, live in self._store.children(key, CHILDREN):
            name = live["metadata"]["name"]
            if (kind, name) not in planned or not _is_owned(live, owner):
                found = True
                if "deletionTimestamp" not in live["metadata"] and _has_controller(live):
                    await self.delete(kind, live)
        return found

    async def delete(self, kind: Kind, live: Document) -> None:
        """Deletes one."""
        log.info("deleting %s", _title(live))
        await self._api.delete(kind, live)
        if not live["metadata"].get("finalizers"):
            self._store.remove(kind, live)


def _is_owned(live: Mapping[str, Any], owner: str) -> bool:
    return any(entry.get("uid") == owner for entry in live["metadata"].get("ownerReferences", ()))


def _has_controller(live: Mapping[str, Any]) -> bool:
    """Objects that carry our labels and nobody's ownership were made by people: they stay."""
    return bool(live["metadata"].get("ownerReferences"))


def _title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['namespace']}/{document['metadata']['name']}"


def _refusal(document: Document, error: ApiError) -> str:
    if error.status.code not in _REFUSALS:
        raise error
    return f"{_title(document)}: {str(error.status.message)[:_TERSE]}"

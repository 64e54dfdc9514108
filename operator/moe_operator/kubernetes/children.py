"""Brings a resource's children to what the plan says: applies what differs, deletes what is no longer planned.

A change of the pods is refused as a whole where that is known beforehand: a dry run of the workloads, whose pod
templates users write in part, and of claims, which cannot shrink, precedes every change. What is refused keeps back
only what belongs to it: claims, the settings with the revision, and workloads that would start other pods. The first
workloads of a resource are not tried where no user wrote a part of them: nothing runs yet that could be changed by
half, and trying is a tenth of what it takes to make a resource.

Claims hold what was downloaded, and outlive the plan: one that is no longer planned is let go of, not deleted.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, TypeVar

import orjson
from moe_contract.api_server import CONFLICT, NOT_FOUND, ApiError, Kind

from moe_operator.api.model import WhenDeleted
from moe_operator.api.resource import KIND
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.difference import is_covered, needs_apply, was_applied, with_digest
from moe_operator.kubernetes.failure import AWAY, in_one_line
from moe_operator.kubernetes.kinds import CHILDREN, CLAIM, CONFIG_MAP, DEPLOYMENT, LEADER_WORKER_SET, kind_of
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.waits import wait_for_object
from moe_operator.plan.names import INSTANCE, KEPT, MANAGED_BY, MANAGER, OWNER, Names
from moe_operator.plan.owners import is_child, is_owned, names_owner
from moe_operator.plan.references import find_references

Document = dict[str, Any]
Answer = TypeVar("Answer")
WORKLOADS = (DEPLOYMENT, LEADER_WORKER_SET)
_TRIED = (*WORKLOADS, CLAIM)
# What belongs to a revision of the pods, and is applied with it or not at all.
_OF_A_REVISION = (*_TRIED, CONFIG_MAP)
# An error of the server by its number: a webhook that must be asked does not answer (k8s.io/apiserver v0.34).
_WEBHOOK_AWAY = "failed calling webhook"

_ENDING = "is being deleted, which waits for the pods that use it; delete these and it is made anew"

log = logging.getLogger("moeserving.operator")


@dataclass(slots=True, kw_only=True)
class Applied:
    """Result of applying a plan.

    Attributes:
        refused: refusals of the API server, one text for each object.
        missing: names of kinds that the plan has and the cluster lacks.
        foreign: one of the refusals is an object of somebody else with the name of a child.
        waiting: an object is being deleted and must be gone first.
        ending: objects whose deletion something holds; each is made anew once it is gone.
    """

    refused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    foreign: bool = False
    waiting: bool = False
    ending: list[Document] = field(default_factory=list)

    def overdue(self) -> list[str]:
        """Objects whose deletion is held for longer than it should be, in words."""
        now = datetime.now(UTC)
        return [f"{_title(live)} {_held(live)}" for live in self.ending if wait_for_object(live, now).is_over(now)]

    def note_foreign(self, wanted: Document) -> str:
        """Notes that an object of somebody else has this name; returns the refusal to touch it."""
        advice = "; to use it, set spec.model.cache.claim" if wanted["kind"] == CLAIM.name else ""
        self.foreign = True
        return f"{_title(wanted)} exists and is not this resource's own{advice}"


class Children:
    """Applies and prunes the objects of a plan.

    Args:
        api: for every change.
        store: the objects as they were last seen; gets the answers to changes.
        say_kept: called with the name of a claim that outlives its plan.
    """

    def __init__(self, api: Api, store: Store, say_kept: Callable[[Key, str], Awaitable[None]]) -> None:
        self._api, self._store, self._say_kept = api, store, say_kept
        # Objects whose text differs from the plan's in form alone: a digest of both at the dry run that showed it.
        self._in_other_words: dict[str, bytes] = {}
        # Resources that met an object of somebody else: it is looked for before anything is applied.
        self._careful: set[Key] = set()
        # What was made since the last pass that came to its end: it goes when an object of somebody else is met.
        self._made: dict[Key, list[tuple[Kind, Document]]] = {}

    async def apply(
        self, key: Key, objects: Iterable[Document], kinds: frozenset[Kind], owner: str, *, has_templates: bool = True
    ) -> Applied:
        """Applies the objects that differ, in order, but for those that are refused or belong to what is.

        Args:
            key: the resource.
            objects: its plan.
            kinds: those that the cluster has.
            owner: uid of the resource.
            has_templates: users have written a part of the pods.
        """
        result = Applied()
        changed = [
            wanted
            for wanted in self._find_changed(key, objects, kinds, owner, result)
            if not await self._is_in_other_words(key, wanted)
        ]
        if result.waiting:
            return result
        result.waiting = bool(result.ending)
        unread = await self._look_for_strangers(key, changed, result) if key in self._careful else []
        if result.foreign:
            await self._undo(key)
            return result
        tried = _TRIED if has_templates or any(self._store.children(key, WORKLOADS)) else (CLAIM,)
        doubtful = [wanted for wanted in changed if kind_of(wanted) in tried and wanted not in unread]
        refused = await self._try(key, doubtful, result)
        result.refused += [text for _, text in refused]
        if result.foreign:
            self._careful.add(key)
            await self._undo(key)
            return result
        held = [wanted for wanted, text in refused if _is_unjudged(wanted, text)]
        judged = [wanted for wanted, text in refused if not _is_unjudged(wanted, text)]
        held += self._find_held(key, changed, unread + judged)
        await self._apply_all(key, [wanted for wanted in changed if wanted not in held], result)
        if not result.refused:
            self._careful.discard(key)
        return result

    async def _apply_all(self, key: Key, objects: list[Document], result: Applied) -> None:
        """Applies the objects; those that the pods of a workload need are there before the workload."""
        made = self._made.setdefault(key, [])
        for are_workloads in (False, True):
            part = [wanted for wanted in objects if (kind_of(wanted) in WORKLOADS) is are_workloads]
            try:
                refusals = await _together(self._apply(key, wanted, result, made) for wanted in part)
            finally:
                # Also where another object's error ends the pass.
                if result.foreign:
                    # As if the stranger's object had been looked for first; the next passes do.
                    self._careful.add(key)
                    await self._undo(key)
            result.refused += filter(None, refusals)
            if result.foreign:
                return
        del self._made[key]

    async def _undo(self, key: Key) -> None:
        """Deletes what was made in part; what an error leaves goes in the next pass."""
        made = self._made.get(key, [])
        while made:
            kind, live = made[-1]
            metadata = live["metadata"]
            now = self._store.get(key, kind, metadata["name"])
            # Not what somebody else has put in its place since.
            if now is not None and now["metadata"]["uid"] == metadata["uid"]:
                await self.delete(kind, live)
            made.pop()

    async def _look_for_strangers(self, key: Key, changed: list[Document], result: Applied) -> list[Document]:
        """Returns the objects of which nobody can say whether they are free; adds the refusals."""
        new = [wanted for wanted in changed if self._is_new(key, wanted)]
        obstacles = await _together(self._find_obstacle(key, wanted, result) for wanted in new)
        result.refused += filter(None, obstacles)
        return [wanted for wanted, text in zip(new, obstacles, strict=True) if text]

    def _is_new(self, key: Key, wanted: Document) -> bool:
        return self._store.get(key, kind_of(wanted), wanted["metadata"]["name"]) is None

    def _find_held(self, key: Key, changed: list[Document], refused: list[Document]) -> list[Document]:
        """What is not applied: the refused, and with a change of pods or claims all that belongs to it."""
        of_revision = [wanted for wanted in changed if kind_of(wanted) in _OF_A_REVISION]
        changing = [wanted for wanted in of_revision if not self._is_scaling(key, wanted)]
        return refused + (changing if any(wanted in changing for wanted in refused) else [])

    def _is_scaling(self, key: Key, wanted: Document) -> bool:
        """Whether a workload differs from what runs in its number alone, so that no pod would be another."""
        live = self._store.get(key, kind_of(wanted), wanted["metadata"]["name"])
        if live is None or kind_of(wanted) not in WORKLOADS:
            return False
        spec = {name: value for name, value in wanted["spec"].items() if name != "replicas"}
        return is_covered(spec, live.get("spec", {}))

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
            is_kept = live is not None and _is_kept(live)
            is_ending = live is not None and "deletionTimestamp" in live["metadata"]
            if live is not None and not is_kept and not is_owned(live, owner) and not is_child(live):
                result.refused.append(result.note_foreign(wanted))
            elif is_ending and kind == CLAIM:
                result.refused.append(f"{_title(wanted)} {_ENDING}")
            elif live is not None and is_ending and is_owned(live, owner):
                result.ending.append(live)
            elif live is not None and (is_ending or not (is_kept or is_owned(live, owner))):
                # Of a resource of the same name that is gone: its remains go first.
                result.waiting = True
                result.ending += [live] if is_ending else []
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
        uid, mark = live["metadata"]["uid"], _digest(wanted["metadata"]["annotations"], _content(live))
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

    async def _find_obstacle(self, key: Key, wanted: Document, result: Applied) -> str:
        """Returns why an object of this name that may exist must not be applied; empty where it may."""
        kind, metadata = kind_of(wanted), wanted["metadata"]
        try:
            live = await self._api.get(kind, metadata["namespace"], metadata["name"])
        except ApiError as error:
            return _refusal(wanted, error)
        if live is None:
            return ""
        labels = live["metadata"].get("labels", {})
        owner = metadata.get("annotations", {}).get(OWNER)
        is_ours = labels.get(MANAGED_BY) == MANAGER and labels.get(INSTANCE) == key.name
        if owner is not None and names_owner(live, owner):
            # Somebody took its labels away, or it is not in the store yet.
            return ""
        if is_ours and (_is_kept(live) or (owner is not None and is_owned(live, owner))):
            return ""
        return result.note_foreign(wanted)

    async def _try(self, key: Key, doubtful: list[Document], result: Applied) -> list[tuple[Document, str]]:
        """The objects that a dry run refuses, each with the reason."""
        refusals = await _together(self._apply(key, wanted, result) for wanted in doubtful)
        return [(wanted, text) for wanted, text in zip(doubtful, refusals, strict=True) if text]

    async def _apply(
        self, key: Key, wanted: Document, result: Applied, made: list[tuple[Kind, Document]] | None = None
    ) -> str:
        """Applies one object, or only tries to without `made`; returns why it was refused, empty when it was not.

        Args:
            key: its resource.
            wanted: the object.
            result: of the whole; learns of an object of somebody else.
            made: gets the object when it did not exist before.
        """
        kind, is_new = kind_of(wanted), self._is_new(key, wanted)
        try:
            live = await self._api.apply(kind, wanted, dry_run=made is None, create_only=is_new)
        except ApiError as error:
            if not is_new or error.status != CONFLICT:
                return _refusal(wanted, error)
            obstacle = await self._find_obstacle(key, wanted, result)
            # Else it is the resource's own and not in the store yet.
            return obstacle or await self._apply_again(wanted, dry_run=made is None)
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
        """Deletes the children that the plan lacks and does not refer to; returns whether there was any.

        Of a claim it lets go instead.
        """
        objects = [*objects]
        planned = {(kind_of(entry).name, entry["metadata"]["name"]) for entry in objects}
        needed = planned | find_references(objects)
        found, errors = False, []
        for kind, live in self._store.children(key, CHILDREN):
            place = kind.name, live["metadata"]["name"]
            is_old = not is_owned(live, owner)
            if place in planned and not (is_old and is_child(live)):
                continue
            try:
                if kind == CLAIM:
                    await self.release_claim(key, live)
                elif is_child(live) and (is_old or place not in needed):
                    found = True
                    if "deletionTimestamp" not in live["metadata"]:
                        await self.delete(kind, live)
            except ApiError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return found

    async def release_claims(self, key: Key) -> None:
        """Takes the claims of a resource that ends out of its ownership, unless it says that they end with it."""
        document = self._store.serving(key) or {}
        cache = document.get("spec", {}).get("model", {}).get("cache") or {}
        if cache.get("whenDeleted") != WhenDeleted.DELETE:
            for _, live in self._store.children(key, (CLAIM,)):
                await self.release_claim(key, live)

    async def release_claim(self, key: Key, live: Document) -> None:
        """Takes a claim out of the ownership of its resource and says so, once."""
        metadata = live["metadata"]
        is_announced = KEPT in metadata.get("annotations", {}) or metadata["name"] != Names(key.name).cache
        if (is_announced and not is_child(live)) or "deletionTimestamp" in metadata:
            return
        owners = [row for row in metadata.get("ownerReferences", ()) if row.get("kind") not in (KIND, "Namespace")]
        patch = {"metadata": {"ownerReferences": owners, "annotations": {KEPT: "true", OWNER: None}}}
        try:
            self._store.put(CLAIM, await self._api.merge(CLAIM, key.namespace, metadata["name"], patch))
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise
            self._store.remove(CLAIM, live)
        else:
            log.info("keeping %s", _title(live))
            await self._say_kept(key, metadata["name"])

    async def delete(self, kind: Kind, live: Document) -> None:
        """Deletes one object of a resource and forgets it, unless a finalizer delays its end."""
        log.info("deleting %s", _title(live))
        self._in_other_words.pop(live["metadata"].get("uid", ""), None)
        await self._api.delete(kind, live)
        if not live["metadata"].get("finalizers"):
            self._store.remove(kind, live)


async def _together(calls: Iterable[Awaitable[Answer]]) -> list[Answer]:
    """The answers in order; returns when all calls have ended, with the first error as its own."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    answers = []
    for answer in done:
        if isinstance(answer, BaseException):
            raise answer
        answers.append(answer)
    return answers


def _is_kept(live: Mapping[str, Any]) -> bool:
    """Whether it is a claim that the operator made and no resource owns: it waits for one of its name."""
    labels = live["metadata"].get("labels", {})
    return live.get("kind") == CLAIM.name and labels.get(MANAGED_BY) == MANAGER and not is_child(live)


def _content(document: Mapping[str, Any]) -> dict[str, Any]:
    """An object without its status and without metadata of the API server and of others."""
    metadata = document["metadata"]
    kept = {name: metadata.get(name) for name in ("labels", "annotations", "ownerReferences", "deletionTimestamp")}
    return {name: value for name, value in document.items() if name != "status"} | {"metadata": kept}


def _digest(*parts: Document) -> bytes:
    return sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).digest()


def _held(live: Document) -> str:
    by = ", ".join(live["metadata"].get("finalizers") or ()) or "its controller"
    return f"is being deleted, which {by} holds; once it is gone it is made anew"


def _title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['namespace']}/{document['metadata']['name']}"


def _is_unjudged(wanted: Document, text: str) -> bool:
    """Whether a LeaderWorkerSet is refused because its controller is away: that keeps back this object alone."""
    return kind_of(wanted) == LEADER_WORKER_SET and _WEBHOOK_AWAY in text


def _refusal(document: Document, error: ApiError) -> str:
    """The API server's words about an object; raises the error again when the API server is away."""
    if error.status in AWAY:
        raise error
    return f"{_title(document)}: {in_one_line(error.message)}"

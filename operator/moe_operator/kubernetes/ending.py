"""The end of a resource: gateways, then engines, then all else, whatever the propagation policy of its deletion.

Called by the reconciler for each resource that is marked for deletion, and for children whose resource is gone. What is
waited for, and until when, stands in the resource's conditions; nothing is waited for without a bound.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moe_contract.api_server import CONFLICT, FORBIDDEN, NOT_FOUND, ApiError, Kind

from moe_operator.api.reasons import Reason
from moe_operator.api.status import ConditionStatus
from moe_operator.experts.report import Verdict
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.children import WORKLOADS, Children
from moe_operator.kubernetes.conditions import DEGRADED, PROGRESSING, READY
from moe_operator.kubernetes.kinds import CHILDREN, POD, SERVING
from moe_operator.kubernetes.namespaces import Namespaces
from moe_operator.kubernetes.notices import Notices, own_part
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.waits import Wait, render_overdue, render_waits, split_waits, wait_for_object, wait_for_pod
from moe_operator.plan.names import COMPONENT, GROUP, OWNER, is_replica
from moe_operator.plan.owners import is_child, is_orphaned, owner_of

Document = dict[str, Any]
FINALIZER = f"{GROUP}/drain"
SOON_S, SHORTLY_S = 2.0, 0.2
# What was refused may be taken later without a change of ours: a quota is raised, a stranger's object goes.
REFUSED_S = 30.0
_PARTS = ("gateway", "engine")

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndingProgress:
    """Where an end stands.

    Attributes:
        waits: what has to go before the next part; empty when nothing is left to wait for.
        overdue: what should have gone and was not waited for any longer.
        part: what is being ended, in words.
        again_s: time after which to look again.
    """

    waits: tuple[Wait, ...] = ()
    overdue: tuple[Wait, ...] = ()
    part: str = ""
    again_s: float = SOON_S


class Ending:
    """Ends one resource after the other.

    Args:
        api: for every change.
        store: the cluster as it was last seen.
        children: deletes objects.
        namespaces: tells which are being deleted themselves.
        notices: writes conditions.
        blind_spot: why a namespace's objects are not known; empty where they are.
        clock: the time now.
    """

    def __init__(
        self,
        api: Api,
        store: Store,
        children: Children,
        namespaces: Namespaces,
        notices: Notices,
        blind_spot: Callable[[str], str],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._api, self._store, self._children = api, store, children
        self._namespaces, self._notices = namespaces, notices
        self._blind_spot, self._clock = blind_spot, clock
        # When something that no deletion time tells of was first waited for: by resource and part.
        self._since: dict[tuple[Key, str], datetime] = {}

    async def run(self, key: Key, document: Document) -> float | None:
        """One pass over a resource that is marked for deletion; the time after which the next is wanted."""
        if FINALIZER not in document["metadata"].get("finalizers", []):
            return None
        if await self._namespaces.fetch_is_ending(key.namespace):
            # The namespace controller deletes everything at once, the operator's own rights too.
            log.info("%s: its namespace is being deleted; nothing is drained", key)
            await self._release(key, document)
            return None
        if not (problem := self._blind_spot(key.namespace)):
            try:
                return await self._run(key, document)
            except ApiError as error:
                if error.status != FORBIDDEN:
                    raise
                problem = error.message
        await self._report(document, EndingProgress(), problem=problem)
        return REFUSED_S

    async def _run(self, key: Key, document: Document) -> float | None:
        if is_orphaned(document, self._list_children(key)):
            await self._leave_children(key)
            await self._release(key, document)
            return None
        progress = await self._end_parts(key)
        if progress.waits or progress.overdue:
            await self._report(document, progress)
        if progress.waits:
            return progress.again_s
        await self._release(key, document)
        return None

    async def sweep(self, key: Key) -> float | None:
        """One pass over children whose resource is gone without its finalizer, as after a forced removal of that."""
        left = (child for child in self._list_children(key) if "deletionTimestamp" not in child["metadata"])
        if not any(owner_of(child) for child in left):
            return None
        if problem := self._blind_spot(key.namespace):
            # A namespace that went, or whose rights did: all of it is looked at anew once it can be read.
            log.info("%s is gone; what it left cannot be read: %s", key, problem)
            return None
        try:
            return await self._sweep(key)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            # The rights went, and a watch that is open does not notice: the next list will.
            log.info("%s is gone; what it left cannot be ended: %s", key, error.message)
            return None

    async def _sweep(self, key: Key) -> float | None:
        if await self._namespaces.fetch_is_ending(key.namespace):
            return None
        if any(row["metadata"]["name"] == key.name for row in await self._list_servings(key.namespace)):
            return SOON_S
        log.warning("%s is gone and has left objects behind; they are ended now", key)
        progress = await self._end_parts(key)
        if progress.waits:
            return progress.again_s
        self.forget(key)
        return None

    def forget(self, key: Key) -> None:
        """Drops since when anything of a resource was waited for."""
        self._since = {place: since for place, since in self._since.items() if place[0] != key}

    async def _list_servings(self, namespace: str) -> list[Document]:
        """The resources of a namespace; a list, since its refusal differs from "no such object" without the CRD."""
        listing = await self._api.list(SERVING, namespace)
        assert listing is not None, "its own kind is not optional"
        return listing.items

    async def _end_parts(self, key: Key) -> EndingProgress:
        """Ends one part after the other; stops at the first that is waited for."""
        overdue: list[Wait] = []
        for part in _PARTS:
            await self._delete_workloads(key, part)
            pods = [pod for pod in self._store.of(key, POD) if _component(pod) == part]
            leaders = [pod for pod in pods if is_replica(pod["metadata"].get("labels", {}))]
            # Workers of a group are marked only when their leader is gone: their time begins then.
            since = self._first_seen(key, part if leaders else f"{part} workers") if pods else self._clock()
            waits, late = split_waits((wait_for_pod(pod, since) for pod in leaders or pods), self._clock())
            overdue += late
            if waits:
                return EndingProgress(waits=tuple(waits), overdue=tuple(overdue), part=f"{part}s")
        return await self._end_rest(key, overdue)

    async def _delete_workloads(self, key: Key, part: str) -> None:
        for kind, live in self._store.children(key, WORKLOADS):
            if _component(live) == part and is_child(live) and "deletionTimestamp" not in live["metadata"]:
                await self._children.delete(kind, live)

    async def _end_rest(self, key: Key, overdue: Iterable[Wait]) -> EndingProgress:
        await self._children.release_claims(key)
        found = False
        for kind, live in self._children_of(key):
            if "deletionTimestamp" not in live["metadata"]:
                found = True
                await self._children.delete(kind, live)
        since = self._first_seen(key, "rest")
        left = (wait_for_object(live, since) for _, live in self._children_of(key))
        waits, late = split_waits(left, self._clock())
        return EndingProgress(
            waits=tuple(waits),
            overdue=(*overdue, *late),
            part="the other objects",
            again_s=SHORTLY_S if found else SOON_S,
        )

    async def _leave_children(self, key: Key) -> None:
        """Marks the children so that a later resource of this name adopts them, and none is swept away."""
        for kind, live in self._children_of(key):
            if owner_of(live) != "":
                patch = {"metadata": {"annotations": {OWNER: ""}}}
                made = await self._api.merge(kind, key.namespace, live["metadata"]["name"], patch)
                self._store.put(kind, made)
        log.info("%s: deleted with its children left as they are", key)

    async def _release(self, key: Key, document: Document) -> None:
        """Removes the finalizer, so that the resource goes."""
        try:
            made = await self._api.apply(SERVING, own_part(document, []))
            left = made["metadata"].get("finalizers") or []
            if FINALIZER in left:
                # Another manager wrote it, as a restored backup does: an apply takes away only its own part.
                rest = [name for name in left if name != FINALIZER]
                patch = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"], "finalizers": rest}}
                await self._api.merge(SERVING, key.namespace, key.name, patch)
        except ApiError as error:
            # Gone already: its uid is no longer there.
            if error.status not in (NOT_FOUND, CONFLICT):
                raise
        self._store.remove(SERVING, document)
        self.forget(key)

    def _first_seen(self, key: Key, part: str) -> datetime:
        return self._since.setdefault((key, part), self._clock())

    def _children_of(self, key: Key) -> list[tuple[Kind, Document]]:
        return [(kind, live) for kind, live in self._store.children(key, CHILDREN) if is_child(live)]

    def _list_children(self, key: Key) -> list[Document]:
        return [live for _, live in self._children_of(key)]

    async def _report(self, document: Document, progress: EndingProgress, *, problem: str = "") -> None:
        await self._notices.write(document, judge_progress(progress, problem), self._clock())


def judge_progress(progress: EndingProgress, problem: str) -> dict[str, Verdict]:
    """The conditions of a resource that ends; those that tell of other things are not among them.

    Args:
        progress: where the end stands.
        problem: why it cannot go on; empty when it can.
    """
    waiting = f"ends {progress.part}; waits for {render_waits(progress.waits)}" if progress.waits else "all was ended"
    return {
        READY: (ConditionStatus.FALSE, Reason.DELETING, "the resource is being deleted"),
        PROGRESSING: (ConditionStatus.TRUE, Reason.DELETING, problem or waiting),
        DEGRADED: _judge_end(progress, problem),
    }


def _judge_end(progress: EndingProgress, problem: str) -> Verdict:
    if problem:
        return ConditionStatus.TRUE, Reason.NOT_PERMITTED, f"cannot end it: {problem}"
    if progress.overdue:
        message = f"should have ended and did not (is its node lost?): {render_overdue(progress.overdue)}"
        return ConditionStatus.TRUE, Reason.NOT_ENDING, f"{message}; the deletion goes on without"
    return ConditionStatus.FALSE, Reason.AS_EXPECTED, ""


def _component(live: Document) -> str:
    return str(live["metadata"].get("labels", {}).get(COMPONENT, ""))

"""Events of a resource: one for each change of a condition; a change that comes again raises the count of its event.

Owned by the reconciler. Names follow from resource, condition, status and reason, so an operator that takes over goes
on counting.
"""

import logging
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from moe_contract.api_server import CONFLICT, ApiError

from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.api.status import Condition
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.conditions import is_bad
from moe_operator.kubernetes.kinds import EVENT

Document = dict[str, Any]
COMPONENT = "moeserving-operator"
_LONGEST_MESSAGE = 1000
_LONGEST_NAME = 200

log = logging.getLogger("moeserving.operator")


class EventRecorder:
    """Writes events; one that cannot be written is logged, and the pass goes on."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def record(self, document: Document, condition: Condition) -> None:
        """Records the change of a condition of a resource."""
        await self._write(document, build_event(document, condition, datetime.now(UTC)))

    async def note(self, document: Document, reason: str, message: str) -> None:
        """Records something about a resource that no condition says."""
        await self._write(document, build_note(document, reason, message, datetime.now(UTC)))

    async def _write(self, document: Document, event: Document) -> None:
        try:
            try:
                await self._api.create(EVENT, event)
            except ApiError as error:
                if error.status != CONFLICT:
                    raise
                await self._repeat(event)
        except ApiError as error:
            log.warning("event %s of %s: %s", event["reason"], document["metadata"]["name"], error)

    async def _repeat(self, event: Document) -> None:
        metadata = event["metadata"]
        before = await self._api.get(EVENT, metadata["namespace"], metadata["name"])
        count = int((before or {}).get("count") or 0) + 1
        changed = {name: event[name] for name in ("message", "type", "lastTimestamp")}
        await self._api.merge(EVENT, metadata["namespace"], metadata["name"], changed | {"count": count})


def build_event(document: Document, condition: Condition, now: datetime) -> Document:
    """The event of a change. Pure."""
    message = condition.message or f"{condition.status.value} ({condition.reason})"
    parts = (condition.type, condition.status.value, condition.reason)
    kind = "Warning" if is_bad(condition) else "Normal"
    return _build(document, parts, condition.reason, f"{condition.type}: {message}", kind, now)


def build_note(document: Document, reason: str, message: str, now: datetime) -> Document:
    """The event of something that no condition says. Pure."""
    return _build(document, (reason, message), reason, message, "Normal", now)


def _build(document: Document, parts: tuple[str, ...], reason: str, message: str, kind: str, now: datetime) -> Document:
    """An event whose name follows from the resource and `parts`."""
    metadata, at = document["metadata"], now.isoformat(timespec="seconds").replace("+00:00", "Z")
    digest = sha256("/".join((metadata["uid"], *parts)).encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name'][:_LONGEST_NAME]}.{digest}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": message[:_LONGEST_MESSAGE],
        "type": kind,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }

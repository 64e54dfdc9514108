"""Writes conditions alone, where a pass has no whole status to report: at the end of a resource, and without rights."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

from moe_operator.api.resource import API_VERSION, KIND
from moe_operator.api.status import Condition
from moe_operator.experts.report import Verdict
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.conditions import build_condition, changed_conditions, read_conditions, summarise
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.own_writes import keep_serving
from moe_operator.kubernetes.store import Store

Document = dict[str, Any]


class Notices:
    """Writes some conditions of a resource; all else of its status stays as it was last.

    Args:
        api: for every change.
        store: gets the resource as it was written.
        announce: posts the event of a changed condition.
    """

    def __init__(self, api: Api, store: Store, announce: Callable[[Document, Condition], Awaitable[None]]) -> None:
        self._api, self._store, self._announce = api, store, announce

    async def write(self, document: Document, verdicts: Mapping[str, Verdict], now: datetime) -> None:
        """Writes the conditions unless they stand there already.

        Raises:
            ApiError: the call failed.
        """
        before = read_conditions(document)
        conditions = with_verdicts(before, verdicts, now, document["metadata"].get("generation"))
        rows = [row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in conditions]
        status = document.get("status", {})
        if rows == status.get("conditions"):
            return
        header = own_part(document, None)
        header["metadata"].pop("uid")
        wanted = {**header, "status": status | {"summary": summarise(conditions), "conditions": rows}}
        keep_serving(self._store, self._api.own, await self._api.apply(SERVING, wanted, subresource="status"))
        for condition in changed_conditions(before, conditions):
            await self._announce(document, condition)


def with_verdicts(
    before: Mapping[str, Condition], verdicts: Mapping[str, Verdict], now: datetime, generation: int | None = None
) -> tuple[Condition, ...]:
    """The conditions with some of them judged anew; one whose status did not change keeps its time."""
    current = dict(before)
    for kind, verdict in verdicts.items():
        current[kind] = build_condition(kind, verdict, before.get(kind), now, generation)
    return tuple(current.values())


def own_part(document: Document, finalizers: list[str] | None) -> Document:
    """The resource as the operator applies it: what stands in it is the operator's."""
    metadata = document["metadata"]
    # The uid keeps an apply from making anew what was deleted meanwhile.
    own = {name: metadata[name] for name in ("name", "namespace", "uid")}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": own | ({} if finalizers is None else {"finalizers": finalizers}),
    }

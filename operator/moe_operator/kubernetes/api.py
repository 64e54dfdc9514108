"""The Kubernetes API as the operator uses it: plain documents, server-side apply by one manager, calls counted."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.types import PatchType

from moe_operator.kubernetes.kinds import LEASE, SERVING, Kind
from moe_operator.plan.names import MANAGED_BY, MANAGER

Document = dict[str, Any]
ALL = "*"
NOT_FOUND, GONE = 404, 410


class NotLeading(Exception):
    """A change by an operator that may no longer make any."""


class Api:
    """See the module; `calls` counts by verb and kind, `may_write` is asked before each change but of a Lease."""

    def __init__(self, client: AsyncClient, may_write: Callable[[], bool] = lambda: True) -> None:
        # Its overloads do not know resources that are made at run time.
        self._client: Any = client
        self.calls: Counter[tuple[str, str]] = Counter()
        self.may_write = may_write

    def _count_change(self, verb: str, kind: Kind) -> None:
        if kind != LEASE and not self.may_write():
            raise NotLeading(f"{verb} {kind.name}: this operator does not lead")
        self.calls[verb, kind.name] += 1

    async def apply(
        self, kind: Kind, document: Document, *, subresource: str | None = None, dry_run: bool = False
    ) -> Document:
        """Server-side apply; what is ours is taken back from others. A dry run is checked and changes nothing."""
        metadata = document["metadata"]
        resource = kind.status if subresource == "status" else kind.resource
        self._count_change("dry run" if dry_run else "apply", kind)
        answer = await self._client.patch(
            resource,
            metadata["name"],
            document,
            namespace=metadata["namespace"],
            patch_type=PatchType.APPLY,
            field_manager=MANAGER,
            force=True,
            dry_run=dry_run,
        )
        return to_document(kind, answer)

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Document) -> Document:
        """Merge patch."""
        self._count_change("patch", kind)
        answer = await self._client.patch(
            kind.resource, name, patch, namespace=namespace, patch_type=PatchType.MERGE, field_manager=MANAGER
        )
        return to_document(kind, answer)

    async def create(self, kind: Kind, document: Document) -> Document:
        """A new object."""
        self._count_change("create", kind)
        entry = kind.resource(document)
        answer = await self._client.create(entry, namespace=document["metadata"]["namespace"])
        return to_document(kind, answer)

    async def replace(self, kind: Kind, document: Document) -> Document:
        """The whole object, refused when the version in it is not the newest."""
        self._count_change("update", kind)
        entry = kind.resource(document)
        answer = await self._client.replace(entry, namespace=document["metadata"]["namespace"])
        return to_document(kind, answer)

    async def delete(self, kind: Kind, document: Document) -> None:
        """Deletes an object and, in the background, what it owns; it may be gone already."""
        metadata = document["metadata"]
        self._count_change("delete", kind)
        try:
            await self._client.delete(kind.resource, metadata["name"], namespace=metadata["namespace"])
        except ApiError as error:
            if error.status.code != NOT_FOUND:
                raise

    async def get(self, kind: Kind, namespace: str, name: str) -> Document | None:
        """One object, None when there is none."""
        self.calls["get", kind.name] += 1
        try:
            return to_document(kind, await self._client.get(kind.resource, name, namespace=namespace))
        except ApiError as error:
            if error.status.code == NOT_FOUND:
                return None
            raise

    async def list(self, kind: Kind, namespaces: Iterable[str]) -> list[Document] | None:
        """All that the operator may have to do with, in these namespaces; None when the cluster lacks the kind."""
        labels: Any = None if kind == SERVING else {MANAGED_BY: MANAGER}
        found = []
        for namespace in namespaces:
            self.calls["list", kind.name] += 1
            try:
                rows = self._client.list(kind.resource, namespace=namespace, labels=labels, chunk_size=500)
                found += [to_document(kind, row) async for row in rows]
            except httpx2.HTTPStatusError as error:
                # Of a group that the cluster lacks the answer is no Status, so no ApiError either.
                if error.response.status_code == NOT_FOUND and kind.optional:
                    return None
                raise
        return found

    async def close(self) -> None:
        """Ends its connections."""
        await self._client.close()


def to_document(kind: Kind, answer: Any) -> Document:
    """A plain document, whose kind stands in it also where a list leaves it out."""
    document: Document = answer.to_dict()
    return {**document, "apiVersion": kind.api_version, "kind": kind.name}

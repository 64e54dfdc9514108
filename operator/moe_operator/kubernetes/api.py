"""Calls of the operator to the API server: one field manager, calls counted, no change without the lead."""

from collections import Counter
from collections.abc import Callable, Sequence

from moe_contract.api_server import NOT_FOUND, ApiError, ApiServer, Document, Kind, Listing

from moe_operator.kubernetes.kinds import LEASE, SERVING
from moe_operator.kubernetes.own_writes import OwnWrites
from moe_operator.plan.names import MANAGED_BY, MANAGER

# etcd has this revision before it holds anything, so no object ever has it: an apply that names it can only create.
NO_VERSION = "1"
SELECTOR = f"{MANAGED_BY}={MANAGER}"


class NotLeading(Exception):
    """A change was refused here because this operator does not hold the Lease."""


class Api:
    """The API server for the reconciler and the election.

    Args:
        server: the connection.
        may_write: asked before each change of anything but a Lease.

    Attributes:
        calls: number of calls by verb and kind.
        own: the applies that have no answer yet.
    """

    def __init__(self, server: ApiServer, may_write: Callable[[], bool] = lambda: True) -> None:
        self.server = server
        self.calls: Counter[tuple[str, str]] = Counter()
        self.may_write, self.own = may_write, OwnWrites()

    def check_lead(self, what: str) -> None:
        """Raises `NotLeading` where this operator must change nothing; `what` is the change."""
        if not self.may_write():
            raise NotLeading(f"{what}: this operator does not lead")

    def _count_change(self, verb: str, kind: Kind) -> None:
        if kind != LEASE:
            self.check_lead(f"{verb} {kind.name}")
        self.calls[verb, kind.name] += 1

    async def apply(
        self, kind: Kind, document: Document, *, subresource: str = "", dry_run: bool = False, create_only: bool = False
    ) -> Document:
        """Server-side apply; returns the object. A dry run is checked by the API server and changes nothing.

        With `create_only` an object of this name that exists is left alone: `ApiError` 409.
        """
        if create_only:
            document = {**document, "metadata": {**document["metadata"], "resourceVersion": NO_VERSION}}
        self._count_change("dry run" if dry_run else "apply", kind)
        if dry_run:
            return await self.server.apply(kind, document, MANAGER, subresource=subresource, dry_run=True)
        with self.own.awaiting(kind, document) as answers:
            answers.append(await self.server.apply(kind, document, MANAGER, subresource=subresource))
        return answers[0]

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Document) -> Document:
        """Merge patch; returns the object."""
        self._count_change("patch", kind)
        return await self.server.merge(kind, namespace, name, patch, MANAGER)

    async def create(self, kind: Kind, document: Document) -> Document:
        """Creates an object and returns it."""
        self._count_change("create", kind)
        return await self.server.create(kind, document)

    async def replace(self, kind: Kind, document: Document) -> Document:
        """Writes the whole object; `ApiError` 409 when the version in it is not the newest."""
        self._count_change("update", kind)
        return await self.server.replace(kind, document)

    async def delete(self, kind: Kind, document: Document, *, same_uid: bool = False) -> None:
        """Deletes an object and, in the background, the objects that it owns; it may be gone already.

        With `same_uid` another object of this name is left alone: `ApiError` 409.
        """
        metadata = document["metadata"]
        self._count_change("delete", kind)
        try:
            uid = metadata["uid"] if same_uid else ""
            await self.server.delete(kind, metadata["namespace"], metadata["name"], uid=uid)
        except ApiError as error:
            if error.status != NOT_FOUND:
                raise

    async def get(self, kind: Kind, namespace: str, name: str) -> Document | None:
        """One object, None when there is none."""
        self.calls["get", kind.name] += 1
        try:
            return await self.server.get(kind, namespace, name)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None) -> Listing | None:
        """The operator's objects of a kind in a namespace (None: all); None when the cluster lacks an optional kind."""
        self.calls["list", kind.name] += 1
        try:
            return await self.server.list(kind, namespace, selector_of(kind))
        except ApiError as error:
            if error.status == NOT_FOUND and kind.optional:
                return None
            raise

    async def select(self, kind: Kind, namespace: str, *, labels: str = "", fields: str = "") -> Sequence[Document]:
        """Objects of a namespace by selectors of labels and fields, whoever made them."""
        self.calls["list", kind.name] += 1
        return (await self.server.list(kind, namespace, labels, fields=fields)).items


def selector_of(kind: Kind) -> str:
    """The label selector of what concerns the operator: every resource of its own, and what it made."""
    return "" if kind == SERVING else SELECTOR

"""Keeps up with all objects of a kind: a list, then watches from its version on, and after any failure a list again.

Used by the gateway (EndpointSlices) and by the operator (pods and its resources' objects). What a watch missed, or a
connection that died unseen, is found by the next list, at the latest after `relist_s`. The API server is an argument,
so that this module imports no client.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, cast

from moe_contract.api_server import GONE, NOT_FOUND, ApiError, ApiServer, Document, Kind, Listing

FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 5.0
# The next list comes after a random part of its time, at least this one, so that those of all kinds spread.
LEAST_RELIST = 0.75
# A server that asks for a longer pause than this is asked sooner.
LONGEST_RETRY_AFTER_S = 60.0


class Listener(Protocol):
    """Receives the objects; its methods run between two events and must not block."""

    def listed(self, listing: Listing) -> None:
        """All objects there are; whatever is not among them is gone."""

    def changed(self, document: Document) -> None:
        """An object that is new or was changed."""

    def deleted(self, document: Document) -> None:
        """An object that is gone, as it was last."""

    def absent(self) -> None:
        """The cluster has no such kind; called for optional kinds alone."""

    def lost(self, error: ApiError) -> None:
        """The first of a row of failures: a list failed, or a watch was refused."""

    def recovered(self) -> None:
        """The end of such a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Times of a list-watch, in seconds.

    Attributes:
        watch_s: length of one watch, which the server is asked for.
        relist_s: longest time from one list to the next.
        silence_s: a watch without a byte for so long is dead; the API server sends a bookmark each minute.
        absent_s: pause before a kind that the cluster lacks is asked for again.
    """

    watch_s: float = 60.0
    relist_s: float = 60.0
    silence_s: float = 90.0
    absent_s: float = 60.0


class ListWatch:
    """Follows one kind in one namespace for as long as `run` is awaited.

    Args:
        server: the API server.
        kind: of the objects.
        namespace: where they are; None is everywhere.
        selector: label selector of the objects; empty is all.
        listener: called in the order of the events.
        times: of lists and watches.
        pack: gives each object of a list a smaller form, as in `ApiServer.list`.
    """

    def __init__(
        self,
        server: ApiServer,
        kind: Kind,
        namespace: str | None,
        selector: str,
        listener: Listener,
        times: Times = Times(),
        pack: Callable[[Document], Document] | None = None,
    ) -> None:
        self._server, self._kind, self._namespace, self._selector = server, kind, namespace, selector
        self._listener, self._times, self._pack = listener, times, pack
        # The newest version seen, from which a watch goes on; empty while a list is needed.
        self._version = ""
        self._list_due_s = float("-inf")
        self._failed_step = ""

    async def run(self) -> None:
        """Follows until it is cancelled; no answer of the API server ends it."""
        retry_s = FIRST_RETRY_S
        while True:
            began_s = self._now_s()
            pause_s = await self._follow()
            if pause_s is None or self._now_s() - began_s > LONGEST_RETRY_S:
                retry_s = FIRST_RETRY_S
            if pause_s is not None:
                # Half of the pause at least; the rest is chance, so that many followers do not come at once.
                await asyncio.sleep(max(pause_s, retry_s * random.uniform(0.5, 1.0)))
                retry_s = min(LONGEST_RETRY_S, 2.0 * retry_s)

    async def _follow(self) -> float | None:
        """One watch, after a list where one is due; the least pause before the next, None when it may begin at once."""
        step, before = "watch", self._version
        try:
            if not self._version or self._left_s() <= 0.0:
                step = "list"
                await self._list()
                step, before = "watch", self._version
            await self._watch()
        except ApiError as error:
            return self._fail(step, error)
        except Exception as error:
            # Whatever a server sends, the objects stay as they are and it is asked again.
            return self._fail("list", ApiError(0, repr(error)))
        # A server that ends each watch at once without an event is not asked in a tight loop.
        return None if self._version != before or self._left_s() <= 0.0 else 0.0

    def _fail(self, step: str, error: ApiError) -> float:
        """Has the next step be a list; returns the least pause before it."""
        self._version = ""
        if error.status == NOT_FOUND and self._kind.optional:
            self._listener.absent()
            return self._times.absent_s
        self._report(step, error)
        return min(error.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)

    async def _list(self) -> None:
        listing = await self._server.list(self._kind, self._namespace, self._selector, pack=self._pack)
        self._version = listing.version
        self._list_due_s = self._now_s() + self._times.relist_s * random.uniform(LEAST_RELIST, 1.0)
        self._recover("list")
        self._listener.listed(listing)

    async def _watch(self) -> None:
        """Follows the changes until the server ends the watch or the next list is due."""
        left_s = self._left_s()
        events = cast(
            AsyncGenerator[Document],
            self._server.watch(
                self._kind,
                self._namespace,
                self._selector,
                self._version,
                watch_s=min(self._times.watch_s, left_s),
                silence_s=self._times.silence_s,
            ),
        )
        async with _at_most(left_s), aclosing(events):
            async for event in events:
                self._take(event)
        self._recover("watch")

    def _take(self, event: Document) -> None:
        document = event["object"]
        match event["type"]:
            case "ADDED" | "MODIFIED":
                self._listener.changed(document)
            case "DELETED":
                self._listener.deleted(document)
            case "BOOKMARK":
                pass
            case other:
                raise ApiError(0, f"an event of unknown type {other!r}")
        self._version = document["metadata"]["resourceVersion"]
        self._recover("watch")

    def _report(self, step: str, error: ApiError) -> None:
        """Reports the first of a row of failures; a version that is too old or a broken watch is none."""
        if error.status == GONE or (step == "watch" and error.status == 0):
            return
        if not self._failed_step:
            self._listener.lost(error)
        self._failed_step = step

    def _recover(self, step: str) -> None:
        if self._failed_step == step:
            self._listener.recovered()
            self._failed_step = ""

    def _left_s(self) -> float:
        """Seconds until the next list is due."""
        return self._list_due_s - self._now_s()

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def _at_most(seconds: float) -> AsyncGenerator[None]:
    """Ends the block after a time without an error; a timeout of the block itself passes."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise

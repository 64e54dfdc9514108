"""Leader election by a Lease, so that of several operators one writes: the rules of client-go's leaderelection.

A holder renews; one that could not for `renew_s` ends its work before others may take over at `duration_s`. Times are
taken from the own clock, a holder's from before it asked, the others' since a change was seen, so clocks of machines
need not agree. All writes carry the version of the Lease that was read: two that try at once cannot both succeed.

Calls are bounded by `asyncio.timeout`. `wait_for` of Python 3.11 loses a cancellation that comes together with the
answer, and an election that was cancelled would then go on renewing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from moe_contract.api_server import CONFLICT, ApiError, Document

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import LEASE
from moe_operator.kubernetes.rivals import SERVES, Rival

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Times of the election, those of client-go.

    Attributes:
        duration_s: time without a renewal after which a Lease is free.
        renew_s: time without a renewal after which a holder stops.
        retry_s: time between two tries.
    """

    duration_s: float = 15.0
    renew_s: float = 10.0
    retry_s: float = 2.0


class Election:
    """One candidate for a Lease.

    Args:
        api: reads and writes the Lease.
        namespace: where the Lease is.
        name: of the Lease.
        identity: of this candidate, different from all others.
        terms: times of the election.
        clock: monotonic seconds.
        find_rivals: asked before the Lease is taken and once more before it leads; while it returns any, this candidate
            stands by.
        metadata: labels and annotations of the Lease.

    Attributes:
        leading: set from the first success until the lead is lost.
        rivals: those that were found last.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        terms: Terms = Terms(),
        clock: Callable[[], float] = time.monotonic,
        find_rivals: Callable[[], Awaitable[list[Rival]]] | None = None,
        metadata: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        self._api, self._namespace, self._name, self._identity = api, namespace, name, identity
        self._terms, self._clock = terms, clock
        self._find_rivals, self._metadata = find_rivals, metadata
        self.leading = asyncio.Event()
        self.rivals: list[Rival] = []
        self._renewed_s = clock()
        self._seen: tuple[str, str, float] = ("", "", clock())

    def holds(self) -> bool:
        """Whether this operator may write now; False also in a process that was suspended beyond its term."""
        return self.leading.is_set() and self._left_s() > 0.0

    async def run(self) -> None:
        """Tries until it leads, renews while it does; returns when it no longer does."""
        while True:
            began_s = self._clock()
            held = await self._try_in_time()
            if held:
                self._renewed_s = began_s
                if not self.leading.is_set() and not await self._is_rivalled():
                    log.info("%s leads", self._identity)
                    self.leading.set()
            elif self.leading.is_set() and (held is False or self._left_s() <= 0.0):
                log.error("%s no longer leads", self._identity)
                self.leading.clear()
                return
            left_s = max(0.0, self._left_s()) if self.leading.is_set() else self._terms.retry_s
            await asyncio.sleep(min(self._terms.retry_s, left_s))

    async def _is_rivalled(self) -> bool:
        """Whether another release serves a namespace of this one, or that is not known."""
        if self._find_rivals is None:
            return False
        try:
            async with asyncio.timeout(self._terms.retry_s * 2):
                rivals = await self._find_rivals()
        except (ApiError, TimeoutError) as error:
            log.warning("leases of other releases: %r", error)
            return True
        if rivals and rivals != self.rivals:
            log.error("%s stands by: %s serves the same namespaces", self._identity, ", ".join(map(str, rivals)))
        self.rivals = rivals
        return bool(rivals)

    def _left_s(self) -> float:
        return self._renewed_s + self._terms.renew_s - self._clock()

    async def _try_in_time(self) -> bool | None:
        if not self.leading.is_set():
            return await self._try()
        try:
            async with asyncio.timeout(self._left_s()):
                return await self._try()
        except TimeoutError:
            return None

    async def release(self) -> None:
        """Empties the Lease, so that another candidate takes over at once."""
        if not self.leading.is_set():
            return
        self.leading.clear()
        lease = await self._api.get(LEASE, self._namespace, self._name)
        if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
            await self._write(lease)

    async def _try(self) -> bool | None:
        """Whether it holds the Lease; None when that is unknown."""
        try:
            async with asyncio.timeout(self._terms.retry_s * 2):
                lease = await self._api.get(LEASE, self._namespace, self._name)
            if lease is None:
                if await self._is_rivalled():
                    return False
                await self._api.create(LEASE, self._document({}, transitions=0))
                return True
            return await self._take(lease)
        except (ApiError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.status == CONFLICT:
                return False if not self.leading.is_set() else None
            log.warning("lease: %r", error)
            return None

    async def _take(self, lease: Document) -> bool:
        spec, metadata = lease.get("spec", {}), lease["metadata"]
        holder, version = spec.get("holderIdentity", ""), metadata["resourceVersion"]
        if (holder, version) != self._seen[:2]:
            self._seen = (holder, version, self._clock())
        free = not holder or self._clock() - self._seen[2] > float(spec.get("leaseDurationSeconds") or 0)
        if holder != self._identity and not free:
            self._judge_holder(metadata)
            return False
        if not self.leading.is_set() and await self._is_rivalled():
            await self._give_way(lease)
            return False
        transitions = int(spec.get("leaseTransitions") or 0) + (holder != self._identity)
        await self._write(
            self._document(metadata, transitions=transitions, since=spec if holder == self._identity else {})
        )
        return True

    def _judge_holder(self, metadata: Document) -> None:
        """A Lease that is held for other namespaces is another release's: who waits for it serves nobody."""
        wanted, found = self._metadata.get("annotations", {}), metadata.get("annotations") or {}
        differs = SERVES in found and found[SERVES] != wanted.get(SERVES, found[SERVES])
        rivals = [Rival(place=f"{self._namespace}/{self._name}", scope=found[SERVES])] if differs else []
        if rivals and rivals != self.rivals:
            log.error("%s stands by: %s has its Lease; give each release its own", self._identity, rivals[0])
        self.rivals = rivals

    async def _give_way(self, lease: Document) -> None:
        """Lets go of a Lease that it took while a rival took another: the first by name keeps its own."""
        held = lease.get("spec", {}).get("holderIdentity") == self._identity
        if held and any(rival.place < f"{self._namespace}/{self._name}" for rival in self.rivals):
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
            await self._write(lease)

    def _marks(self, metadata: Document) -> Document:
        return {part: {**(metadata.get(part) or {}), **values} for part, values in self._metadata.items()}

    async def _write(self, lease: Document) -> None:
        async with asyncio.timeout(self._terms.retry_s * 2):
            await self._api.replace(LEASE, lease)

    def _document(self, metadata: Document, *, transitions: int, since: Document | None = None) -> Document:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {**metadata, **self._marks(metadata), "name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": round(self._terms.duration_s),
                "acquireTime": (since or {}).get("acquireTime", now),
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

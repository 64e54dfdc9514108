"""The waiting requests of several tenants in one order: a sorted queue for each tenant, and the heads of all queues.

Made by `WaitingQueue` once a second tenant waits there. The next request is the one with the least key, the virtual
time of its tenant added (`fairness.py`). A charge moves all requests of a tenant alike, so that the order within its
queue stays; only the place of its head changes.

Invariants: each waiting tenant has one row among the sorted heads. The row stands at or before the true place of the
tenant's first request, because the keys of a queue's head and virtual times only rise until a push moves the row; so
the first row that is up to date is the next request. Within a tenant the order is that of the keys alone.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from sortedcontainers import SortedList

from moe_scheduling.request.fairness import TenantCounters

T = TypeVar("T", bound=Hashable)


class Entry(NamedTuple, Generic[T]):
    """One waiting request. The first three fields order it; `sequence` is unique, so the rest is never compared.

    Attributes:
        primary: first part of its key (`order_key`).
        secondary: second part of its key.
        sequence: number of its push.
        item: the request.
        size_tokens: uncached prefill tokens, as given.
        arrival_s: arrival, as given.
        priority: level, as given.
        front: number of the pushes to the front up to this one; 0 for a push to the order's own place.
        tenant: whose it is.
    """

    primary: float
    secondary: float
    sequence: int
    item: T
    size_tokens: float
    arrival_s: float
    priority: int
    front: int
    tenant: str


# Place of a head: key with the virtual time of its tenant, sequence, tenant.
_Head = tuple[float, float, int, str]


class TenantQueues(Generic[T]):
    """Orders the requests of all tenants by key and virtual time.

    `push`, `remove` and `first` are O(log n), amortised; memory is O(n).

    Args:
        counters: the service of the tenants.
        entries: the requests that wait now.
    """

    __slots__ = ("_counters", "_head_of", "_heads", "_queues")

    def __init__(self, counters: TenantCounters, entries: Iterable[Entry[T]]) -> None:
        self._counters = counters
        self._queues: dict[str, SortedList[Entry[T]]] = {}
        self._heads: list[_Head] = []
        self._head_of: dict[str, _Head] = {}
        for entry in entries:
            self.push(entry)

    def push(self, entry: Entry[T]) -> None:
        """Adds an entry to the queue of its tenant."""
        queue = self._queues.get(entry.tenant)
        if queue is None:
            queue = self._queues[entry.tenant] = SortedList()
            self._counters.enter(entry.tenant)
        queue.add(entry)
        if queue[0] is entry:
            self._place_head(entry)

    def replace(self, entries: Iterable[Entry[T]]) -> None:
        """Puts other entries, of the same tenants, in the place of all; the service of tenants stays."""
        by_tenant: dict[str, list[Entry[T]]] = {}
        for entry in entries:
            by_tenant.setdefault(entry.tenant, []).append(entry)
        self._queues = {tenant: SortedList(rows) for tenant, rows in by_tenant.items()}
        for queue in self._queues.values():
            self._place_head(queue[0])

    def remove(self, entry: Entry[T]) -> None:
        """Takes out a request that waits."""
        queue = self._queues[entry.tenant]
        queue.remove(entry)
        if not queue:
            self._leave(entry.tenant)

    def pop(self) -> Entry[T]:
        """Takes out and returns the request to serve next; at least one waits."""
        entry = self.first()
        queue = self._queues[entry.tenant]
        queue.pop(0)
        if not queue:
            self._leave(entry.tenant)
        return entry

    def first(self) -> Entry[T]:
        """Returns the request to serve next; at least one waits."""
        while True:
            place, _, sequence, tenant = self._heads[0]
            entry: Entry[T] = self._queues[tenant][0]
            if sequence == entry.sequence and place == entry.primary + self._counters.virtual_time_s(tenant):
                return entry
            self._place_head(entry)

    def in_order(self) -> Iterator[tuple[Entry[T], float]]:
        """Yields each request with the first part of its key, the lag added, in the order of service.

        Lazy: the first k of n requests of m tenants cost O(k log m). Nothing may be pushed, removed or charged
        meanwhile.
        """
        rows = iter(self._heads)
        row = next(rows, None)
        base_s = self._counters.base_s
        # The next request of each tenant whose row was reached, at its true place.
        reached: list[tuple[float, float, int, Entry[T], float, Iterator[Entry[T]]]] = []
        while True:
            while row is not None and (not reached or row < reached[0][:3]):
                queue = iter(self._queues[row[3]])
                heappush(reached, self._next_of(next(queue), self._counters.virtual_time_s(row[3]), queue))
                row = next(rows, None)
            if not reached:
                return
            place, _, _, entry, virtual_s, queue = heappop(reached)
            yield entry, place - base_s
            if (following := next(queue, None)) is not None:
                heappush(reached, self._next_of(following, virtual_s, queue))

    @staticmethod
    def _next_of(
        entry: Entry[T], virtual_s: float, queue: Iterator[Entry[T]]
    ) -> tuple[float, float, int, Entry[T], float, Iterator[Entry[T]]]:
        return entry.primary + virtual_s, entry.secondary, entry.sequence, entry, virtual_s, queue

    def _leave(self, tenant: str) -> None:
        del self._queues[tenant]
        del self._heads[bisect_left(self._heads, self._head_of.pop(tenant))]
        self._counters.leave(tenant)

    def _place_head(self, entry: Entry[T]) -> None:
        """Puts the row of a tenant whose first request is `entry` at its place as of now."""
        tenant = entry.tenant
        if (before := self._head_of.get(tenant)) is not None:
            del self._heads[bisect_left(self._heads, before)]
        place = entry.primary + self._counters.virtual_time_s(tenant)
        head = self._head_of[tenant] = place, entry.secondary, entry.sequence, tenant
        insort(self._heads, head)

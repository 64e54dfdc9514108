"""Layer 1: the requests that wait, in an engine's queue (the vLLM plugin) and in the gateway's hold queue.

A sorted list of static keys (`order.py`): nothing is sorted again while requests wait, but when the engine is found to
be faster by a quarter or more (`prefill_speed.py`). Where several tenants wait under `sjf`, each has a sorted list of
its own (`tenant_queues.py`).

Invariants: the order is total, and the same for the same calls; requests with equal keys are served in the order of
their pushes; no key rises while its request waits or comes back with no more tokens; memory is O(waiting requests).
"""

import math
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from sortedcontainers import SortedList

from moe_scheduling.request.fairness import ANONYMOUS_TENANT, VIRTUAL_S, TenantCounters
from moe_scheduling.request.order import LARGEST_EXACT, RequestPolicy, RequestSettings, order_key
from moe_scheduling.request.prefill_speed import SpeedHistory
from moe_scheduling.request.tenant_queues import Entry, TenantQueues

T = TypeVar("T", bound=Hashable)


class Waiting(NamedTuple, Generic[T]):
    """A waiting request as `WaitingQueue.in_order` yields it.

    Attributes:
        item: the request.
        size_tokens: its size as it was pushed.
        key: its key (`order_key`), the lag of its tenant added to the first part.
    """

    item: T
    size_tokens: float
    key: tuple[float, float]


class WaitingQueue(Generic[T]):
    """The waiting requests in the order of `order_key`; one owner, no locks.

    `push`, `pop`, `remove` are O(log n), `peek` is O(1), both amortised. Pushing an item again replaces it. While only
    one tenant has waited there is one sorted list; from the second tenant on each has its own, if the settings separate
    tenants (`RequestSettings.is_fair`). Other settings forget the service of tenants.

    Args:
        settings: the order.
    """

    __slots__ = (
        "_counters",
        "_entries",
        "_fronts",
        "_only_tenant",
        "_order",
        "_pushes",
        "_settings",
        "_size_tokens",
        "_speeds",
        "_tenants",
    )

    def __init__(self, settings: RequestSettings) -> None:
        self._settings = settings
        self._entries: dict[T, Entry[T]] = {}
        # The same entries in order, while tenants are not separated; else empty.
        self._order: SortedList[Entry[T]] = SortedList()
        self._pushes = 0
        self._fronts = 0
        self._size_tokens = 0
        self._speeds = SpeedHistory()
        # None before the first tenant.
        self._only_tenant: str | None = None
        # None while tenants are not separated.
        self._counters: TenantCounters | None = None
        self._tenants: TenantQueues[T] | None = None

    @property
    def settings(self) -> RequestSettings:
        """The settings of the order in force."""
        return self._settings

    @property
    def size_tokens(self) -> int:
        """Sum of the sizes of the waiting requests, in tokens; a size that is not a number counts as 0."""
        return self._size_tokens

    def push(
        self,
        item: T,
        *,
        size_tokens: float,
        arrival_s: float,
        priority: int = 0,
        front: bool = False,
        tenant: str = ANONYMOUS_TENANT,
    ) -> None:
        """Adds a request.

        Args:
            item: the request; its hash and equality are its identity.
            size_tokens: uncached prefill tokens.
            arrival_s: arrival on the clock of this queue.
            priority: level; lower is more urgent.
            front: under `fcfs`, before all waiting requests, the last such push first, as vLLM puts back a preempted
                request. The other policies have no front: there the request takes the place that its arrival gives it.
            tenant: whose it is.

        Raises:
            ValueError: the arrival is not finite.
        """
        self._pushes += 1
        if front:
            self._fronts += 1
        self._speeds.note(arrival_s)
        entry = self._entry(item, self._pushes, size_tokens, arrival_s, priority, self._fronts if front else 0, tenant)
        if item in self._entries:
            self.remove(item)
        self._entries[item] = entry
        self._size_tokens += _countable(size_tokens)
        if self._tenants is not None:
            self._tenants.push(entry)
            return
        self._order.add(entry)
        if tenant != self._only_tenant and self._settings.is_fair:
            self._separate(tenant)

    def _separate(self, tenant: str) -> None:
        """Notes the first tenant; gives each tenant a queue of its own when a second one comes."""
        if self._only_tenant is None:
            self._only_tenant = tenant
            return
        self._counters = TenantCounters(self._settings.fairness_horizon_s)
        self._tenants = TenantQueues(self._counters, self._entries.values())
        self._order.clear()

    def charge(self, tenant: str, tokens: float) -> None:
        """Adds tokens of service to a tenant; without effect until a second tenant has waited."""
        if self._counters is not None:
            rate = self._settings.ageing_rate or self._speeds.tokens_per_s / VIRTUAL_S
            self._counters.charge(tenant, tokens / rate)

    @property
    def charges(self) -> bool:
        """Whether `charge` has an effect."""
        return self._counters is not None

    def lag_s(self, tenant: str) -> float:
        """Returns the seconds by which requests of the tenant come later than their keys."""
        return 0.0 if self._counters is None else self._counters.lag_s(tenant)

    def peek(self) -> T:
        """Returns the request to serve next and leaves it in place.

        Raises:
            IndexError: nothing waits.
        """
        if not self._entries:
            raise IndexError("nothing waits")
        first: Entry[T] = self._order[0] if self._tenants is None else self._tenants.first()
        return first.item

    def pop(self) -> T:
        """Takes out and returns the request to serve next.

        Raises:
            IndexError: nothing waits.
        """
        if not self._entries:
            raise IndexError("nothing waits")
        entry: Entry[T] = self._order.pop(0) if self._tenants is None else self._tenants.pop()
        del self._entries[entry.item]
        self._size_tokens -= _countable(entry.size_tokens)
        return entry.item

    def remove(self, item: T) -> None:
        """Takes out one request.

        Raises:
            KeyError: it does not wait here.
        """
        entry = self._entries.pop(item)
        self._size_tokens -= _countable(entry.size_tokens)
        if self._tenants is not None:
            self._tenants.remove(entry)
        else:
            self._order.remove(entry)

    def discard(self, item: T) -> None:
        """Takes out one request if it waits here."""
        if item in self._entries:
            self.remove(item)

    def reorder(self, settings: RequestSettings) -> None:
        """Orders waiting and coming requests by other settings, and forgets the service of tenants.

        Equal settings change nothing: the caller passes them again whenever some other setting changes.
        """
        if settings == self._settings:
            return
        self._settings = settings
        self._renew_keys()
        self._order = SortedList(self._entries.values())
        self._only_tenant = self._counters = self._tenants = None
        if settings.is_fair:
            for tenant in list(dict.fromkeys(entry.tenant for entry in self._entries.values()))[:2]:
                self._separate(tenant)

    def take_speed(self, tokens_per_s: float | None) -> None:
        """Notes the measured prefill speed of the engine in tokens a second; one that is none changes nothing.

        Requests that wait come no later than before; with a greater speed their order is nearer to that of arrival.
        """
        if not self._speeds.take(tokens_per_s) or not self._goes_by_speed:
            return
        self._renew_keys()
        if self._tenants is None:
            self._order = SortedList(self._entries.values())
        else:
            self._tenants.replace(self._entries.values())

    @property
    def _goes_by_speed(self) -> bool:
        return self._settings.policy is RequestPolicy.SJF and self._settings.ageing_rate is None

    def _renew_keys(self) -> None:
        entries = [self._entry(entry.item, entry.sequence, *entry[4:]) for entry in self._entries.values()]
        self._entries = {entry.item: entry for entry in entries}

    def key(self, *, size_tokens: float, arrival_s: float, priority: int, tenant: str) -> tuple[float, float]:
        """Returns the key, lag included, that a request would have in the queue now.

        Raises:
            ValueError: the arrival is not finite.
        """
        primary, secondary = self._key(size_tokens, arrival_s, priority)
        return primary + self.lag_s(tenant), secondary

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        """Iterates over a copy, in the order of service: pushes and removals meanwhile do not disturb it."""
        if self._tenants is not None:
            return iter([entry.item for entry, _ in self._tenants.in_order()])
        return iter([entry.item for entry in self._order])

    def in_order(self) -> Iterator[Waiting[T]]:
        """Yields the waiting requests lazily in the order of service. The queue must not change meanwhile."""
        if self._tenants is None:
            for entry in self._order:
                yield Waiting(entry.item, entry.size_tokens, entry[:2])
            return
        for entry, primary in self._tenants.in_order():
            yield Waiting(entry.item, entry.size_tokens, (primary, entry.secondary))

    def _entry(
        self, item: T, sequence: int, size_tokens: float, arrival_s: float, priority: int, front: int, tenant: str
    ) -> Entry[T]:
        if front and self._settings.policy == RequestPolicy.FCFS:
            primary, secondary = -math.inf, float(-front)
        else:
            primary, secondary = self._key(size_tokens, arrival_s, priority)
        return Entry(primary, secondary, sequence, item, size_tokens, arrival_s, priority, front, tenant)

    def _key(self, size_tokens: float, arrival_s: float, priority: int) -> tuple[float, float]:
        speed = self._speeds.at(arrival_s)
        return order_key(self._settings, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority, speed=speed)


def _countable(size_tokens: float) -> int:
    return int(size_tokens) if 0 < size_tokens < LARGEST_EXACT else 0

"""Layer 1: the order of requests that wait, in an engine's queue (the vLLM plugin) and in the gateway's hold queue.

All policies are one mechanism: a key that does not change while a request waits, so that a heap serves and nothing is
ever sorted again. A policy is a function that makes the key. Where several tenants wait under `sjf`, the key of a
request counts from its tenant's lead over the others (`fairness.py`).

Invariants: the order is total and the same for the same pushes; equal keys are served by arrival, then in the order of
the pushes; no size, priority or arrival that a peer sends makes a key that does not compare (NaN).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from moe_scheduling.request.fairness import ANONYMOUS_TENANT, TenantShares
from moe_scheduling.request.tenant_queues import Entry, TenantQueues

# Whole numbers up to here are exact in a float; no prompt and no level of priority is near it.
_LARGEST = 2**53
_LARGEST_SHIFT_S = 1e300
# Dead entries that a heap may hold beyond as many as live ones, so that a short queue is not compacted at each removal.
_SPARE_ENTRIES = 64


class RequestPolicy(StrEnum):
    """How the waiting queue is ordered."""

    FCFS = "fcfs"
    PRIORITY = "priority"
    SJF = "sjf"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSettings:
    """Order of the waiting queue, and what a step takes from it.

    Under `fcfs` and `priority` an engine does what vLLM does, step for step: all that goes beyond it is of `sjf` alone.

    Attributes:
        policy: `sjf` orders by uncached prefill tokens with ageing, `fcfs` by arrival, `priority` by (priority,
            arrival).
        ageing_rate: uncached prefill tokens that one second of waiting makes up for, tokens/s. Under `sjf` a request of
            S tokens is never overtaken by one that arrived more than S / ageing_rate seconds after it.
        ageing_horizon_s: upper bound of that time: no request is overtaken by one of its priority that arrived later
            by more.
        priority_step_s: under `sjf`, the head start in seconds that one level of priority is worth (lower is more
            urgent).
        yield_prefills: under `sjf`, whether a prompt that is computed in chunks lets waiting requests go first that
            come before what is left of it.
        cut_prefills: under `sjf`, whether a step may take less of the prompts than it has room for, where their tokens
            would take longer in one step than in two.
        defer_scheduling: under `sjf` and where steps are scheduled ahead (vLLM's asynchronous scheduling), whether the
            next step is scheduled just before the end of the one that runs, and not at its begin.
        kv_growth_blocks: under `sjf`, KV blocks that are kept free for each running request when another is admitted,
            so that running requests can grow without a preemption. 0: none, as vLLM does.
        fairness_horizon_s: under `sjf`, the seconds by which requests of a tenant that was served more come later at
            most. 0: tenants are not told apart.

    Raises:
        ValueError: a value is out of its range or not finite.
    """

    policy: RequestPolicy = RequestPolicy.SJF
    ageing_rate: float = 1000.0
    ageing_horizon_s: float = 10.0
    priority_step_s: float = 2.0
    yield_prefills: bool = True
    cut_prefills: bool = True
    defer_scheduling: bool = True
    kv_growth_blocks: int = 1
    fairness_horizon_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 < self.ageing_rate < math.inf:
            raise ValueError("ageing_rate must be greater than 0 and finite")
        if not 0.0 <= self.ageing_horizon_s < math.inf:
            raise ValueError("ageing_horizon_s must be at least 0 and finite")
        if not 0.0 <= self.priority_step_s < math.inf:
            raise ValueError("priority_step_s must be at least 0 and finite")
        if not 0 <= self.kv_growth_blocks <= _LARGEST:
            raise ValueError("kv_growth_blocks must be at least 0")
        if not 0.0 <= self.fairness_horizon_s < math.inf:
            raise ValueError("fairness_horizon_s must be at least 0 and finite")

    @property
    def is_fair(self) -> bool:
        """Whether tenants are told apart."""
        return self.policy is RequestPolicy.SJF and self.fairness_horizon_s > 0.0


def order_key(
    settings: RequestSettings, *, size_tokens: float, arrival_s: float, priority: int = 0
) -> tuple[float, float]:
    """The static key of a request: the smaller is served first; the second part, the arrival, breaks ties.

    Under `sjf` the key is `min(size_tokens / ageing_rate, ageing_horizon_s) + arrival_s + priority * priority_step_s`.
    It orders like "size less what was made up for by waiting", because all that wait age alike: the clock cancels out.

    The bound on waiting. Let `shift_s = min(size_tokens / ageing_rate, ageing_horizon_s)` of a request that arrives
    at a. Another's shift is never negative, so it overtakes only if it arrives before `a + shift_s`: no request of the
    same priority that arrives more than `shift_s` later does. The request is thus served after, at most, the work that
    was there at a and the work that arrives within `shift_s` of a, whatever comes afterwards: at a service of r
    tokens/s it waits at most `(work_at_arrival + work_arriving_within_shift) / r`. Each level by which another request
    is more urgent widens that one's window by `priority_step_s`: priority delays, but does not starve.
    Between tenants the window is wider by `fairness_horizon_s`: a lead is at least 0 and at most that, whatever was and
    will be charged, so a request of another tenant that arrives later than `shift_s + fairness_horizon_s` never
    overtakes. Within a tenant the bound is as it was.

    Args:
        settings: the policy and its figures.
        size_tokens: uncached prefill tokens. What is negative counts as 0, what is not a number as endless.
        arrival_s: arrival on any clock that all requests of a queue share.
        priority: level; lower is more urgent.

    Raises:
        ValueError: the arrival is not finite.
    """
    if not math.isfinite(arrival_s):
        raise ValueError(f"arrival_s must be finite, got {arrival_s!r}")
    return _PRIMARY_KEYS[settings.policy](settings, size_tokens, arrival_s, priority), arrival_s


def _sjf_key(settings: RequestSettings, size_tokens: float, arrival_s: float, priority: int) -> float:
    shift_s = settings.ageing_horizon_s
    if size_tokens < _LARGEST:
        shift_s = min(max(size_tokens, 0) / settings.ageing_rate, shift_s)
    if priority:
        head_start_s = _level(priority) * settings.priority_step_s
        arrival_s += max(-_LARGEST_SHIFT_S, min(_LARGEST_SHIFT_S, head_start_s))
    return arrival_s + shift_s


def _fcfs_key(_settings: RequestSettings, _size_tokens: float, arrival_s: float, _priority: int) -> float:
    return arrival_s


def _priority_key(_settings: RequestSettings, _size_tokens: float, _arrival_s: float, priority: int) -> float:
    return _level(priority)


def _level(priority: int) -> int:
    return max(-_LARGEST, min(_LARGEST, priority))


_PRIMARY_KEYS: Mapping[RequestPolicy, Callable[[RequestSettings, float, float, int], float]] = {
    RequestPolicy.FCFS: _fcfs_key,
    RequestPolicy.PRIORITY: _priority_key,
    RequestPolicy.SJF: _sjf_key,
}

T = TypeVar("T", bound=Hashable)


class Waiting(NamedTuple, Generic[T]):
    """A request that waits: its size as it was pushed, and its key as of `order_key`, its tenant's lead added."""

    item: T
    size_tokens: float
    key: tuple[float, float]


class WaitingQueue(Generic[T]):
    """The requests that wait, in the order of `order_key`; one owner, no locks.

    A heap with lazy deletion: what is removed leaves the table of the living at once and the heap later, at the latest
    when the dead outnumber the living. Memory is O(living), each operation O(log n) amortised.

    An item that is pushed again replaces itself.

    As long as all that was pushed is of one tenant there is one heap; from the second tenant on each has its own, where
    the settings tell them apart. Other settings begin with the tenants anew.
    """

    __slots__ = ("_fronts", "_heap", "_lanes", "_living", "_pushes", "_settings", "_shares", "_size_tokens", "_tenant")

    def __init__(self, settings: RequestSettings) -> None:
        self._settings = settings
        self._heap: list[Entry[T]] = []
        self._living: dict[T, Entry[T]] = {}
        self._pushes = 0
        self._fronts = 0
        self._size_tokens = 0
        # The only tenant so far; None: none, or several.
        self._tenant: str | None = None
        self._shares: TenantShares | None = None
        self._lanes: TenantQueues[T] | None = None

    @property
    def settings(self) -> RequestSettings:
        """The order in force."""
        return self._settings

    @property
    def size_tokens(self) -> int:
        """Sum of the sizes of what waits; a size that is no number counts as 0."""
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
        """Lets a request wait.

        Args:
            item: the request; its hash and equality are its identity.
            size_tokens: uncached prefill tokens.
            arrival_s: arrival on the clock of this queue.
            priority: level; lower is more urgent.
            front: under `fcfs`, before all that waits, the last such push first, as vLLM puts back what it preempted.
                The other policies have no front: there the request takes the place that its arrival gives it.
            tenant: whose it is.

        Raises:
            ValueError: the arrival is not finite.
        """
        self._pushes += 1
        if front:
            self._fronts += 1
        entry = self._entry(item, self._pushes, size_tokens, arrival_s, priority, self._fronts if front else 0, tenant)
        if item in self._living:
            self.remove(item)
        self._living[item] = entry
        self._size_tokens += _countable(size_tokens)
        if self._lanes is not None:
            self._lanes.push(entry)
            return
        heappush(self._heap, entry)
        if tenant != self._tenant and self._settings.is_fair:
            self._meet(tenant)

    def _meet(self, tenant: str) -> None:
        """The first tenant that waits here, or the second: from then on they are told apart."""
        if self._tenant is None:
            self._tenant = tenant
            return
        settings = self._settings
        self._shares = TenantShares(settings.ageing_rate, settings.fairness_horizon_s)
        self._lanes = TenantQueues(self._shares, self._living, self._living.values())
        self._heap = []

    def charge(self, tenant: str, tokens: float) -> None:
        """A tenant was served so many tokens; without effect until a second one has waited."""
        if self._shares is not None:
            self._shares.charge(tenant, tokens)

    @property
    def charges(self) -> bool:
        """Whether it makes a difference who is charged."""
        return self._shares is not None

    def lag_s(self, tenant: str) -> float:
        """Seconds by which the requests of a tenant come later than their own keys."""
        return 0.0 if self._shares is None else self._shares.lag_s(tenant)

    def peek(self) -> T:
        """The request to serve next, left in place.

        Raises:
            IndexError: nothing waits.
        """
        if self._lanes is not None:
            if (first := self._lanes.first()) is not None:
                return first.item
            raise IndexError("nothing waits")
        heap, living = self._heap, self._living
        while heap:
            entry = heap[0]
            if living.get(entry.item) is entry:
                return entry.item
            heappop(heap)
        raise IndexError("nothing waits")

    def pop(self) -> T:
        """Takes out the request to serve next.

        Raises:
            IndexError: nothing waits.
        """
        item = self.peek()
        if self._lanes is not None:
            self.remove(item)
            return item
        heappop(self._heap)
        self._size_tokens -= _countable(self._living.pop(item).size_tokens)
        return item

    def remove(self, item: T) -> None:
        """Takes out one request.

        Raises:
            KeyError: it does not wait here.
        """
        entry = self._living.pop(item)
        self._size_tokens -= _countable(entry.size_tokens)
        most = 2 * len(self._living) + _SPARE_ENTRIES
        if self._lanes is not None:
            self._lanes.removed(entry)
            if self._lanes.heaped > most:
                self._lanes.compact()
        # An empty queue keeps nothing alive.
        elif not self._living or len(self._heap) > most:
            self._rebuild(self._living.values())

    def discard(self, item: T) -> None:
        """Takes out one request if it waits here."""
        if item in self._living:
            self.remove(item)

    def reorder(self, settings: RequestSettings) -> None:
        """Orders what waits, and what comes, by other settings; what tenants were served is forgotten.

        The same settings change nothing: they come again whenever something else is set.
        """
        if settings == self._settings:
            return
        self._settings = settings
        entries = [
            self._entry(
                entry.item,
                entry.sequence,
                entry.size_tokens,
                entry.arrival_s,
                entry.priority,
                entry.front,
                entry.tenant,
            )
            for entry in self._living.values()
        ]
        self._living = {entry.item: entry for entry in entries}
        self._rebuild(entries)
        self._tenant = self._shares = self._lanes = None
        if settings.is_fair:
            for tenant in list(dict.fromkeys(entry.tenant for entry in entries))[:2]:
                self._meet(tenant)

    def __len__(self) -> int:
        return len(self._living)

    def __bool__(self) -> bool:
        return bool(self._living)

    def __contains__(self, item: object) -> bool:
        return item in self._living

    def __iter__(self) -> Iterator[T]:
        """The requests in the order of service, as of now; what is pushed or removed meanwhile does not disturb it."""
        if self._lanes is not None:
            return iter([entry.item for entry, _ in self._lanes.in_order()])
        return iter([entry.item for entry in sorted(self._living.values())])

    def in_order(self) -> Iterator[Waiting[T]]:
        """The same, found one by one: the first k of n cost O(k log k). The queue must not change meanwhile."""
        if self._lanes is not None:
            for entry, primary in self._lanes.in_order():
                yield Waiting(entry.item, entry.size_tokens, (primary, entry.secondary))
            return
        heap, living = self._heap, self._living
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            entry, place = heappop(frontier)
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], child))
            if living.get(entry.item) is entry:
                yield Waiting(entry.item, entry.size_tokens, (entry.primary, entry.secondary))

    def _entry(
        self, item: T, sequence: int, size_tokens: float, arrival_s: float, priority: int, front: int, tenant: str
    ) -> Entry[T]:
        settings = self._settings
        if front and settings.policy == RequestPolicy.FCFS:
            primary, secondary = -math.inf, float(-front)
        else:
            primary, secondary = order_key(settings, size_tokens=size_tokens, arrival_s=arrival_s, priority=priority)
        return Entry(primary, secondary, sequence, item, size_tokens, arrival_s, priority, front, tenant)

    def _rebuild(self, entries: Iterable[Entry[T]]) -> None:
        self._heap = list(entries)
        heapify(self._heap)


def _countable(size_tokens: float) -> int:
    return int(size_tokens) if 0 < size_tokens < _LARGEST else 0

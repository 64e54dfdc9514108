"""The requests of several tenants in one order: a heap for each tenant, and a race of the heaps' heads.

Made by `WaitingQueue` once a second tenant waits there; it tells which entries still count. The next is the one with
the least key, its tenant's lead added (`fairness.py`). A lead moves all of a tenant's requests alike, so that each heap
stays as it is when something is charged, and only the race is run anew, where its first comes to the front.

Invariants: the race holds a bid of each lane, at or before the lane's true place, so that the first true bid wins;
within a tenant the order is that of the keys alone.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, NamedTuple, TypeVar

from moe_scheduling.request.fairness import TenantShares

T = TypeVar("T", bound=Hashable)

# Old bids that the race may hold beyond as many as there are lanes.
_SPARE_BIDS = 64


class Entry(NamedTuple, Generic[T]):
    """One request in a heap. The first three fields order it; `sequence` is unique, so the rest never compares."""

    primary: float
    secondary: float
    sequence: int
    item: T
    size_tokens: float
    arrival_s: float
    priority: int
    front: int
    tenant: str


class _Lane(Generic[T]):
    """The requests of one tenant; those that count, `living`, are some of the heap's."""

    __slots__ = ("bid", "heap", "living", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.heap: list[Entry[T]] = []
        self.living = 0
        self.bid: _Bid[T] | None = None


class _Bid(NamedTuple, Generic[T]):
    """A lane's place in the race, as it was when the bid was made; `number` is unique."""

    primary: float
    secondary: float
    sequence: int
    number: int
    lane: _Lane[T]


class TenantQueues(Generic[T]):
    """See the module.

    Args:
        shares: what the tenants were served.
        living: the entries that count, by their items; the queue's own table, which it changes before it tells.
        entries: what waits.
    """

    __slots__ = ("_bids", "_heaped", "_lanes", "_living", "_race", "_shares")

    def __init__(self, shares: TenantShares, living: Mapping[T, Entry[T]], entries: Iterable[Entry[T]]) -> None:
        self._shares = shares
        self._living = living
        self._lanes: dict[str, _Lane[T]] = {}
        self._race: list[_Bid[T]] = []
        self._bids = 0
        self._heaped = 0
        for entry in entries:
            self.push(entry)

    def push(self, entry: Entry[T]) -> None:
        """One more."""
        lane = self._lanes.get(entry.tenant)
        if lane is None:
            lane = self._lanes[entry.tenant] = _Lane(entry.tenant)
            self._shares.enter(entry.tenant)
        lane.living += 1
        self._heaped += 1
        heappush(lane.heap, entry)
        if lane.heap[0] is entry:
            heappush(self._race, self._bid(lane))

    def first(self) -> Entry[T] | None:
        """The next; None where nothing waits."""
        race = self._race
        while race:
            bid = race[0]
            lane = bid.lane
            if lane.bid is not bid:
                heappop(race)
                continue
            head = self._head(lane)
            if head.sequence == bid.sequence and self._place(lane, head) == bid.primary:
                return head
            heapreplace(race, self._bid(lane))
        return None

    def removed(self, entry: Entry[T]) -> None:
        """It no longer counts."""
        lane = self._lanes[entry.tenant]
        lane.living -= 1
        if not lane.living:
            self._heaped -= len(lane.heap)
            # Its bids stay in the race until they come to the front: they must not keep alive what waited.
            lane.heap, lane.bid = [], None
            del self._lanes[lane.tenant]
            self._shares.leave(lane.tenant)
            if len(self._race) > 2 * len(self._lanes) + _SPARE_BIDS:
                self._race = [row.bid for row in self._lanes.values() if row.bid is not None]
                heapify(self._race)

    @property
    def heaped(self) -> int:
        """Entries in the heaps, those too that no longer count."""
        return self._heaped

    def in_order(self) -> Iterator[tuple[Entry[T], float]]:
        """The entries with the first part of their keys, leads added, found one by one; nothing may change meanwhile.

        A walk down the race and the heaps at once: each is a heap, and so is what is reached of them.
        """
        race, living = self._race, self._living
        floor_s = self._shares.floor_s
        number = 0
        # The place, a number that makes it unique, the lane and the index in its heap; without a lane, in the race.
        frontier: list[tuple[float, float, int, int, _Lane[T] | None, int]] = [
            (*bid[:3], number, None, 0) for bid in race[:1]
        ]
        while frontier:
            place, _, _, _, lane, at = heappop(frontier)
            if lane is None:
                bid = race[at]
                if bid.lane.bid is bid:
                    number += 1
                    heappush(frontier, self._step(bid.lane, 0, number))
                for child in range(2 * at + 1, min(2 * at + 3, len(race))):
                    number += 1
                    heappush(frontier, (*race[child][:3], number, None, child))
                continue
            for child in range(2 * at + 1, min(2 * at + 3, len(lane.heap))):
                number += 1
                heappush(frontier, self._step(lane, child, number))
            entry = lane.heap[at]
            if living.get(entry.item) is entry:
                yield entry, place - floor_s

    def _step(self, lane: _Lane[T], at: int, number: int) -> tuple[float, float, int, int, _Lane[T], int]:
        entry = lane.heap[at]
        return self._place(lane, entry), entry.secondary, entry.sequence, number, lane, at

    def _head(self, lane: _Lane[T]) -> Entry[T]:
        """The lane's first that counts; there is one."""
        heap, living = lane.heap, self._living
        while living.get(heap[0].item) is not heap[0]:
            heappop(heap)
            self._heaped -= 1
        return heap[0]

    def _place(self, lane: _Lane[T], entry: Entry[T]) -> float:
        return entry.primary + self._shares.offset_s(lane.tenant)

    def _bid(self, lane: _Lane[T]) -> _Bid[T]:
        head = lane.heap[0]
        self._bids += 1
        lane.bid = _Bid(self._place(lane, head), head.secondary, head.sequence, self._bids, lane)
        return lane.bid

    def compact(self) -> None:
        """Only what counts is kept."""
        for lane in self._lanes.values():
            lane.heap = [entry for entry in lane.heap if self._living.get(entry.item) is entry]
            heapify(lane.heap)
        self._heaped = len(self._living)
        self._race = [self._bid(lane) for lane in self._lanes.values()]
        heapify(self._race)

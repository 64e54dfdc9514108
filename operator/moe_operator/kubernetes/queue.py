"""A queue of resources to reconcile: each at most once in it and in one worker at a time, with backoff after failures.

The shape of client-go's rate-limited work queue, with the priorities of controller-runtime's: a change goes before what
is only looked at again, as all resources are from time to time. Owned by the operator's event loop.
"""

import asyncio
import heapq
import itertools
from typing import Generic, TypeVar

Item = TypeVar("Item")

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 120.0
# While both wait, one item in this number is from the background, so that endless changes do not keep it waiting.
SHARE = 4


class WorkQueue(Generic[Item]):
    """Items to work on, with a delay and a backoff for each.

    What was added goes first. In the background is what comes because time passes, and what `add_in_background` added.

    Args:
        most_background: items of the background that are in work at a time; None: as many as there are workers. A pass
            can wait for pods that do not answer, and a change is to find a worker all the same.
    """

    def __init__(self, most_background: int | None = None) -> None:
        self._most_background, self._in_background = most_background, set[Item]()
        self._ready: dict[Item, None] = {}
        self._background: dict[Item, None] = {}
        self._in_a_row = 0
        self._busy: set[Item] = set()
        # Items that come again once their worker is done, and whether in the background.
        self._again: dict[Item, bool] = {}
        self._failures: dict[Item, int] = {}
        self._later: list[tuple[float, int, Item]] = []
        self._due_s: dict[Item, float] = {}
        self._order = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._background)

    def add(self, item: Item) -> None:
        """Queues an item that changed, now, or once the worker that has it is done."""
        if item in self._busy:
            self._again[item] = False
            return
        self._background.pop(item, None)
        self._ready.setdefault(item)
        self._changed.set()

    def add_in_background(self, item: Item) -> None:
        """Queues an item that may be as it was, behind all that changed."""
        if item in self._busy:
            self._again.setdefault(item, True)
        elif item not in self._ready:
            self._background.setdefault(item)
            self._changed.set()

    def add_after(self, item: Item, delay_s: float) -> None:
        """Queues an item in the background after a delay, unless it is due sooner anyway."""
        due_s = asyncio.get_running_loop().time() + delay_s
        if self._due_s.get(item, float("inf")) <= due_s:
            return
        self._due_s[item] = due_s
        heapq.heappush(self._later, (due_s, next(self._order), item))
        self._changed.set()

    async def take(self) -> Item:
        """Waits for the next item; `done` or `failed` has to follow."""
        while True:
            wait_s = self._release_due()
            if self._ready or self._may_look():
                item = self._next()
                self._busy.add(item)
                return item
            self._changed.clear()
            try:
                # Not `wait_for`: in Python 3.11 it loses a cancellation that comes together with the event.
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, item: Item, *, again_after_s: float | None = None) -> None:
        """Ends the work on an item with success; it comes again after a time, or only by `add`."""
        self._failures.pop(item, None)
        self._finish(item)
        if again_after_s is not None:
            self.add_after(item, again_after_s)

    def failed(self, item: Item) -> float:
        """Ends the work on an item with a failure; returns the seconds after which it comes again."""
        failures = self._failures[item] = self._failures.get(item, 0) + 1
        self._finish(item)
        delay_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
        self.add_after(item, delay_s)
        return delay_s

    def _finish(self, item: Item) -> None:
        self._busy.discard(item)
        if item in self._in_background:
            self._in_background.discard(item)
            # Another of the background may have its turn.
            self._changed.set()
        if item in self._again:
            (self.add_in_background if self._again.pop(item) else self.add)(item)

    def _next(self) -> Item:
        """Takes the first item out: a changed one, and now and then one of the background."""
        may_look = self._may_look()
        is_change = bool(self._ready) and not (may_look and self._in_a_row >= SHARE - 1)
        self._in_a_row = self._in_a_row + 1 if is_change and may_look else 0
        waiting = self._ready if is_change else self._background
        item = next(iter(waiting))
        del waiting[item]
        if not is_change:
            self._in_background.add(item)
        return item

    def _may_look(self) -> bool:
        """Whether an item of the background waits and may be worked on now."""
        most = self._most_background
        return bool(self._background) and (most is None or len(self._in_background) < most)

    def _release_due(self) -> float | None:
        """Makes ready what is due; time until the next, None without one."""
        now_s = asyncio.get_running_loop().time()
        while self._later and self._later[0][0] <= now_s:
            due_s, _, item = heapq.heappop(self._later)
            # A sooner date has replaced this one, or it was used up.
            if self._due_s.get(item) == due_s:
                del self._due_s[item]
                self.add_in_background(item)
        return self._later[0][0] - now_s if self._later else None

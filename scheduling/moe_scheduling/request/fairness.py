"""What each tenant of a queue was served, and how far ahead of the others that puts it.

Made by `WaitingQueue` once a second tenant waits there. Virtual token counters (Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024), in the currency of the queue's order: a lead of so many tokens is the seconds that
waiting makes up for, so that it adds to the key of a request.

A lead is what a tenant was served more than the least served of those that wait, beyond a part of the horizon.

Invariants: a lead is at least 0 and at most the horizon; the counter of a tenant that waits never falls; nobody saves
up by idling, who comes back begins with the least counter of those that wait or with its own, whichever is greater; so
many tenants are remembered and no more. What orders the tenants never falls either: the race in `lanes.py` lives by it.
"""

from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace

# The tenant of requests that name none.
ANONYMOUS_TENANT = ""
# What a token of the answer counts, where one of the prompt counts 1: Sheng et al.
OUTPUT_WEIGHT = 2.0
REMEMBERED_TENANTS = 1024
# Part of the horizon by which a tenant may be ahead without a lead: equal tenants are by chance, and the order by size,
# which is worth more to all, stays as it is between them.
_BAND = 0.25
# Old entries that the search for the least may hold beyond as many as there are tenants that wait.
_SPARE_ENTRIES = 64


class TenantShares:
    """See the module.

    Args:
        ageing_rate: tokens that one second of lead is.
        horizon_s: the greatest lead.
    """

    __slots__ = ("_band", "_begin", "_floor", "_idle", "_least", "_rate", "_served", "_window")

    def __init__(self, ageing_rate: float, horizon_s: float) -> None:
        self._rate = ageing_rate
        self._window = horizon_s * ageing_rate
        self._band = self._window * _BAND
        # Tokens served: of those that wait, and of those that do not, the longest idle first.
        self._served: dict[str, float] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()
        # One entry for each that waits, with what it was served when the entry was made.
        self._least: list[tuple[float, str]] = []
        # The least of those that wait, as it last was, and what is no lead yet.
        self._begin = 0.0
        self._floor = self._band

    def enter(self, tenant: str) -> None:
        """From now on the tenant waits."""
        served = self._served[tenant] = max(self._idle.pop(tenant, 0.0), self._begin)
        heappush(self._least, (served, tenant))
        if len(self._least) > 2 * len(self._served) + _SPARE_ENTRIES:
            self._least = [(served, tenant) for tenant, served in self._served.items()]
            heapify(self._least)
        self._raise_floor()

    def leave(self, tenant: str) -> None:
        """Nothing of the tenant waits any more."""
        self._remember(tenant, self._served.pop(tenant))
        self._raise_floor()

    def charge(self, tenant: str, tokens: float) -> None:
        """The tenant was served so many tokens."""
        served = min(self._of(tenant) + tokens, self._floor + self._window)
        if tenant in self._served:
            self._served[tenant] = served
            self._raise_floor()
        else:
            self._remember(tenant, served)

    def offset_s(self, tenant: str) -> float:
        """What orders the tenants that wait: leads, all of them later by the same."""
        return max(self._floor, self._served[tenant]) / self._rate

    @property
    def floor_s(self) -> float:
        """The offset that is no lead."""
        return self._floor / self._rate

    def lag_s(self, tenant: str) -> float:
        """Seconds by which requests of the tenant, waiting or not, come later."""
        return max(0.0, self._of(tenant) - self._floor) / self._rate

    def _of(self, tenant: str) -> float:
        served = self._served.get(tenant)
        return max(self._idle.get(tenant, 0.0), self._begin) if served is None else served

    def _remember(self, tenant: str, served: float) -> None:
        self._idle[tenant] = served
        self._idle.move_to_end(tenant)
        if len(self._idle) > REMEMBERED_TENANTS:
            self._idle.popitem(last=False)

    def _raise_floor(self) -> None:
        least = self._least
        while least:
            served, tenant = least[0]
            now = self._served.get(tenant)
            if now == served:
                self._begin, self._floor = served, served + self._band
                return
            if now is None:
                heappop(least)
            else:
                heapreplace(least, (now, tenant))

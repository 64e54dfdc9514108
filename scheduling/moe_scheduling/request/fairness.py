"""Fairness between the tenants of a queue: how much service each has received, and by how much its requests lag.

Made by `WaitingQueue` once a second tenant waits there. These are virtual token counters (Sheng et al., "Fairness in
Serving Large Language Models", OSDI 2024) in the unit of the queue's keys: seconds of service, which are virtual time
that is added to the key of a request. How many tokens are a second, the queue knows.

    lag = max(0, served - min served of waiting tenants - 0.25 * horizon), at most horizon; all in seconds

Invariants: 0 <= lag <= horizon; the counter and the virtual time of a waiting tenant never fall (`TenantQueues` relies
on it); an idle tenant gains no credit: it comes back with the least counter of the waiting tenants, or with its own if
that is greater; at most `REMEMBERED_TENANTS` idle tenants are remembered.
"""

from bisect import bisect_left, insort
from collections import OrderedDict

# The tenant of requests that name none.
ANONYMOUS_TENANT = ""
REMEMBERED_TENANTS = 1024
# Seconds of virtual time for a second of an engine's prefill work: the ratio at which the tolerance was chosen, 8,000
# tokens a second on a modelled A100 that computes 22,400 (docs/adr/0015-tenants-lag-in-seconds.md).
VIRTUAL_S = 2.8
# Part of the horizon by which a tenant may be ahead without a lag. Equal tenants differ by chance that much, and the
# order by size, which shortens the mean wait of all, should hold between them.
_TOLERANCE = 0.25


class TenantCounters:
    """Counts the service of each tenant, which is virtual time.

    `enter`, `leave` and `charge` are O(log waiting tenants), the rest O(1).

    Args:
        horizon_s: the greatest lag, in seconds.
    """

    __slots__ = ("_base", "_by_served", "_horizon", "_idle", "_least", "_row_served", "_served", "_tolerance")

    def __init__(self, horizon_s: float) -> None:
        self._horizon = horizon_s
        self._tolerance = self._horizon * _TOLERANCE
        # Seconds of service: to waiting tenants, and to idle ones, the longest idle first.
        self._served: dict[str, float] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()
        # One row for each waiting tenant, ascending by its counter as of when the row was made; and these counters.
        self._by_served: list[tuple[float, str]] = []
        self._row_served: dict[str, float] = {}
        # The least counter of the waiting tenants, kept while none waits; and the counter up to which there is no lag.
        self._least = 0.0
        self._base = self._tolerance

    def enter(self, tenant: str) -> None:
        """Counts the tenant as waiting; it did not wait before."""
        served = self._served[tenant] = max(self._idle.pop(tenant, 0.0), self._least)
        self._add_row(tenant, served)
        self._update_least()

    def leave(self, tenant: str) -> None:
        """Counts the tenant as idle; it waited before."""
        served = self._served.pop(tenant)
        del self._by_served[bisect_left(self._by_served, (self._row_served.pop(tenant), tenant))]
        self._remember(tenant, served)
        self._update_least()

    def charge(self, tenant: str, service_s: float) -> None:
        """Adds seconds of service to the tenant, waiting or not, up to the counter that has the greatest lag."""
        served = min(self._counter(tenant) + service_s, self._base + self._horizon)
        if tenant in self._served:
            self._served[tenant] = served
            self._update_least()
        else:
            self._remember(tenant, served)

    def virtual_time_s(self, tenant: str) -> float:
        """Returns the virtual time of a waiting tenant, in seconds; its requests are ordered by key + virtual time."""
        return max(self._base, self._served[tenant])

    @property
    def base_s(self) -> float:
        """The virtual time of tenants without a lag, in seconds."""
        return self._base

    def lag_s(self, tenant: str) -> float:
        """Returns the seconds by which requests of the tenant, waiting or not, come later than their keys."""
        return min(self._horizon, max(0.0, self._counter(tenant) - self._base))

    def _counter(self, tenant: str) -> float:
        served = self._served.get(tenant)
        return max(self._idle.get(tenant, 0.0), self._least) if served is None else served

    def _remember(self, tenant: str, served: float) -> None:
        self._idle[tenant] = served
        self._idle.move_to_end(tenant)
        if len(self._idle) > REMEMBERED_TENANTS:
            self._idle.popitem(last=False)

    def _add_row(self, tenant: str, served: float) -> None:
        self._row_served[tenant] = served
        insort(self._by_served, (served, tenant))

    def _update_least(self) -> None:
        """Brings the first rows up to date. Counters never fall, so the first row that holds is the least counter."""
        while self._by_served:
            served, tenant = self._by_served[0]
            now = self._served[tenant]
            if now == served:
                self._least, self._base = served, served + self._tolerance
                return
            del self._by_served[0]
            self._add_row(tenant, now)

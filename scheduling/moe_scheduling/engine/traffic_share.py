"""How much of the engines' work is this gateway's own: several gateways share the engines, each with its own books.

A gateway sees what its peers sent only in what engines say, which is older than the choice. All of them choose by the
same rule from the same signals, so what the peers sent since is guessed to be where the own went, in proportion; else
each would fill the gap that all of them see. `books.py` does that, by the share that is estimated here for the
gateway's dispatcher a few times a second.

Counts of requests are compared, at the engines and in the own books, both averaged over `MEMORY_S`, because single
counts are of different moments. Reading a load by its age and by the others' arrivals goes back to Dahlin,
"Interpreting stale load information" (ICDCS 1999).

Invariants: the share is within `LEAST_SHARE` and 1; without fresh signals, and without requests, it goes to 1.
"""

import math
from collections.abc import Iterable

from moe_scheduling.engine.target_state import TargetState

MEMORY_S = 10.0
# An engine counts a request with several choices once for each. A share that is too small costs next to nothing, as
# long as it is not out of all proportion.
LEAST_SHARE = 1 / 8
# Requests that are taken to be the own before anything was seen: below so few, a count says nothing.
OWN_BEFORE = 1.0


class TrafficShare:
    """See the module."""

    __slots__ = ("_at_engines", "_observed_s", "_own")

    def __init__(self) -> None:
        self._at_engines = 0.0
        self._own = 0.0
        self._observed_s = -math.inf

    def observe(self, books: Iterable[TargetState], now_s: float, stale_after_s: float) -> float:
        """The own part of the requests that the engines have.

        Args:
            books: of all targets; those without a fresh signal say nothing.
            now_s: the time, not before that of the last call.
            stale_after_s: age at which a signal is no longer believed.
        """
        at_engines = own = 0
        for row in books:
            if row.signal is not None and row.is_fresh(now_s, stale_after_s):
                at_engines += row.signal.running + row.signal.waiting
                own += row.in_flight
        kept = math.exp(min(0.0, (self._observed_s - now_s) / MEMORY_S))
        self._at_engines += (1.0 - kept) * (at_engines - self._at_engines)
        self._own += (1.0 - kept) * (own - self._own)
        self._observed_s = now_s
        share = (self._own + OWN_BEFORE) / (self._at_engines + OWN_BEFORE)
        return min(1.0, max(LEAST_SHARE, share))

"""The part of the engines' requests that this gateway sends, where several gateways share the engines.

A gateway sees what its peers sent only in the engines' signals, which are older than the choice. All gateways choose by
the same rule from the same signals, so the requests that peers sent since a signal are assumed to have gone where its
own went, in proportion; without that all gateways would fill the same gap. `TargetState` applies the share, which the
gateway's dispatcher estimates here a few times a second.

The share compares counts of requests, at the engines and in flight from this gateway, both averaged over `MEMORY_S`,
because single counts are of different moments. To correct a load by its age and by the arrivals of others goes back to
Dahlin, "Interpreting Stale Load Information" (ICDCS 1999).

Invariants: the share is between `LEAST_SHARE` and 1; without fresh signals, or without requests, it goes to 1.
"""

import math
from collections.abc import Iterable

from moe_scheduling.engine.target_state import TargetState

# Time constant of the averages, in seconds.
MEMORY_S = 10.0
# An engine counts a request with several choices once for each, which makes the share too small. A small error costs
# next to nothing; this bounds it.
LEAST_SHARE = 1 / 8
# Requests that are assumed to be this gateway's own before any was seen: below such counts a ratio means little.
OWN_BEFORE = 1.0


class TrafficShare:
    """Estimates the gateway's traffic share from signals and in-flight counts."""

    __slots__ = ("_at_engines", "_observed_s", "_own")

    def __init__(self) -> None:
        self._at_engines = 0.0
        self._own = 0.0
        self._observed_s = -math.inf

    def observe(self, states: Iterable[TargetState], now_s: float, stale_after_s: float) -> float:
        """Takes the present counts into account and returns the share.

        Args:
            states: of all targets; those without a fresh signal are skipped.
            now_s: the time, not before that of the last call.
            stale_after_s: age from which a signal is ignored.
        """
        at_engines = own = 0
        for state in states:
            if state.signal is not None and state.is_fresh(now_s, stale_after_s):
                at_engines += state.signal.running + state.signal.waiting
                own += state.in_flight
        kept = math.exp(min(0.0, (self._observed_s - now_s) / MEMORY_S))
        self._at_engines += (1.0 - kept) * (at_engines - self._at_engines)
        self._own += (1.0 - kept) * (own - self._own)
        self._observed_s = now_s
        share = (self._own + OWN_BEFORE) / (self._at_engines + OWN_BEFORE)
        return min(1.0, max(LEAST_SHARE, share))

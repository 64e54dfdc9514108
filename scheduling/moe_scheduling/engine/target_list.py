"""The books of all targets, and which of a large fleet a choice looks at.

Made by the gateway's dispatcher whenever its targets change, O(targets); read by `engine.py`.

To look at each of a thousand engines takes a millisecond. A request is better off at the best of a few drawn at random
than at random by far, and at the best of all hardly more (Mitzenmacher, "The power of two choices in randomized load
balancing", 2001). What a draw cannot find is looked at besides: who holds the prompt's beginning, and the session's
last target. So a choice costs `SAMPLE + HOLDERS + 1` predictions at most, however many engines there are.

Invariants: the sample depends on the arguments alone; its drawn targets are all different; over the turns each target
is drawn about as often as any other.
"""

from collections.abc import Iterable
from itertools import islice
from math import gcd

from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import Target

# Up to so many, all are looked at.
LARGE_FLEET = 64
SAMPLE = 24
HOLDERS = 8
# Knuth's multiplicative hash: the golden ratio of 64 bits, which spreads numbers that follow one another.
_SPREAD = 0x9E3779B97F4A7C15
_BITS = 0xFFFFFFFFFFFFFFFF


class TargetList(tuple[TargetState, ...]):
    """Books in an order that stays. See the module."""

    def __new__(cls, books: Iterable[TargetState] = ()) -> "TargetList":
        """Takes the books of all targets."""
        return super().__new__(cls, books)

    def __init__(self, _books: Iterable[TargetState] = ()) -> None:
        self._by_target = {row.target: row for row in self}
        # A stride that shares no factor with the count meets each target once before any twice.
        self._strides = [stride for stride in range(1, len(self)) if gcd(stride, len(self)) == 1]

    def sample(self, cached: Iterable[Target], session: Target | None, turn: int) -> list[TargetState]:
        """The books to look at in this turn; of a roster of more than `SAMPLE`.

        Args:
            cached: who holds a part of the prompt; of many, `HOLDERS` are taken, others in each turn.
            session: the session's last target.
            turn: a number that rises by one with each request.
        """
        count, strides = len(self), self._strides
        mixed = (turn * _SPREAD & _BITS) >> 16
        first, stride = mixed % count, strides[mixed // count % len(strides)]
        looked_at = [self[at % count] for at in range(first, first + SAMPLE * stride, stride)]
        holders = list(cached)
        if len(holders) > HOLDERS:
            begin = mixed % (len(holders) - HOLDERS + 1)
            holders = list(islice(holders, begin, begin + HOLDERS))
        if session is not None:
            holders.append(session)
        by_target = self._by_target
        # One that was drawn as well is looked at twice, which changes nothing.
        looked_at += [by_target[target] for target in holders if target in by_target]
        return looked_at

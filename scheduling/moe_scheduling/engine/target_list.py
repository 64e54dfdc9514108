"""The states of all targets, and the sample of a large fleet that a choice compares.

Made by the gateway's dispatcher whenever its targets change, O(targets); read by `choice.py`.

To compare a thousand targets takes a millisecond for each request. The best of d targets drawn at random is nearly as
good as the best of all (power-of-d sampling: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
2001). Targets that a draw would miss and that matter are added: those that hold the prefix of the prompt, and the last
target of the session. So a choice costs at most `SAMPLE + HOLDERS + 1` predictions.

Invariants: the sample depends on the arguments alone; its drawn targets are distinct; over many turns each target is
drawn about equally often.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from math import gcd

from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import Target

# Up to this number of targets, all are compared.
LARGE_FLEET = 64
# Targets that are drawn, the d of power-of-d.
SAMPLE = 24
# Most targets that are added because they hold a prefix of the prompt.
HOLDERS = 8
# Knuth's multiplicative hash: the golden ratio of 64 bits, which spreads consecutive numbers.
_SPREAD = 0x9E3779B97F4A7C15
_BITS = 0xFFFFFFFFFFFFFFFF


class TargetList(tuple[TargetState, ...]):
    """An immutable sequence of target states in a stable order, which can be sampled.

    Args:
        states: the states of all targets.
    """

    def __new__(cls, states: Iterable[TargetState] = ()) -> "TargetList":
        """Returns a list of these states."""
        return super().__new__(cls, states)

    def __init__(self, _states: Iterable[TargetState] = ()) -> None:
        self._by_target = {state.target: state for state in self}
        # A stride that shares no factor with the count meets each target once before any twice.
        self._strides = [stride for stride in range(1, len(self)) if gcd(stride, len(self)) == 1]

    def sample(self, cached: Iterable[Target], session: Target | None, turn: int) -> list[TargetState]:
        """Returns the states to compare in this turn; the list has more than `SAMPLE`.

        A drawn target that is added as well occurs twice, which changes no choice.

        Args:
            cached: the targets that hold a prefix of the prompt; of many, `HOLDERS` are taken, others in each turn.
            session: the session's last target; None without one.
            turn: a number that rises by one with each request.
        """
        count, strides = len(self), self._strides
        mixed = (turn * _SPREAD & _BITS) >> 16
        first, stride = mixed % count, strides[mixed // count % len(strides)]
        sample = [self[at % count] for at in range(first, first + SAMPLE * stride, stride)]
        holders = list(cached)
        if len(holders) > HOLDERS:
            begin = mixed % (len(holders) - HOLDERS + 1)
            holders = list(islice(holders, begin, begin + HOLDERS))
        if session is not None:
            holders.append(session)
        by_target = self._by_target
        sample += [by_target[target] for target in holders if target in by_target]
        return sample


def draw(states: Sequence[TargetState], turn: int) -> list[TargetState]:
    """Returns `SAMPLE` distinct states, others in each turn; where there are no more all, each first in its turn.

    Args:
        states: in a stable order.
        turn: a number that rises by one with each request.
    """
    count = len(states)
    if count <= SAMPLE:
        start = turn % max(1, count)
        return [*states[start:], *states[:start]]
    mixed = (turn * _SPREAD & _BITS) >> 16
    # A stride that shares no factor with the count meets each state once before any twice.
    stride = mixed // count % (count - 1) + 1
    while gcd(stride, count) != 1:
        stride += 1
    first = mixed % count
    return [states[at % count] for at in range(first, first + SAMPLE * stride, stride)]

"""WeightedRoundRobin of the requests by weight: which group of engines is next, such as a stable revision and a canary.

Smooth weighted round robin, as nginx has it since 1.3.1 (Igor Sysoev): each turn adds to every group's credit its
weight, the group with the most credit is next, and pays the sum of the weights. Used by the gateway's dispatcher.

Invariants: the answer depends on the calls alone; over as many turns as the sum of the weights, each group that was
there all the time gets exactly its weight, spread evenly; a group of weight 0 gets none; what a group missed while it
was not there is not made up for later.
"""

from collections.abc import Collection, Mapping


class WeightedRoundRobin:
    """See the module.

    Args:
        weights: of each group, at least 0.
    """

    __slots__ = ("_credits", "_weights")

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._credits = dict.fromkeys(weights, 0)

    def weight(self, group: str) -> int:
        """The group's weight; 0 for one that is not known."""
        return self._weights.get(group, 0)

    def order(self, present: Collection[str]) -> list[str]:
        """The groups that may get the next request, the one whose turn it is first; changes nothing."""
        weights, credits = self._weights, self._credits
        groups = [group for group in weights if group in present and weights[group] > 0]
        return sorted(groups, key=lambda group: -(credits[group] + weights[group]))

    def take(self, present: Collection[str]) -> None:
        """The turn of the first in `order` is over, whoever got the request."""
        groups = self.order(present)
        if not groups:
            return
        credits = self._credits
        for group in groups:
            credits[group] += self._weights[group]
        credits[groups[0]] -= sum(self._weights[group] for group in groups)
        # Who is not there neither saves up nor owes.
        for group in credits.keys() - set(groups):
            credits[group] = 0

"""Smooth weighted round robin over groups of engines, such as a stable revision and a canary.

The algorithm of nginx since 1.3.1 (Igor Sysoev): in each turn every group's credit grows by its weight; the group with
the most credit gets the request and pays the sum of the weights. Used by the gateway's dispatcher.

Invariants: the result depends on the calls alone; in as many turns as the sum of the weights, each group that was
present throughout gets exactly its weight, evenly spread; a group of weight 0 gets nothing; turns that a group missed
while absent are not made up for.
"""

from collections.abc import Collection, Mapping


class WeightedRoundRobin:
    """Orders groups for the next request by their weights and by the requests that they got.

    Args:
        weights: of each group, at least 0.
    """

    __slots__ = ("_credits", "_weights")

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._credits = dict.fromkeys(weights, 0)

    def weight(self, group: str) -> int:
        """Returns the weight of a group; 0 for an unknown one."""
        return self._weights.get(group, 0)

    def order(self, present: Collection[str]) -> list[str]:
        """Returns the present groups that may get the next request, the preferred first. Changes nothing."""
        weights, credits = self._weights, self._credits
        groups = [group for group in weights if group in present and weights[group] > 0]
        return sorted(groups, key=lambda group: -(credits[group] + weights[group]))

    def take(self, present: Collection[str]) -> None:
        """Ends the turn of the first group in `order`, whichever group got the request."""
        groups = self.order(present)
        if not groups:
            return
        credits = self._credits
        for group in groups:
            credits[group] += self._weights[group]
        credits[groups[0]] -= sum(self._weights[group] for group in groups)
        # An absent group neither saves up nor owes turns.
        for group in credits.keys() - set(groups):
            credits[group] = 0

"""Placements that decisions brought about since the last answer of the planner, for the account that it keeps.

Owned by the controller. What a person changes is no doing of the decisions, and clears them.
"""

from moe_agent.experts.planning import Slots


class Spells:
    """See the module."""

    def __init__(self) -> None:
        self._begun: list[tuple[Slots, int]] = []

    def note(self, placement: Slots, step: int) -> None:
        """A placement that came in force at `step`."""
        self._begun.append((placement.copy(), step))

    def until(self, step: int) -> tuple[tuple[Slots, int], ...]:
        """Each with the steps that it was in force, the last one until `step`."""
        ends = [*(begun for _, begun in self._begun[1:]), step]
        return tuple((placement, end - begun) for (placement, begun), end in zip(self._begun, ends, strict=False))

    def forget(self, count: int) -> None:
        """The oldest so many are booked; what came after the question is told with the next one."""
        del self._begun[:count]

    def clear(self) -> None:
        """A person changed the placement."""
        self._begun.clear()

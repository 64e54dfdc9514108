"""Which group of engines a request goes to: groups take turns by their weights. Owned by the dispatcher.

A group is the engines behind one Service. There are groups only where engines are discovered.
"""

from collections.abc import Callable, Collection, Iterable, Iterator

from moe_contract.gateway_config import Group
from moe_scheduling.engine.choice import Decision, Refuse, RefuseReason, Send
from moe_scheduling.engine.target_list import TargetList
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.weighted_round_robin import WeightedRoundRobin

ChooseIn = Callable[[TargetList, int], Decision]
"""Chooses among the targets of one group, in its turn of this number."""


class GroupRotation:
    """The groups, their weights and whose turn it is.

    Args:
        groups: names and weights.
        first_turn: another number for each gateway, so that several do not choose alike.
    """

    def __init__(self, groups: Collection[Group], *, first_turn: int) -> None:
        self._first_turn = first_turn
        self._targets: dict[str, TargetList] = {}
        self._turns: dict[str, int] = {}
        self.set_weights(groups)

    def set_weights(self, groups: Collection[Group]) -> None:
        """Replaces the groups and their weights; the rotation begins anew."""
        self._weights = WeightedRoundRobin({group.service: group.weight for group in groups})

    def set_targets(self, group_by_state: Iterable[tuple[str, TargetState]]) -> None:
        """The targets of each group."""
        groups: dict[str, list[TargetState]] = {}
        for group, state in group_by_state:
            groups.setdefault(group, []).append(state)
        self._targets = {group: TargetList(states) for group, states in groups.items()}

    def open_targets(self) -> Iterator[TargetState]:
        """The targets of the groups that have a weight."""
        return (state for group, states in self._targets.items() if self._weights.weight(group) > 0 for state in states)

    def choose(self, choose_in: ChooseIn, session_group: str | None) -> Decision:
        """Asks the groups in the order of their turns until one can take the job.

        Args:
            choose_in: the choice within a group.
            session_group: the group of the session's last target, asked first, which costs it no turn.
        """
        present = [group for group, states in self._targets.items() if any(state.accepting for state in states)]
        order = self._weights.order(present)
        if session_group is not None and session_group in order:
            return self._ask([session_group, *(group for group in order if group != session_group)], choose_in)
        decision = self._ask(order, choose_in)
        if isinstance(decision, Send):
            self._weights.take(present)
        return decision

    def _ask(self, order: list[str], choose_in: ChooseIn) -> Decision:
        first: Decision | None = None
        for group in order:
            # Turns of its own: those of all requests would meet the same engine each time that it is the group's turn.
            turn = self._turns.get(group, self._first_turn)
            decision = choose_in(self._targets[group], turn)
            if isinstance(decision, Send):
                self._turns[group] = turn + 1
                return decision
            first = first or decision
        return first or Refuse(RefuseReason.NO_ENGINE)

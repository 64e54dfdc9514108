"""Prefill states that the ranks of a simulated group exchange; a real group uses shared-memory records.

Only schedulers that can join a group take part: ours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_tools.simulator.rank import Rank

if TYPE_CHECKING:
    from moe_agent.shared_memory.prefill_record import PrefillState


def share_prefills(ranks: Sequence[Rank]) -> None:
    """Connects the ranks of a group, if there is more than one."""
    states: dict[int, PrefillState] = {}
    if len(ranks) > 1:
        for number, rank in enumerate(ranks):
            if hasattr(rank.scheduler, "join"):
                rank.scheduler.join(_SharedPrefills(number, states))


class _SharedPrefills:
    """The exchange as one rank sees it: the `PrefillGroup` of `moe_agent.vllm.prefill_group`."""

    def __init__(self, number: int, states: dict[int, "PrefillState"]) -> None:
        self._number = number
        self._states = states

    def publish(self, state: "PrefillState") -> None:
        self._states[self._number] = state

    def others(self, now_s: float) -> Sequence["PrefillState"]:
        from moe_agent.vllm.prefill_group import IDLE_AFTER_S

        return [
            state
            for number, state in self._states.items()
            if number != self._number and now_s - state.written_s <= IDLE_AFTER_S
        ]

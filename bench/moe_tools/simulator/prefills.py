"""What the ranks of a group tell one another about their prefills, where a real group has pages in a shared folder.

Only schedulers that can join a group take part: ours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_tools.simulator.rank import Rank

if TYPE_CHECKING:
    from moe_agent.shared_memory.prefill_record import PrefillState


def share_prefills(ranks: Sequence[Rank]) -> None:
    """Lets the ranks of a group know of one another."""
    told: dict[int, PrefillState] = {}
    if len(ranks) > 1:
        for number, rank in enumerate(ranks):
            if hasattr(rank.scheduler, "join"):
                rank.scheduler.join(_SharedPrefills(number, told))


class _SharedPrefills:
    """The board as one rank sees it."""

    def __init__(self, number: int, told: dict[int, "PrefillState"]) -> None:
        self._number = number
        self._told = told

    def publish(self, state: "PrefillState") -> None:
        self._told[self._number] = state

    def others(self, now_s: float) -> Sequence["PrefillState"]:
        from moe_agent.vllm.prefill_group import IDLE_AFTER_S

        return [
            state
            for number, state in self._told.items()
            if number != self._number and now_s - state.written_s <= IDLE_AFTER_S
        ]

"""Which data-parallel rank keeps its group from going on, by what the ranks published and by their processes. Pure.

The ranks of a group step together: while one does not go on, all others wait for it in their next step. A rank whose
process has ended or is suspended, or that has not begun the step in which the others are, is the one they wait for.
Where all have begun the same step, or the turns are not known, each rank with requests and without a step is named.
While no rank with requests waits for a step, only the processes are judged: a group without requests owes none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from moe_contract.agent_state import RankTrouble

SILENT_S = 3.0
"""Seconds without a step that count as none being made, where steps are short."""

SLOWEST_STEPS = 3.0
"""This number of the slowest recent steps is added: an engine with long steps is not one that stands still."""

_HALF_LIFE_S = 300.0


class ProcessLife(Enum):
    """What the system says of a process."""

    RUNS = auto()
    SUSPENDED = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSight:
    """The observation of one rank.

    Attributes:
        life: of its process, and of the workers below it where it makes no step.
        idle: whether it has published that it has no request.
        warm: whether it has made enough steps for its slowest one to be known. The first steps of an engine may
            compile for minutes.
        written_s: when it published last, on the monotonic clock of the machine.
        turn: number of the step that it began last, in a count that all ranks share; None where it publishes none.
        entered_s: when it began that step.
        slowest_step_s: seconds of its slowest recent step.
    """

    life: ProcessLife = ProcessLife.RUNS
    idle: bool = True
    warm: bool = True
    written_s: float = 0.0
    turn: int | None = None
    entered_s: float = 0.0
    slowest_step_s: float = 0.0


def judge_ranks(sights: Mapping[int, RankSight], now_s: float) -> dict[int, RankTrouble]:
    """The ranks that keep the group from going on, each with its trouble; empty while all is well."""
    found = {rank: _TROUBLES[sight.life] for rank, sight in sights.items() if sight.life is not ProcessLife.RUNS}
    if found or not any(sight.warm for sight in sights.values()):
        return found
    patience_s = SILENT_S + SLOWEST_STEPS * max(sight.slowest_step_s for sight in sights.values())
    waiting = [
        rank for rank, sight in sights.items() if sight.warm and not sight.idle and now_s - sight.written_s > patience_s
    ]
    if not waiting:
        # The turns of an idle group differ: after its last step a rank may begin one more to clear what has ended.
        return {}
    behind = _behind(sights, now_s - patience_s)
    return dict.fromkeys(behind, RankTrouble.BEHIND) or dict.fromkeys(waiting, RankTrouble.SILENT)


_TROUBLES = {ProcessLife.ENDED: RankTrouble.ENDED, ProcessLife.SUSPENDED: RankTrouble.SUSPENDED}


def _behind(sights: Mapping[int, RankSight], before_s: float) -> list[int]:
    """The ranks that have not begun the step which another one began before this time, and still is in."""
    turns = {rank: sight.turn for rank, sight in sights.items() if sight.turn is not None}
    newest = max(turns.values(), default=0)
    if all(sights[rank].entered_s >= before_s for rank, turn in turns.items() if turn == newest):
        return []
    return [rank for rank, turn in turns.items() if turn < newest]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPace:
    """The slowest recent step of a rank, from records that are looked at now and then.

    Attributes:
        slowest_s: seconds of the slowest step; it halves in five minutes, so that one long step is forgotten.
        step: number of the last step that was seen.
        written_s: when that was published.
        idle: whether the rank had no request then, so that the time since is none of a step.
    """

    slowest_s: float = 0.0
    step: int = 0
    written_s: float = 0.0
    idle: bool = True

    def observe(self, step: int, written_s: float, *, idle: bool) -> Self:
        """The pace after a record with these values."""
        slowest_s = self.slowest_s
        if step > self.step and written_s > self.written_s > 0.0:
            gap_s = written_s - self.written_s
            slowest_s *= 0.5 ** (gap_s / _HALF_LIFE_S)
            if not self.idle:
                slowest_s = max(slowest_s, gap_s / (step - self.step))
        return type(self)(slowest_s=slowest_s, step=step, written_s=written_s, idle=idle)

"""What an expert group's controller asks a planner, and what it is answered; decisions are made aside.

A step must not wait for a decision, so `Planner.ask` returns at once, and the answer is polled for at later beats.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from moe_scheduling.expert.decision import ExpertSettings
from numpy.typing import NDArray

from moe_agent.experts.directive import GroupShape
from moe_agent.experts.window import Floats

Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, as measured so far: of expert work a token, of traffic a token and direction, of one expert moved."""

    token_s: float
    remote_token_s: float
    internode_token_s: float
    move_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a planner is asked.

    Attributes:
        tokens, pairs: the load a step, of a window of `steps`.
        placement: in force, of this `version`.
        shape: of the group.
        costs: as measured so far.
        settings: in force.
        horizon_steps: until the next decision.
        spells: placements that decisions brought about since the last answer, each with the steps it was in force; also
            what was taken back since, and what a move came to that ended half-way.
    """

    tokens: Floats
    pairs: Floats | None
    steps: float
    placement: Slots
    shape: GroupShape
    version: int
    costs: Costs
    settings: ExpertSettings
    horizon_steps: int
    spells: tuple[tuple[Slots, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a planner answers.

    Attributes:
        pays: whether to move.
        kept_by: in one word, why nothing is to move; empty where it pays.
        reason: why, or why not, in a sentence.
        placement: the candidate, also where it does not pay.
        gain_s: seconds a step that it would save.
        cost_s: seconds that moving takes.
        balance_before, balance_after: max / mean over ranks.
        seconds: that the decision took.
    """

    pays: bool
    kept_by: str
    reason: str
    placement: Slots
    gain_s: float
    cost_s: float
    balance_before: float
    balance_after: float
    seconds: float


class Planner(Protocol):
    """Decides aside: `ask` returns at once, `poll` has the answer later, once."""

    def ask(self, question: Question) -> None: ...

    def poll(self) -> Answer | Exception | None: ...

"""What an expert group's controller decided and what came of it: the lines that people read, and the sums of all time.

Owned by the controller. Invariant: only the newest line carries its placement, which is megabytes for a large model.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from moe_agent.experts.outcome import Outcome
from moe_agent.experts.planning import Slots

KEPT_DECISIONS = 20


@dataclass(slots=True, kw_only=True)
class Decision:
    """One line of the log that people read."""

    number: int
    step: int
    made_s: float
    outcome: Outcome
    reason: str
    placement: Slots | None = None
    moves: int = 0
    predicted_gain_s: float | None = None
    measured_gain_s: float | None = None
    cost_s: float = 0.0
    balance_before: float = 1.0
    balance_after: float = 1.0
    seconds: float = 0.0


@dataclass(slots=True)
class Totals:
    """Since the engine started."""

    moves: int = 0
    lost_s: float = 0.0
    won_s: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    stayed: Counter[str] = field(default_factory=Counter)


class DecisionLog:
    """See the module.

    Attributes:
        rows: the last decisions, the newest first.
        totals: of all.
    """

    def __init__(self) -> None:
        self.rows: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.totals = Totals()
        self._number = 0
        self._gain_s, self._won_at = 0.0, 0

    def add(self, step: int, now_s: float, outcome: Outcome, reason: str, **figures: Any) -> Decision:
        """One more line, made at `step`, `now_s` on the machine's monotonic clock."""
        self._number += 1
        decision = Decision(number=self._number, step=step, made_s=now_s, outcome=outcome, reason=reason, **figures)
        for older in self.rows:
            older.placement = None
        self.rows.appendleft(decision)
        self.totals.decisions[outcome.value] += 1
        return decision

    def count_won(self, step: int) -> None:
        """Books what the present placement has won until `step`."""
        self.totals.won_s += self._gain_s * (step - self._won_at)
        self._won_at = step

    def begin_gain(self, step: int, gain_s: float) -> None:
        """From `step` on a step takes `gain_s` less, as measured; 0: nothing is known of the placement."""
        self.count_won(step)
        self._gain_s = gain_s

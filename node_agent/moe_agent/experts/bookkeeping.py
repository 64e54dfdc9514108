"""Bookkeeping of an expert group's moves: decisions with their results, gains and costs, the trial under way, alarms.

Owned by the controller. A decision is a line for people; its predicted gain is replaced by a measured one after the
trial: steps of the same load before and after the move. The regret bound (`moe_scheduling.expert.regret_bound`)
compares all placements since the beginning with that of the beginning, and limits what further decisions may lose.

Invariant: only the newest decision keeps its placement, which has megabytes in a large model.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from moe_scheduling.expert.decision import ExpertCosts, ExpertLoad, Placement, RegretBound

from moe_agent.experts.load import Slots
from moe_agent.experts.step_times import Gain, Samples, compare_step_times

KEPT_DECISIONS = 20
# Intervals without a decision after which the group reports it as a problem.
SILENT_INTERVALS = 3
_MAX_BACKOFF = 5
# Times that a trial is prolonged while the difference is within the noise.
_MAX_PROLONGED = 3


class DecisionOutcome(StrEnum):
    """Result of a decision; also a metric label."""

    MOVED = "moved"
    STAYED = "stayed"
    DRY_RUN = "dryRun"
    ROLLED_BACK = "rolledBack"
    APPLIED = "applied"
    FAILED = "failed"


class ProblemKind(StrEnum):
    """Kinds of problem that a group reports; also a metric label."""

    NO_DECISION = "no_decision"
    SLOW_MOVE = "slow_move"
    VERSION_SKEW = "version_skew"
    BACKOFF = "backoff"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionEntry:
    """One line of the log of decisions; a later finding replaces it (`Bookkeeping.amend`).

    Attributes:
        number: 1 for the first.
        step: step in which it was made.
        made_s: monotonic clock at that time.
        outcome: its result.
        reason: a sentence.
        placement: [layer, slot], the candidate; kept for the newest decision only.
        moves: experts that it moves to other ranks.
        predicted_gain_s: seconds a step; None where nothing was predicted.
        measured_gain_s: seconds a step; None before the trial has ended.
        cost_s: seconds that moving takes, or took.
        balance_before: tokens of the busiest rank over the mean.
        balance_after: the same with the candidate.
        seconds: duration of the decision.
    """

    number: int
    step: int
    made_s: float
    outcome: DecisionOutcome
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
class MoveTotals:
    """Sums since the engine started.

    Attributes:
        moves: experts moved.
        lost_s: seconds that moving took.
        won_s: seconds gained by moves, as measured.
        decisions: decisions by outcome.
        stayed: decisions not to move by reason.
    """

    moves: int = 0
    lost_s: float = 0.0
    won_s: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    stayed: Counter[str] = field(default_factory=Counter)

    def copy(self) -> "MoveTotals":
        """Returns the present sums, which no later decision changes."""
        return MoveTotals(self.moves, self.lost_s, self.won_s, self.decisions.copy(), self.stayed.copy())


@dataclass(slots=True, kw_only=True)
class Trial:
    """A placement whose gain is being measured.

    Attributes:
        decision: number of the decision that it measures.
        before: step times before the move.
        until: step at which it is judged.
        judged: whether the move is rolled back if it gains nothing.
        prolongable: times that it may still be prolonged.
    """

    decision: int
    before: Samples
    until: int
    judged: bool
    prolongable: int = _MAX_PROLONGED


class Bookkeeping:
    """Decisions, totals, the trial under way and the regret of one expert group.

    Attributes:
        rows: the last decisions, the newest first.
        totals: sums since the engine started.
        trial: the measurement under way.
        failures: moves in a row that gained nothing or failed; each doubles the interval between decisions.
        regret: gains and costs since the beginning; None: the placement in force is the beginning.
        accounted_at: step until which `regret` is accounted.
        skew: which ranks hold another placement than the coordinator; empty where none does.
    """

    def __init__(self) -> None:
        self.rows: deque[DecisionEntry] = deque(maxlen=KEPT_DECISIONS)
        self.totals = MoveTotals()
        self.trial: Trial | None = None
        self.failures = 0
        self.regret: RegretBound | None = None
        self.accounted_at = 0
        self.skew = ""
        self._slow_move = ""
        self._number = 0
        self._gain_s, self._won_at = 0.0, 0

    # 1. Decisions.

    def add(self, step: int, now_s: float, outcome: DecisionOutcome, reason: str, **fields: Any) -> DecisionEntry:
        """Adds a decision made at `step`, `now_s` on the monotonic clock; `fields` are those of `DecisionEntry`."""
        self._number += 1
        decision = DecisionEntry(number=self._number, step=step, made_s=now_s, outcome=outcome, reason=reason, **fields)
        if self.rows:
            self.rows[0] = replace(self.rows[0], placement=None)
        self.rows.appendleft(decision)
        self.totals.decisions[outcome.value] += 1
        return decision

    def amend(self, number: int, change: Callable[[DecisionEntry], DecisionEntry]) -> None:
        """Replaces the decision of this number by `change(decision)`; does nothing where it is no longer kept."""
        for at, row in enumerate(self.rows):
            if row.number == number:
                self.rows[at] = change(row)
                return

    def append_reason(self, number: int, text: str) -> None:
        """Adds a clause to the reason of the decision of this number."""
        self.amend(number, lambda row: replace(row, reason=f"{row.reason}; {text}"))

    # 2. Gains, as measured.

    def count_won(self, step: int) -> None:
        """Adds what the placement in force has gained until `step` to the totals."""
        self.totals.won_s += self._gain_s * (step - self._won_at)
        self._won_at = step

    def begin_gain(self, step: int, gain_s: float) -> None:
        """Sets the measured gain of the placement in force from `step` on; 0: not known."""
        self.count_won(step)
        self._gain_s = gain_s

    def judge_trial(self, after: Samples, step: int, more_steps: int) -> Gain | None:
        """Ends the trial and returns the measured gain; None while it goes on, or where nothing can be compared.

        Args:
            after: step times since the move.
            step: number of the present step.
            more_steps: steps by which it is prolonged while the difference is within the noise.
        """
        trial = self.trial
        assert trial is not None
        gain = compare_step_times(trial.before, after)
        if gain is not None and not gain.is_clear and trial.prolongable:
            trial.prolongable -= 1
            trial.until = step + more_steps
            return None
        self.trial = None
        if gain is None:
            self.append_reason(trial.decision, "not measured: no steps of the same load before and after")
            return None
        measured_s = gain.mean_s
        self.amend(trial.decision, lambda row: replace(row, measured_gain_s=measured_s))
        return gain

    def move_failed(self) -> None:
        """Notes a move that gained nothing or could not be made: the next decision comes later."""
        self.failures = min(_MAX_BACKOFF, self.failures + 1)

    def move_gained(self) -> None:
        """Ends the back-off: a move gained something, or a person changed the mode."""
        self.failures = 0

    # 3. The regret bound.

    def account_steps(self, load: ExpertLoad, placement: Placement, costs: ExpertCosts, step: int) -> None:
        """Accounts the steps until `step` with the placement in force, before it changes."""
        if self.regret is not None:
            self.regret = self.regret.add_steps(load, placement, costs, step - self.accounted_at)
        self.accounted_at = step

    def account_move(self, seconds: float, step: int, *, own: bool) -> None:
        """Accounts a move that ended at `step`; the placement that a person chose is a new beginning."""
        if not own:
            self.regret = None
        elif self.regret is not None:
            self.regret = self.regret.add_moves(seconds)
        self.accounted_at = step

    # 4. Problems.

    def move_begins(self) -> None:
        """Forgets the slow steps of older moves."""
        self._slow_move = ""

    def note_stall(self, seconds: float, bound_s: float, moves: int, layers: int) -> None:
        """Notes the time that a move added to a step, where it exceeds the bound."""
        if seconds > bound_s:
            what = f"{moves} experts of {layers} layers delayed a step"
            self._slow_move = f"{what} by {seconds:.3f} s, bound {bound_s:g} s"

    def compare_placements(self, checksums: Sequence[int], wanted: int, version: int) -> None:
        """Compares the checksum of each rank's placement with that of the placement that all should hold."""
        strays = [str(rank) for rank, checksum in enumerate(checksums) if checksum != wanted]
        self.skew = f"ranks {', '.join(strays)} hold another placement than {version}" if strays else ""

    def list_problems(self, silent_steps: int, interval_steps: int) -> list[tuple[ProblemKind, str]]:
        """Returns the present problems; `silent_steps` since the last decision, 0 where none is due."""
        found = []
        if self.failures:
            factor = 2**self.failures
            found.append((ProblemKind.BACKOFF, f"the last moves won nothing; the interval is {factor} times as long"))
        if self._slow_move:
            found.append((ProblemKind.SLOW_MOVE, self._slow_move))
        if self.skew:
            found.append((ProblemKind.VERSION_SKEW, self.skew))
        if silent_steps > SILENT_INTERVALS * interval_steps:
            found.append((ProblemKind.NO_DECISION, f"no decision for {silent_steps} steps"))
        return found


def explain_loss(gain: Gain) -> str:
    """Returns the sentence why a move is rolled back."""
    lost_us, error_us = -gain.mean_s * 1e6, gain.error_s * 1e6
    what = "nothing won" if gain.is_clear else "no gain shown"
    return f"{what}: a step of the same load takes {lost_us:.0f} us longer (error {error_us:.0f} us)"

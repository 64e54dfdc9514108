"""The mind of an expert group, on its first rank: what all ranks do at this beat, and why. A state machine, no I/O.

The worker of the first rank asks it at each beat (`beat`), and tells it what came of the last one (`gathered`, `moved`)
and how long steps take (`step_took`). Decisions are made aside, by a `Planner`, because a step must not wait for one.

A round: gather counts -> plan -> move a few layers at each step -> measure -> keep, or take back and back off.

Invariants: at most one placement is under way; what a beat says is true of the placement that all ranks hold; the mode
`off` starts nothing; a placement under way is carried to its end whatever the mode becomes, because a layer that was
moved is as good as one that was not, but two halves of a plan are not what anybody weighed.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from moe_scheduling.expert import Balance, ExpertMode, ExpertSettings
from numpy.typing import NDArray

from moe_agent.experts.directive import Directive, DirectiveAction, GroupShape
from moe_agent.experts.figures import count_moves_by_layer, measure_balance
from moe_agent.experts.outcome import Outcome, ProblemKind
from moe_agent.experts.protocol import Action, Beat
from moe_agent.experts.recording import Counted
from moe_agent.experts.step_times import Gain, LoadClass, Samples, StepTimes, compare_step_times
from moe_agent.experts.window import Floats, LoadWindow

Slots = NDArray[np.int64]

# Passes between two beats while nothing is under way: a mode is in force after at most so many.
BEAT_PASSES = 8
# Passes between two looks at the counts; a decision gathers anew in any case.
GATHER_PASSES = 64
KEPT_DECISIONS = 20
# Intervals without a decision after which the watchdog speaks.
SILENT_INTERVALS = 3
_MOST_BACKOFF = 5
# How often the time is prolonged in which a move is measured, while the difference is within the noise.
_MOST_LONGER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, as measured so far: of expert work a token, of traffic a token and direction, of one expert moved."""

    token_s: float
    remote_token_s: float
    internode_token_s: float
    move_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a planner is asked: load a step, the placement in force, costs and settings, steps until the next time."""

    tokens: Floats
    pairs: Floats | None
    steps: float
    placement: Slots
    shape: GroupShape
    version: int
    costs: Costs
    settings: ExpertSettings
    horizon_steps: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank answers to a gather: its counts, and the checksum of the placement that it holds."""

    counted: Counted
    checksum: int


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


@dataclass(slots=True, kw_only=True)
class _Move:
    """A placement under way."""

    target: Slots
    layers: deque[int]
    decision: Decision
    judged: bool
    before: Samples


@dataclass(slots=True, kw_only=True)
class _Trial:
    """A placement whose worth is being measured."""

    decision: Decision
    before: Samples
    until: int
    judged: bool
    longer: int = _MOST_LONGER


@dataclass(slots=True)
class Totals:
    """Since the engine started."""

    moves: int = 0
    lost_s: float = 0.0
    won_s: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)
    stayed: Counter[str] = field(default_factory=Counter)


class Controller:
    """See the module.

    Args:
        shape: of the group.
        placement: `[layer, slot]` that all ranks hold at the start.
        costs: as of now; `move_s` is replaced by what moves take.
        planner: decides.
        checksum: of a placement, as each rank makes it of its own.
        sharing: ranks in a row that count the same tokens; of each such row the first one counts.
    """

    def __init__(
        self,
        shape: GroupShape,
        placement: Slots,
        costs: Costs,
        planner: Planner,
        checksum: Callable[[Slots], int],
        sharing: int = 1,
    ) -> None:
        self.shape, self.placement, self.version = shape, placement.copy(), 1
        self.costs, self.settings = costs, ExpertSettings(mode=ExpertMode.OFF)
        self.window = LoadWindow(shape.ranks // sharing, shape.layers, shape.experts)
        self.balance = self._measure(self.placement)
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)
        self.totals = Totals()
        self.heard = self.directive = self.step = self.revision = 0
        self._planner, self._checksum, self._sharing = planner, checksum, sharing
        self._asked: Question | None = None
        self._plan_wanted = False
        self._pending: Directive | None = None
        self._previous: Slots | None = None
        self._move: _Move | None = None
        self._moving: tuple[int, ...] = ()
        self._trial: _Trial | None = None
        self._times = StepTimes()
        self._gathered_at = self._decided_at = self._won_at = 0
        self._now_s = 0.0
        self._gain_s = 0.0
        self._failures = 0
        self._number = 0
        self._config_version = 0
        self._recording = False
        self._slow_move = self._skew = ""

    # 1. What comes in.

    def configure(self, config_version: int, settings: ExpertSettings) -> None:
        """Settings in force from the next beat on."""
        if settings.mode is not self.settings.mode:
            self._enter_mode(settings.mode)
        self.settings, self._config_version = settings, config_version
        self.revision += 1

    def _enter_mode(self, mode: ExpertMode) -> None:
        self._failures = 0
        self._decided_at = self.step
        if self._trial is not None:
            # What is decided by itself is taken back by itself in `active` alone.
            self._trial.judged = False
        if mode is ExpertMode.OFF:
            self.window.clear()
            self.balance = self._measure(self.placement)
            self._times.clear()
            self._trial, self._pending, self._plan_wanted = None, None, False
            self._keep_score(0.0)

    def direct(self, directive: Directive) -> None:
        """A person's word; the newest one counts."""
        self.heard = directive.version
        if self.settings.mode is ExpertMode.OFF:
            self._log(Outcome.FAILED, f"directive {directive.version} came in the mode off")
        elif directive.action is DirectiveAction.PLAN:
            self._plan_wanted = True
        else:
            self._pending = directive

    def skip_directives(self, version: int) -> None:
        """Directives up to this version are old, or cannot be followed."""
        self.heard = self.directive = version

    def learn_work(self, token_s: float) -> None:
        """What a token of expert work takes, as measured so far."""
        self.costs = replace(self.costs, token_s=token_s)

    def step_took(self, kind: LoadClass, step_s: float) -> None:
        """A step of a class of load, and how long it took on this rank."""
        if self._move is None and self.settings.mode is not ExpertMode.OFF:
            self._times.add(kind, step_s, self.step)

    def gathered(self, reports: Sequence[Report]) -> None:
        """What all ranks counted since the last gather."""
        steps, self._gathered_at = self.step - self._gathered_at, self.step
        sources = [report.counted for report in reports[:: self._sharing]]
        self.window.add(sources, max(1, steps), self.settings.window_steps)
        self.balance = self._measure(self.placement)
        self._check_skew(reports)
        if self._wants_plan():
            self._ask()

    def moved(self, seconds: float, ok: bool) -> None:
        """What came of the move of the last beat: how long it held up the step, and whether all ranks could do it."""
        move, layers = self._move, list(self._moving)
        assert move is not None
        if not ok:
            self._abandon(move)
            return
        moves = sum(self._count_moves(move.target)[layer] for layer in layers)
        self.placement[layers] = move.target[layers]
        self.totals.moves += moves
        self.totals.lost_s += seconds
        move.decision.cost_s += seconds
        self._learn_move(seconds, moves)
        if not move.layers:
            self._end_move(move)

    # 2. What goes out.

    def beat(self, step: int, now_s: float) -> Beat:
        """What all ranks do now, `step` passes after the start."""
        self.step, self._now_s = step, now_s
        self._switch_recording()
        self._keep_score(self._gain_s)
        self._take_answer()
        self._judge_trial()
        if self._move is None:
            self._begin_pending()
        self._settle_directive()
        if self._move is not None:
            return self._beat_move(self._move)
        if self._gathers():
            return self._beat(Action.GATHER)
        return self._beat(Action.NONE)

    def _settle_directive(self) -> None:
        """A directive is dealt with when what it asked for has ended, and when nothing came of it."""
        is_under_way = self._plan_wanted or any(each is not None for each in (self._pending, self._asked, self._move))
        if self.directive != self.heard and not is_under_way:
            self.directive = self.heard
            self.revision += 1

    def _switch_recording(self) -> None:
        """Ranks begin to count with the beat that says so, and what they count stands for the steps since."""
        on = self.settings.mode is not ExpertMode.OFF
        if on and not self._recording:
            self._gathered_at = self.step
        self._recording = on

    def move_rows(self) -> tuple[tuple[int, ...], Slots]:
        """Layers that the last beat moves, and their rows `[layer, slot]`."""
        assert self._move is not None
        return self._moving, self._move.target[list(self._moving)]

    def problems(self) -> list[tuple[ProblemKind, str]]:
        """What the watchdog finds."""
        found = []
        if self._failures:
            factor = 2**self._failures
            found.append((ProblemKind.BACKOFF, f"the last moves won nothing; the interval is {factor} times as long"))
        if self._slow_move:
            found.append((ProblemKind.SLOW_MOVE, self._slow_move))
        if self._skew:
            found.append((ProblemKind.VERSION_SKEW, self._skew))
        silent = self.step - self._decided_at
        if self._decides() and silent > SILENT_INTERVALS * self._interval():
            found.append((ProblemKind.NO_DECISION, f"no decision for {silent} steps"))
        return found

    def _beat(self, action: Action, next_in: int = BEAT_PASSES, layers: int = 0, version: int | None = None) -> Beat:
        return Beat(
            next_in=next_in,
            action=action,
            recording=self._recording,
            config_version=self._config_version,
            version=self.version if version is None else version,
            layers=layers,
            balance=self.balance.mean,
            pressures=tuple(self.balance.by_rank.tolist()),
        )

    # 3. Deciding.

    def _decides(self) -> bool:
        return self.settings.mode in (ExpertMode.DRY_RUN, ExpertMode.ACTIVE)

    def _interval(self) -> int:
        return self.settings.interval_steps << self._failures

    def _gathers(self) -> bool:
        if self.settings.mode is ExpertMode.OFF:
            return False
        since = self.step - self._gathered_at
        return since >= min(GATHER_PASSES, self.settings.interval_steps) or (since > 0 and self._wants_plan())

    def _wants_plan(self) -> bool:
        """Whether to decide now; while a placement is on trial only a person can ask for it."""
        if self._asked is not None or self._move is not None or self._skew or self.settings.mode is ExpertMode.OFF:
            return False
        due = self._decides() and self._trial is None and self.step - self._decided_at >= self._interval()
        return self._plan_wanted or due

    def _ask(self) -> None:
        self._plan_wanted = False
        self._asked = Question(
            tokens=self.window.tokens_a_step(),
            pairs=self.window.pairs_a_step(),
            steps=self.window.steps,
            placement=self.placement.copy(),
            shape=self.shape,
            version=self.version,
            costs=self.costs,
            settings=self.settings,
            horizon_steps=self.settings.interval_steps,
        )
        self._planner.ask(self._asked)

    def _take_answer(self) -> None:
        if self._asked is None or (answer := self._planner.poll()) is None:
            return
        asked, self._asked, self._decided_at = self._asked, None, self.step
        if isinstance(answer, Exception):
            self._log(Outcome.FAILED, f"the decision failed: {answer}")
            return
        outcome = Outcome.STAYED if not answer.pays else Outcome.DRY_RUN
        if answer.kept_by:
            self.totals.stayed[answer.kept_by] += 1
        moves = sum(count_moves_by_layer(asked.placement, answer.placement, self.shape))
        acts = answer.pays and self.settings.mode is ExpertMode.ACTIVE and self._move is None
        if acts and asked.version != self.version:
            self._log(Outcome.FAILED, f"decided for placement {asked.version}, which is no more in force")
            return
        decision = self._log(
            Outcome.MOVED if acts else outcome,
            answer.reason,
            placement=answer.placement,
            moves=moves,
            predicted_gain_s=answer.gain_s,
            cost_s=0.0 if acts else answer.cost_s,
            balance_before=answer.balance_before,
            balance_after=answer.balance_after,
            seconds=answer.seconds,
        )
        if acts:
            self._begin_move(answer.placement, decision, judged=True)

    def _log(self, outcome: Outcome, reason: str, **figures: Any) -> Decision:
        self._number += 1
        self.revision += 1
        decision = Decision(
            number=self._number, step=self.step, made_s=self._now_s, outcome=outcome, reason=reason, **figures
        )
        for older in self.decisions:
            older.placement = None
        self.decisions.appendleft(decision)
        self.totals.decisions[outcome.value] += 1
        return decision

    # 4. Moving.

    def _begin_pending(self) -> None:
        directive, self._pending = self._pending, None
        if directive is None:
            return
        if directive.action is DirectiveAction.ROLLBACK and self._previous is None:
            self._log(Outcome.FAILED, "no move to take back")
        elif directive.action is DirectiveAction.ROLLBACK:
            self._change_by_hand(self._previous, Outcome.ROLLED_BACK, f"asked for by directive {directive.version}")
        else:
            target = np.array(directive.physical_to_logical, np.int64)
            self._change_by_hand(target, Outcome.APPLIED, f"asked for by directive {directive.version}")

    def _change_by_hand(self, target: Slots | None, outcome: Outcome, reason: str) -> None:
        assert target is not None
        decision = self._log(
            outcome,
            reason,
            placement=target,
            moves=sum(self._count_moves(target)),
            balance_before=self.balance.mean,
            balance_after=self._measure(target).mean,
        )
        self._begin_move(target, decision, judged=False)

    def _begin_move(self, target: Slots, decision: Decision, *, judged: bool) -> None:
        changed = np.flatnonzero((target != self.placement).any(axis=1))
        self._trial = None
        self._keep_score(0.0)
        if not changed.size:
            return
        layers = deque(int(layer) for layer in changed)
        before = self._times.since(self.step - self._trial_steps())
        self._slow_move = ""
        self._previous = self.placement.copy()
        self._move = _Move(target=target, layers=layers, decision=decision, judged=judged, before=before)

    def _beat_move(self, move: _Move) -> Beat:
        """As many layers as fit into the bound on one step, at least one."""
        layer_s = [self.costs.move_s * max(1, moves) for moves in self._count_moves(move.target)]
        chosen = [move.layers.popleft()]
        left_s = self.settings.max_stall_s - layer_s[chosen[0]]
        while move.layers and layer_s[move.layers[0]] <= left_s:
            left_s -= layer_s[move.layers[0]]
            chosen.append(move.layers.popleft())
        self._moving = tuple(chosen)
        version = self.version if move.layers else self.version + 1
        return self._beat(Action.MOVE, next_in=1, layers=len(chosen), version=version)

    def _count_moves(self, target: Slots) -> list[int]:
        return count_moves_by_layer(self.placement, target, self.shape)

    def _measure(self, placement: Slots) -> Balance:
        return measure_balance(self.window.tokens_a_step(), placement, self.shape)

    def _learn_move(self, seconds: float, moves: int) -> None:
        self.costs = replace(self.costs, move_s=0.5 * (self.costs.move_s + seconds / max(1, moves)))
        bound_s = self.settings.max_stall_s
        if seconds > bound_s:
            what = f"{moves} experts of {len(self._moving)} layers held up a step"
            self._slow_move = f"{what} by {seconds:.3f} s, bound {bound_s:g} s"

    def _end_move(self, move: _Move) -> None:
        self._move, self._moving = None, ()
        self.version += 1
        self.revision += 1
        self.balance = self._measure(self.placement)
        self._times.clear()
        if move.decision.outcome is not Outcome.ROLLED_BACK and self.settings.mode is not ExpertMode.OFF:
            until = self.step + self._trial_steps()
            self._trial = _Trial(decision=move.decision, before=move.before, until=until, judged=move.judged)
        self._decided_at = max(self._decided_at, self.step)

    def _abandon(self, move: _Move) -> None:
        """A rank said that it cannot; none has moved anything of this beat."""
        self._move, self._moving = None, ()
        move.decision.outcome = Outcome.FAILED
        move.decision.reason += "; a rank could not take part, and nothing more was moved"
        self.version += 1
        self.revision += 1
        self._times.clear()
        self._failures = min(_MOST_BACKOFF, self._failures + 1)

    # 5. Measuring.

    def _trial_steps(self) -> int:
        """Steps on either side of a move that are compared, if it comes to a clear difference."""
        return max(1, min(self.settings.window_steps, self.settings.interval_steps // 2))

    def _judge_trial(self) -> None:
        trial = self._trial
        if trial is None or self.step < trial.until or self._move is not None:
            return
        gain = compare_step_times(trial.before, self._times.since(0))
        if gain is not None and not gain.is_clear and trial.longer:
            trial.longer -= 1
            trial.until = self.step + self._trial_steps()
            return
        self._trial = None
        self.revision += 1
        if gain is None:
            trial.decision.reason += "; not measured: no steps of the same load before and after"
            return
        trial.decision.measured_gain_s = gain.mean_s
        if not trial.judged:
            return
        if gain.mean_s > 0.0:
            self._failures = 0
            self._keep_score(gain.mean_s)
        else:
            self._take_back(gain)

    def _take_back(self, gain: Gain) -> None:
        """Nothing is won: back to the placement before, and a longer pause."""
        self._failures = min(_MOST_BACKOFF, self._failures + 1)
        lost_us, error_us = -gain.mean_s * 1e6, gain.error_s * 1e6
        what = "nothing won" if gain.is_clear else "no gain shown"
        reason = f"{what}: a step of the same load takes {lost_us:.0f} us longer (error {error_us:.0f} us)"
        self._change_by_hand(self._previous, Outcome.ROLLED_BACK, reason)

    def _keep_score(self, gain_s: float) -> None:
        """Books what the present placement won since the last time, and goes on with `gain_s` a step."""
        self.totals.won_s += self._gain_s * (self.step - self._won_at)
        self._gain_s, self._won_at = gain_s, self.step

    def _check_skew(self, reports: Sequence[Report]) -> None:
        wanted = self._checksum(self.placement)
        strays = [str(rank) for rank, report in enumerate(reports) if report.checksum != wanted]
        self._skew = f"ranks {', '.join(strays)} hold another placement than {self.version}" if strays else ""

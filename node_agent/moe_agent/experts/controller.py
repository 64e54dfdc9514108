"""The mind of an expert group, on its first rank: what all ranks do at this beat, and why. A state machine, no I/O.

The worker of the first rank asks it at each beat (`beat`), and tells it what came of the last one (`gathered`, `moved`)
and how long steps take (`step_took`). Decisions are made aside, by a `Planner`, because a step must not wait for one.

A round: gather counts -> plan -> move a few layers at each step -> measure -> keep, or take back and back off.

Invariants: at most one placement is under way; what a beat says is true of the placement that all ranks hold; the mode
`off` starts nothing, and nothing starts while ranks hold different placements, but each directive ends; a placement
under way is carried to its end whatever the mode becomes, because a layer that was moved is as good as one that was
not, but two halves of a plan are not what anybody weighed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from moe_scheduling.expert.decision import Balance, ExpertMode, ExpertSettings

from moe_agent.experts.decision_log import Decision, DecisionLog
from moe_agent.experts.directive import Directive, DirectiveAction, GroupShape
from moe_agent.experts.figures import count_moves_by_layer, measure_balance
from moe_agent.experts.inbox import Inbox
from moe_agent.experts.outcome import Outcome, ProblemKind
from moe_agent.experts.planning import Costs, Planner, Question, Slots
from moe_agent.experts.protocol import Action, Beat
from moe_agent.experts.recording import Report
from moe_agent.experts.relocation import Relocation, changed_layers
from moe_agent.experts.spells import Spells
from moe_agent.experts.step_times import Gain, LoadClass, StepTimes
from moe_agent.experts.trial import Prolonged, Trial, Unmeasured, explain_loss
from moe_agent.experts.watchdog import Watchdog
from moe_agent.experts.window import LoadWindow

# Passes between two beats while nothing is under way: a mode is in force after at most so many.
BEAT_PASSES = 8
# Passes between two looks at the counts; a decision gathers anew in any case.
GATHER_PASSES = 64


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
        self.log, self.inbox = DecisionLog(), Inbox()
        self.step = self.revision = 0
        self._planner, self._checksum, self._sharing = planner, checksum, sharing
        self._watchdog = Watchdog()
        self._asked: Question | None = None
        self._previous: Slots | None = None
        self._move: Relocation | None = None
        self._trial: Trial | None = None
        self._times = StepTimes()
        self._spells = Spells()
        self._gathered_at = self._decided_at = 0
        self._now_s = 0.0
        self._config_version = 0
        self._recording = False

    # 1. What comes in.

    def configure(self, config_version: int, settings: ExpertSettings) -> None:
        """Settings in force from the next beat on."""
        if settings.mode is not self.settings.mode:
            self._enter_mode(settings.mode)
        self.settings, self._config_version = settings, config_version
        self.revision += 1

    def _enter_mode(self, mode: ExpertMode) -> None:
        self._watchdog.move_paid()
        self._decided_at = self.step
        if self._trial is not None:
            # What is decided by itself is taken back by itself in `active` alone.
            self._trial.judged = False
        if mode is ExpertMode.OFF:
            self.window.clear()
            self.balance = self._measure(self.placement)
            self._times.clear()
            self._trial = None
            self._refuse_waiting("the mode is off")
            self.log.begin_gain(self.step, 0.0)

    def direct(self, directive: Directive) -> None:
        """A person's word; the newest one counts."""
        self.inbox.heard = directive.version
        if self.settings.mode is ExpertMode.OFF:
            self._log(Outcome.FAILED, f"directive {directive.version} came in the mode off")
        else:
            self.inbox.put(directive)

    def refuse(self, version: int, why: str) -> None:
        """A directive that cannot be read; what came before it goes on."""
        self.inbox.heard = version
        self._log(Outcome.FAILED, f"directive {version} cannot be followed: {why}")

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
        checksums = [report.checksum for report in reports]
        self._watchdog.compare_placements(checksums, self._checksum(self.placement), self.version)
        self._refuse_skewed()
        if self._wants_plan():
            self._ask()

    def _refuse_skewed(self) -> None:
        """Where ranks hold different placements a move would mix up weights."""
        if self._watchdog.skew:
            self._refuse_waiting(f"{self._watchdog.skew}; only a restart of the engine helps")

    def _refuse_waiting(self, why: str) -> None:
        """What waits does not begin any more; who asked for it is told so."""
        if self.inbox.plan_wanted or self.inbox.waiting is not None:
            self.inbox.clear()
            self._log(Outcome.FAILED, f"directive {self.inbox.heard} cannot be followed: {why}")

    def moved(self, seconds: float, ok: bool) -> None:
        """What came of the move of the last beat: how long it held up the step, and whether all ranks could do it."""
        move = self._move
        assert move is not None
        layers = list(move.moving)
        if not ok:
            self._abandon(move)
            return
        moves = sum(self._count_moves(move.target)[layer] for layer in layers)
        self.placement[layers] = move.target[layers]
        self.log.totals.moves += moves
        self.log.totals.lost_s += seconds
        move.decision.cost_s += seconds
        self._learn_move(seconds, moves, len(layers))
        if not move.layers:
            self._end_move(move)

    # 2. What goes out.

    def beat(self, step: int, now_s: float) -> Beat:
        """What all ranks do now, `step` passes after the start."""
        self.step, self._now_s = step, now_s
        self._switch_recording()
        self.log.count_won(step)
        self._take_answer()
        if self._watchdog.skew:
            self._refuse_skewed()
        else:
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
        if self._asked is None and self._move is None and self.inbox.settle():
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
        return self._move.rows()

    def problems(self) -> list[tuple[ProblemKind, str]]:
        """What the watchdog finds."""
        silent_steps = self.step - self._decided_at if self._decides() else 0
        return self._watchdog.list_problems(silent_steps, self._interval())

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
        return self.settings.interval_steps << self._watchdog.failures

    def _gathers(self) -> bool:
        if self.settings.mode is ExpertMode.OFF:
            return False
        since = self.step - self._gathered_at
        return since >= min(GATHER_PASSES, self.settings.interval_steps) or (since > 0 and self._wants_plan())

    def _wants_plan(self) -> bool:
        """Whether to decide now; while a placement is on trial only a person can ask for it."""
        if self._asked is not None or self._move is not None or self._watchdog.skew:
            return False
        if self.settings.mode is ExpertMode.OFF:
            return False
        due = self._decides() and self._trial is None and self.step - self._decided_at >= self._interval()
        return self.inbox.plan_wanted or due

    def _ask(self) -> None:
        self.inbox.plan_wanted = False
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
            spells=self._spells.until(self.step),
        )
        self._planner.ask(self._asked)

    def _take_answer(self) -> None:
        if self._asked is None or (answer := self._planner.poll()) is None:
            return
        asked, self._asked, self._decided_at = self._asked, None, self.step
        if isinstance(answer, Exception):
            self._log(Outcome.FAILED, f"the decision failed: {answer}")
            return
        self._spells.forget(len(asked.spells))
        outcome = Outcome.STAYED if not answer.pays else Outcome.DRY_RUN
        if answer.kept_by:
            self.log.totals.stayed[answer.kept_by] += 1
        moves = sum(count_moves_by_layer(asked.placement, answer.placement, self.shape))
        acts = answer.pays and self.settings.mode is ExpertMode.ACTIVE and self._move is None
        if acts and self._watchdog.skew:
            self._log(Outcome.FAILED, self._watchdog.skew)
            return
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
            self._begin_move(answer.placement, decision, own=True, judged=True)

    def _log(self, outcome: Outcome, reason: str, **figures: Any) -> Decision:
        self.revision += 1
        return self.log.add(self.step, self._now_s, outcome, reason, **figures)

    # 4. Moving.

    def _begin_pending(self) -> None:
        directive = self.inbox.take()
        if directive is None:
            return
        if directive.action is DirectiveAction.ROLLBACK and self._previous is None:
            self._log(Outcome.FAILED, "no move to take back")
        elif directive.action is DirectiveAction.ROLLBACK:
            self._change(self._previous, Outcome.ROLLED_BACK, f"asked for by directive {directive.version}", own=False)
        else:
            target = np.array(directive.physical_to_logical, np.int64)
            self._change(target, Outcome.APPLIED, f"asked for by directive {directive.version}", own=False)

    def _change(self, target: Slots | None, outcome: Outcome, reason: str, *, own: bool) -> None:
        assert target is not None
        decision = self._log(
            outcome,
            reason,
            placement=target,
            moves=sum(self._count_moves(target)),
            balance_before=self.balance.mean,
            balance_after=self._measure(target).mean,
        )
        self._begin_move(target, decision, own=own, judged=False)

    def _begin_move(self, target: Slots, decision: Decision, *, own: bool, judged: bool) -> None:
        layers = changed_layers(self.placement, target)
        self._trial = None
        self.log.begin_gain(self.step, 0.0)
        if not layers:
            return
        before = self._times.since(self.step - self._trial_steps())
        self._watchdog.move_begins()
        self._previous = self.placement.copy()
        self._move = Relocation(target=target, layers=layers, decision=decision, own=own, judged=judged, before=before)

    def _beat_move(self, move: Relocation) -> Beat:
        chosen = move.take_layers(self._count_moves(move.target), self.costs.move_s, self.settings.max_stall_s)
        version = self.version if move.layers else self.version + 1
        return self._beat(Action.MOVE, next_in=1, layers=len(chosen), version=version)

    def _count_moves(self, target: Slots) -> list[int]:
        return count_moves_by_layer(self.placement, target, self.shape)

    def _measure(self, placement: Slots) -> Balance:
        return measure_balance(self.window.tokens_a_step(), placement, self.shape)

    def _learn_move(self, seconds: float, moves: int, layers: int) -> None:
        self.costs = replace(self.costs, move_s=0.5 * (self.costs.move_s + seconds / max(1, moves)))
        self._watchdog.step_held_up(seconds, self.settings.max_stall_s, moves, layers)

    def _end_move(self, move: Relocation) -> None:
        self._move = None
        self._note_spell(move)
        self.version += 1
        self.revision += 1
        self.balance = self._measure(self.placement)
        self._times.clear()
        if move.decision.outcome is not Outcome.ROLLED_BACK and self.settings.mode is not ExpertMode.OFF:
            until = self.step + self._trial_steps()
            self._trial = Trial(decision=move.decision, before=move.before, until=until, judged=move.judged)
        self._decided_at = max(self._decided_at, self.step)

    def _abandon(self, move: Relocation) -> None:
        """A rank said that it cannot; none has moved anything of this beat."""
        self._move = None
        self._note_spell(move)
        move.decision.outcome = Outcome.FAILED
        move.decision.reason += "; a rank could not take part, and nothing more was moved"
        self.version += 1
        self.revision += 1
        self._times.clear()
        self._watchdog.move_failed()

    def _note_spell(self, move: Relocation) -> None:
        if move.own:
            self._spells.note(self.placement, self.step)
        else:
            self._spells.clear()

    # 5. Measuring.

    def _trial_steps(self) -> int:
        """Steps on either side of a move that are compared, if it comes to a clear difference."""
        return max(1, min(self.settings.window_steps, self.settings.interval_steps // 2))

    def _judge_trial(self) -> None:
        trial = self._trial
        if trial is None or self.step < trial.until or self._move is not None:
            return
        verdict = trial.judge(self._times.since(0), self.step, self._trial_steps())
        if isinstance(verdict, Prolonged):
            return
        self._trial = None
        self.revision += 1
        if isinstance(verdict, Unmeasured):
            trial.decision.reason += "; not measured: no steps of the same load before and after"
            return
        trial.decision.measured_gain_s = verdict.mean_s
        if trial.judged:
            self._act_on(verdict)

    def _act_on(self, gain: Gain) -> None:
        """What won something stays; else back to the placement before, and a longer pause."""
        if gain.mean_s > 0.0:
            self._watchdog.move_paid()
            self.log.begin_gain(self.step, gain.mean_s)
            return
        self._watchdog.move_failed()
        self._change(self._previous, Outcome.ROLLED_BACK, explain_loss(gain), own=True)

"""The controller of an expert group, on its first rank: what all ranks do at a sync round, and why. No I/O.

The worker of the first rank calls `sync_round` in each round, then `gathered` or `moved` with the result, and
`step_took` after each step. Decisions are computed outside the step by a `Planner`.

The state machine: gather counts -> plan -> move a few layers in each step -> measure -> keep, or roll back and back
off.

Invariants: at most one placement is under way; a round is true of the placement that all ranks hold; the mode `off`
starts nothing, and nothing starts while ranks hold different placements, but each directive ends; a placement under way
is completed whatever the mode becomes, because each moved layer is valid by itself, but half of a plan was never
evaluated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moe_contract.experts_state import FIRST_PLACEMENT, AffinityPart
from moe_scheduling.expert.decision import Balance, ExpertMode, ExpertSettings
from moe_scheduling.expert.gpu_priors import WorkCosts

from moe_agent.experts.bookkeeping import Bookkeeping, DecisionEntry, DecisionOutcome, ProblemKind, Trial, explain_loss
from moe_agent.experts.directive import Directive, DirectiveAction, GroupShape, PendingDirective
from moe_agent.experts.load import (
    LoadWindow,
    RankLoadReport,
    Slots,
    count_moves_by_layer,
    make_load,
    make_placement,
    measure_balance,
)
from moe_agent.experts.planning import MeasuredCosts, Planner, PlanRequest
from moe_agent.experts.step_sizes import StepSizeWindow
from moe_agent.experts.step_times import Gain, StepTimes
from moe_agent.experts.sync_round import Relocation, RoundAction, SyncRound, changed_layers

# Passes between two sync rounds while nothing is under way: an eighth of the decision interval within these bounds. A
# mode is in force, and a directive is begun, after at most this many passes.
MIN_SYNC_PASSES, MAX_SYNC_PASSES = 8, 64
# Fewer, not below the least, where they would take longer: whoever changes settings waits for the next round.
MAX_SYNC_S = 2.0
# Passes between two gathers of the counts; a decision gathers in any case.
GATHER_PASSES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gather:
    """The gather under way: the step in which it was asked for, with the placement that ranks should then hold."""

    step: int
    checksum: int
    version: int


class Controller:
    """The state machine of an expert group.

    Args:
        shape: sizes of the group.
        placement: [layer, slot], the placement that all ranks hold at the start.
        costs: estimated costs; `move_s` is replaced by measurements.
        planner: computes decisions.
        checksum: checksum of a placement, as each rank computes that of its own.
        sharing: consecutive ranks that count the same tokens; the first of them reports.
    """

    def __init__(
        self,
        shape: GroupShape,
        placement: Slots,
        costs: MeasuredCosts,
        planner: Planner,
        checksum: Callable[[Slots], int],
        sharing: int = 1,
    ) -> None:
        self.shape, self.placement, self.version = shape, placement.copy(), FIRST_PLACEMENT
        self.costs, self.settings = costs, ExpertSettings(mode=ExpertMode.OFF)
        self.window = LoadWindow(shape.ranks // sharing, shape.layers, shape.experts)
        self.balance = self._measure(self.placement)
        self.bookkeeping, self.pending = Bookkeeping(), PendingDirective()
        self.step = self.revision = self.affinity_version = 0
        # Set by the coordinator, which counts it.
        self.affinity: AffinityPart | None = None
        self._planner, self._checksum, self._sharing = planner, checksum, sharing
        self._asked: PlanRequest | None = None
        self._previous: Slots | None = None
        self._move: Relocation | None = None
        self._gather: _Gather | None = None
        self._times = StepTimes()
        self.sizes = StepSizeWindow()
        self.gathered_at = self._decided_at = 0
        self._now_s = self._pass_s = 0.0
        self._config_version = 0
        self._recording = False

    # 1. Input.

    def configure(self, config_version: int, settings: ExpertSettings) -> None:
        """Takes settings, in force from the next sync round on."""
        if settings.mode is not self.settings.mode:
            self._enter_mode(settings.mode)
        self.settings, self._config_version = settings, config_version
        self.revision += 1

    def _enter_mode(self, mode: ExpertMode) -> None:
        self.bookkeeping.move_gained()
        self._decided_at = self.step
        if self.bookkeeping.trial is not None:
            # Only in `active` moves are rolled back without a person.
            self.bookkeeping.trial.judged = False
        if mode is ExpertMode.OFF:
            self.window.clear()
            self.sizes.clear()
            self.balance = self._measure(self.placement)
            self._times.clear()
            self.bookkeeping.trial = None
            self._refuse_pending("the mode is off")
            self.bookkeeping.begin_gain(self.step, 0.0)

    def direct(self, directive: Directive) -> None:
        """Takes a directive; the newest one counts."""
        self.pending.received = directive.version
        if self.settings.mode is ExpertMode.OFF:
            self._log(DecisionOutcome.FAILED, f"directive {directive.version} came in the mode off")
        elif directive.action is DirectiveAction.AFFINITY:
            self.affinity_version = directive.version
        else:
            self.pending.add(directive)

    def refuse(self, version: int, why: str) -> None:
        """Refuses a directive that cannot be read; an older one continues."""
        self.pending.received = version
        self._log(DecisionOutcome.FAILED, f"directive {version} cannot be followed: {why}")

    def learn_work(self, work: WorkCosts) -> None:
        """Takes the costs of expert work as measured so far."""
        self.costs = replace(self.costs, token_s=work.token_s, expert_s=work.expert_s)

    def step_took(self, step: int, tokens: int, most_tokens: int, step_s: float) -> None:
        """Takes the duration of step `step`, which carried `tokens` over all ranks and `most_tokens` on one."""
        if self.settings.mode is ExpertMode.OFF:
            return
        self.sizes.add(tokens)
        if self._move is None:
            self._times.add(step, tokens, most_tokens, step_s)

    def gathered(self, reports: Sequence[RankLoadReport]) -> None:
        """Takes what all ranks report in the gather that the last `GATHER` round began."""
        gather, self._gather = self._gather, None
        assert gather is not None
        steps, self.gathered_at = max(1, gather.step - self.gathered_at), gather.step
        sources = [report.tokens for report in reports[:: self._sharing]]
        if reports[0].passes and self.settings.mode is not ExpertMode.OFF:
            self.window.add(sources, reports[0].passes, steps, self.settings.window_steps)
            self.sizes.fold(steps, self.settings.window_steps)
            self.balance = self._measure(self.placement)
        checksums = [report.checksum for report in reports]
        self.bookkeeping.compare_placements(checksums, gather.checksum, gather.version)
        self._refuse_skewed()
        if self._wants_plan():
            self._ask()

    def _refuse_skewed(self) -> None:
        """Where ranks hold different placements a move would mix up weights."""
        if self.bookkeeping.skew:
            self._refuse_pending(f"{self.bookkeeping.skew}; only a restart of the engine helps")

    def _refuse_pending(self, why: str) -> None:
        if self.pending.waits:
            self.pending.clear()
            self._log(DecisionOutcome.FAILED, f"directive {self.pending.received} cannot be followed: {why}")

    def moved(self, seconds: float, ok: bool) -> None:
        """Takes the result of the last round's move: the seconds it added to the step, and whether all ranks made
        it.
        """
        move = self._move
        assert move is not None
        layers = list(move.moving)
        if not ok:
            self._abandon(move)
            return
        by_layer = self._count_moves(move.target)
        moves = [by_layer[layer] for layer in layers]
        self.placement[layers] = move.target[layers]
        self.bookkeeping.totals.moves += sum(moves)
        self.bookkeeping.totals.lost_s += seconds
        self.bookkeeping.amend(move.decision.number, lambda row: replace(row, cost_s=row.cost_s + seconds))
        move.paid_s += seconds
        self._learn_move(seconds, moves)
        if not move.layers:
            self._end_move(move)

    # 2. Output.

    def sync_round(self, step: int, now_s: float) -> SyncRound:
        """Returns what all ranks do now, `step` passes after the start."""
        if self.step:
            self._pass_s = (now_s - self._now_s) / max(1, step - self.step)
        self.step, self._now_s = step, now_s
        self._switch_recording()
        self.bookkeeping.count_won(step)
        self._take_result()
        if self.bookkeeping.skew:
            self._refuse_skewed()
        else:
            self._judge_trial()
        if self._move is None:
            self._begin_pending()
        self._settle_directive()
        if self._move is not None:
            return self._move_round(self._move)
        if self._gathers():
            self._gather = _Gather(step=step, checksum=self._checksum(self.placement), version=self.version)
            return self._round(RoundAction.GATHER)
        return self._round(RoundAction.NONE)

    def _settle_directive(self) -> None:
        """Completes the directives received once what they asked for has ended."""
        if self._asked is None and self._move is None and self.pending.settle():
            self.revision += 1

    def _switch_recording(self) -> None:
        """Ranks begin to count with the round that says so."""
        on = self.settings.mode is not ExpertMode.OFF
        if on and not self._recording:
            self.gathered_at = self.step
        self._recording = on

    def move_rows(self) -> tuple[tuple[int, ...], Slots]:
        """Returns the layers that the last round moves and their rows [layer, slot]."""
        assert self._move is not None
        return self._move.rows()

    def problems(self) -> list[tuple[ProblemKind, str]]:
        """Returns the present problems with a sentence for each."""
        silent_steps = self.step - self._decided_at if self._decides() else 0
        return self.bookkeeping.list_problems(silent_steps, self._interval())

    def _round(
        self, action: RoundAction, next_in: int | None = None, layers: int = 0, version: int | None = None
    ) -> SyncRound:
        return SyncRound(
            next_in=self._sync_passes() if next_in is None else next_in,
            action=action,
            recording=self._recording,
            config_version=self._config_version,
            version=self.version if version is None else version,
            layers=layers,
            balance=self.balance.mean,
            pressures=tuple(self.balance.by_rank.tolist()),
        )

    def _sync_passes(self) -> int:
        passes = min(MAX_SYNC_PASSES, self.settings.interval_steps // 8)
        if passes * self._pass_s > MAX_SYNC_S:
            passes = round(MAX_SYNC_S / self._pass_s)
        return max(MIN_SYNC_PASSES, passes)

    # 3. Deciding.

    def _decides(self) -> bool:
        return self.settings.mode in (ExpertMode.DRY_RUN, ExpertMode.ACTIVE)

    def _interval(self) -> int:
        return self.settings.interval_steps << self.bookkeeping.failures

    def _gathers(self) -> bool:
        if self.settings.mode is ExpertMode.OFF or self._gather is not None:
            return False
        since = self.step - self.gathered_at
        return since >= min(GATHER_PASSES, self.settings.interval_steps) or (since > 0 and self._wants_plan())

    def _wants_plan(self) -> bool:
        """Whether to decide now; during a trial only a person can ask for it."""
        if self._asked is not None or self._move is not None or self.bookkeeping.skew:
            return False
        if self.settings.mode is ExpertMode.OFF:
            return False
        due = self._decides() and self.bookkeeping.trial is None and self.step - self._decided_at >= self._interval()
        return self.pending.plan_wanted or due

    def _ask(self) -> None:
        self.pending.plan_wanted = False
        self._asked = PlanRequest(
            tokens=self.window.tokens_a_step(),
            steps=self.window.steps,
            placement=self.placement.copy(),
            version=self.version,
            shape=self.shape,
            costs=self.costs,
            settings=self.settings,
            horizon_steps=self.settings.interval_steps,
            regret=self.bookkeeping.regret,
            step=self.step,
            accounted_steps=self.step - self.bookkeeping.accounted_at,
            sizes=self.sizes.sizes,
        )
        self._planner.ask(self._asked)

    def _take_result(self) -> None:
        if self._asked is None or (result := self._planner.poll()) is None:
            return
        asked, self._asked, self._decided_at = self._asked, None, self.step
        if isinstance(result, Exception):
            self._log(DecisionOutcome.FAILED, f"the decision failed: {result}")
            return
        if asked.version == self.version and self._move is None:
            self.bookkeeping.regret, self.bookkeeping.accounted_at = result.regret, asked.step
        if result.stay_reason:
            self.bookkeeping.totals.stayed[result.stay_reason] += 1
        acts = result.pays and self.settings.mode is ExpertMode.ACTIVE and self._move is None
        if acts and self.bookkeeping.skew:
            self._log(DecisionOutcome.FAILED, self.bookkeeping.skew)
            return
        if acts and asked.version != self.version:
            why = f"decided for placement {asked.version}, which is no longer in force"
            self._log(DecisionOutcome.FAILED, why)
            return
        outcome = DecisionOutcome.DRY_RUN if result.pays else DecisionOutcome.STAYED
        decision = self._log(
            DecisionOutcome.MOVED if acts else outcome,
            result.reason,
            placement=result.placement,
            moves=sum(count_moves_by_layer(asked.placement, result.placement, self.shape)),
            predicted_gain_s=result.gain_s,
            cost_s=0.0 if acts else result.cost_s,
            balance_before=result.balance_before,
            balance_after=result.balance_after,
            seconds=result.seconds,
        )
        if acts:
            self._begin_move(result.placement, decision, own=True, judged=True)

    def _log(self, outcome: DecisionOutcome, reason: str, **fields: Any) -> DecisionEntry:
        self.revision += 1
        return self.bookkeeping.add(self.step, self._now_s, outcome, reason, **fields)

    # 4. Moving.

    def _begin_pending(self) -> None:
        directive = self.pending.take_change()
        if directive is None:
            return
        why = f"asked for by directive {directive.version}"
        if directive.action is DirectiveAction.ROLLBACK and self._previous is None:
            self._log(DecisionOutcome.FAILED, "there is no move to roll back")
        elif directive.action is DirectiveAction.ROLLBACK:
            self._change(self._previous, DecisionOutcome.ROLLED_BACK, why, own=False)
        else:
            target = np.array(directive.physical_to_logical, np.int64)
            self._change(target, DecisionOutcome.APPLIED, why, own=False)

    def _change(self, target: Slots | None, outcome: DecisionOutcome, reason: str, *, own: bool) -> None:
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

    def _begin_move(self, target: Slots, decision: DecisionEntry, *, own: bool, judged: bool) -> None:
        layers = changed_layers(self.placement, target)
        self.bookkeeping.trial = None
        self.bookkeeping.begin_gain(self.step, 0.0)
        if not layers:
            return
        before = self._times.since(self.step - self._trial_steps())
        self._account_steps()
        self.bookkeeping.move_begins()
        self._previous = self.placement.copy()
        self._move = Relocation(target=target, layers=layers, decision=decision, own=own, judged=judged, before=before)

    def _account_steps(self) -> None:
        load = make_load(self.window.tokens_a_step(), self.window.steps, self.sizes.sizes)
        placement = make_placement(self.placement, self.shape)
        self.bookkeeping.account_steps(load, placement, self.costs.over(self.settings.interval_steps), self.step)

    def _move_round(self, move: Relocation) -> SyncRound:
        chosen = move.take_layers(self._count_moves(move.target), self.costs.move_s, self.settings.max_stall_s)
        version = self.version if move.layers else self.version + 1
        return self._round(RoundAction.MOVE, next_in=1, layers=len(chosen), version=version)

    def _count_moves(self, target: Slots) -> list[int]:
        return count_moves_by_layer(self.placement, target, self.shape)

    def _measure(self, placement: Slots) -> Balance:
        return measure_balance(self.window.tokens_a_step(), placement, self.shape)

    def _learn_move(self, seconds: float, moves: list[int]) -> None:
        """Takes the time of a round with these moves by layer; one that only changed idle slots says nothing."""
        if any(moves):
            charged = sum(max(1, count) for count in moves)
            self.costs = replace(self.costs, move_s=0.5 * (self.costs.move_s + seconds / charged))
        self.bookkeeping.note_stall(seconds, self.settings.max_stall_s, sum(moves), len(moves))

    def _end_move(self, move: Relocation) -> None:
        self._close_move(move)
        self.balance = self._measure(self.placement)
        if move.decision.outcome is not DecisionOutcome.ROLLED_BACK and self.settings.mode is not ExpertMode.OFF:
            until = self.step + self._trial_steps()
            self.bookkeeping.trial = Trial(
                decision=move.decision.number, before=move.before, until=until, judged=move.judged
            )
        self._decided_at = max(self._decided_at, self.step)

    def _abandon(self, move: Relocation) -> None:
        """A rank said that it cannot move; no rank has moved anything in this round."""
        self._close_move(move)
        number = move.decision.number
        self.bookkeeping.amend(number, lambda row: replace(row, outcome=DecisionOutcome.FAILED))
        self.bookkeeping.append_reason(number, "a rank could not take part, and nothing more was moved")
        self.bookkeeping.move_failed()

    def _close_move(self, move: Relocation) -> None:
        self._move = None
        self.bookkeeping.account_move(move.paid_s, self.step, own=move.own)
        self.version += 1
        self.revision += 1
        self._times.clear()

    # 5. Measuring.

    def _trial_steps(self) -> int:
        """Steps on either side of a move that are compared, if that gives a clear difference."""
        return max(1, min(self.settings.window_steps, self.settings.interval_steps // 2))

    def _judge_trial(self) -> None:
        trial = self.bookkeeping.trial
        if trial is None or self.step < trial.until or self._move is not None:
            return
        gain = self.bookkeeping.judge_trial(self._times.since(0), self.step, self._trial_steps())
        if self.bookkeeping.trial is not None:
            return
        self.revision += 1
        if gain is not None and trial.judged:
            self._act_on(gain)

    def _act_on(self, gain: Gain) -> None:
        """Keeps a move that gained something; rolls back any other and makes a longer pause."""
        if gain.mean_s > 0.0:
            self.bookkeeping.move_gained()
            self.bookkeeping.begin_gain(self.step, gain.mean_s)
            return
        self.bookkeeping.move_failed()
        self._change(self._previous, DecisionOutcome.ROLLED_BACK, explain_loss(gain), own=True)

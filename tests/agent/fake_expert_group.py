"""An expert group as its first rank sees it: ranks that hold placements, and a planner with a given result."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from moe_agent.experts.bookkeeping import DecisionOutcome, ProblemKind
from moe_agent.experts.controller import Controller
from moe_agent.experts.coordinator import checksum
from moe_agent.experts.directive import Directive, DirectiveAction, GroupShape
from moe_agent.experts.load import RankLoadReport, make_load, make_placement
from moe_agent.experts.planning import MeasuredCosts, PlanRequest, PlanResult
from moe_agent.experts.sync_round import RoundAction, SyncRound, pack_round, unpack_round
from moe_scheduling.expert.decision import ExpertHistory, ExpertMode, ExpertSettings, RegretBound, add_steps

SHAPE = GroupShape(ranks=2, nodes=1, layers=3, experts=4, slots_per_rank=3)
START = np.tile(np.array([0, 1, 2, 3, 0, 1]), (SHAPE.layers, 1))
BETTER = np.tile(np.array([0, 3, 2, 1, 0, 2]), (SHAPE.layers, 1))
COSTS = MeasuredCosts(token_s=1e-6, remote_token_s=0.0, internode_token_s=0.0, move_s=0.001)
HOT = np.array([9, 0, 0, 1])
# In each layer expert 3 comes to the first rank and expert 2 to the second.
MOVES = 2 * SHAPE.layers


class Planner:
    """Returns the result that the test put, `late` polls after it was asked, with the regret bound of the request."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[PlanRequest] = []
        self.late = 0
        self._polls = -1

    def ask(self, request: PlanRequest) -> None:
        self.asked.append(request)
        self._polls = self.late

    def poll(self) -> Any:
        if self._polls < 0:
            return None
        self._polls -= 1
        if self._polls >= 0:
            return None
        if isinstance(self.answer, Exception):
            return self.answer
        return replace(self.answer, regret=regret_of(self.asked[-1]))


def regret_of(request: PlanRequest) -> RegretBound | None:
    """The regret bound as the real decision keeps it."""
    load, placement = make_load(request.tokens, request.steps), make_placement(request.placement, request.shape)
    history = ExpertHistory(regret=request.regret)
    return add_steps(
        history, load, placement, request.costs.over(request.horizon_steps), request.accounted_steps
    ).regret


def answer(placement: np.ndarray = BETTER, *, pays: bool = True) -> PlanResult:
    return PlanResult(
        pays=pays,
        stay_reason="" if pays else "balanced",
        reason="because",
        placement=placement,
        gain_s=0.001,
        cost_s=0.01,
        balance_before=1.8,
        balance_after=1.1,
        seconds=0.002,
    )


class Group:
    """A group whose ranks do what each sync round says, in virtual time; `step_s` is the present duration of a step."""

    def __init__(self, **settings: Any) -> None:
        self.planner = Planner()
        self.planner.answer = answer(pays=False)
        self.controller = Controller(SHAPE, START, COSTS, self.planner, checksum)
        self.settings = {"mode": ExpertMode.ACTIVE, "interval_steps": 64, "window_steps": 32} | settings
        self.version = 0
        self.put()
        self.held = START.copy()
        self.ok = True
        self.move_s = 0.001
        self.step_s = 0.010
        self.tokens = HOT
        self.step = 0
        self.next_round = 1
        self.now_s = 100.0
        self.rounds: list[SyncRound] = []
        self.recorded_steps = 0
        self.recording = False
        self.stray: int | None = None
        self.reports: list[RankLoadReport] | None = None

    def put(self, **changed: Any) -> None:
        self.settings |= changed
        self.version += 1
        self.controller.configure(self.version, ExpertSettings(**self.settings))

    def direct(self, action: DirectiveAction, placement: np.ndarray | None = None) -> None:
        rows = None if placement is None else tuple(map(tuple, placement.tolist()))
        version = self.controller.pending.received + 1
        self.controller.direct(Directive(version=version, action=action, physical_to_logical=rows))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.now_s += self.step_s
            self.controller.step_took(self.step, 8, 8, self.step_s)
            self.recorded_steps += self.recording
            if self.step == self.next_round:
                self._sync()

    def run_until(self, outcome: DecisionOutcome, most: int = 2000) -> None:
        while not self.controller.bookkeeping.rows or self.newest.outcome is not outcome:
            self.run(1)
            assert self.step < most, [row.outcome for row in self.controller.bookkeeping.rows]

    def run_until_noisy(self, outcome: DecisionOutcome, step_s: Callable[[], float]) -> None:
        while self.newest_outcome is not outcome:
            self.step_s = step_s()
            self.run(1)
            assert self.step < 20_000

    @property
    def newest_outcome(self) -> DecisionOutcome | None:
        return self.newest.outcome if self.controller.bookkeeping.rows else None

    @property
    def newest(self) -> Any:
        return self.controller.bookkeeping.rows[0]

    def _sync(self) -> None:
        # Gathered counts arrive in the round after the request.
        if self.reports is not None:
            self.controller.gathered(self.reports)
            self.reports = None
        content = self.controller.sync_round(self.step, self.now_s)
        assert unpack_round(pack_round(content)) == content
        self.rounds.append(content)
        self.next_round = self.step + content.next_in
        self.recording = content.recording
        if content.action is RoundAction.GATHER:
            self.reports = [self._report(rank) for rank in range(SHAPE.ranks)]
            self.recorded_steps = 0
        elif content.action is RoundAction.MOVE:
            layers, rows = self.controller.move_rows()
            assert len(layers) == content.layers
            if self.ok:
                self.held[list(layers)] = rows
            self.controller.moved(self.move_s, self.ok)
            assert self.controller.version == content.version or not self.ok

    def _report(self, rank: int) -> RankLoadReport:
        tokens = np.tile(self.tokens * self.recorded_steps, (SHAPE.layers, 1))
        held = 1 if rank == self.stray else checksum(self.held)
        return RankLoadReport(tokens=tokens, passes=self.recorded_steps, checksum=held)

    def kinds(self) -> set[ProblemKind]:
        return {kind for kind, _ in self.controller.problems()}

"""An expert group as its first rank sees it: ranks that hold placements, and a planner that answers what it is told."""

from collections.abc import Callable
from typing import Any

import numpy as np
from moe_agent.experts.controller import Controller
from moe_agent.experts.directive import Directive, DirectiveAction, GroupShape
from moe_agent.experts.first_rank import checksum
from moe_agent.experts.outcome import Outcome, ProblemKind
from moe_agent.experts.planning import Answer, Costs, Question
from moe_agent.experts.protocol import Action, Beat, pack_beat, unpack_beat
from moe_agent.experts.recording import Counted, Report
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings

SHAPE = GroupShape(ranks=2, nodes=1, layers=3, experts=4, slots_per_rank=3)
START = np.tile(np.array([0, 1, 2, 3, 0, 1]), (SHAPE.layers, 1))
BETTER = np.tile(np.array([0, 3, 2, 1, 0, 2]), (SHAPE.layers, 1))
COSTS = Costs(token_s=1e-6, remote_token_s=0.0, internode_token_s=0.0, move_s=0.001)
HOT = np.array([9, 0, 0, 1])
# In each layer expert 3 comes to the first rank and expert 2 to the second.
MOVES = 2 * SHAPE.layers


class Planner:
    """Answers what the test put, `late` polls after it was asked."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.asked: list[Question] = []
        self.late = 0
        self._polls = -1

    def ask(self, question: Question) -> None:
        self.asked.append(question)
        self._polls = self.late

    def poll(self) -> Any:
        if self._polls < 0:
            return None
        self._polls -= 1
        return self.answer if self._polls < 0 else None


def answer(placement: np.ndarray = BETTER, *, pays: bool = True) -> Answer:
    return Answer(
        pays=pays,
        kept_by="" if pays else "balanced",
        reason="because",
        placement=placement,
        gain_s=0.001,
        cost_s=0.01,
        balance_before=1.8,
        balance_after=1.1,
        seconds=0.002,
    )


class Group:
    """A group whose ranks do what each beat says, in virtual time; `step_s` is how long a step takes just now."""

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
        self.next_beat = 1
        self.now_s = 100.0
        self.beats: list[Beat] = []
        self.recorded_steps = 0
        self.recording = False
        self.stray: int | None = None

    def put(self, **changed: Any) -> None:
        self.settings |= changed
        self.version += 1
        self.controller.configure(self.version, ExpertSettings(**self.settings))

    def direct(self, action: DirectiveAction, placement: np.ndarray | None = None) -> None:
        rows = None if placement is None else tuple(map(tuple, placement.tolist()))
        version = self.controller.inbox.heard + 1
        self.controller.direct(Directive(version=version, action=action, physical_to_logical=rows))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.now_s += self.step_s
            self.controller.step_took((24, 24), self.step_s)
            self.recorded_steps += self.recording
            if self.step == self.next_beat:
                self._beat()

    def run_until(self, outcome: Outcome, most: int = 2000) -> None:
        while not self.controller.log.rows or self.newest.outcome is not outcome:
            self.run(1)
            assert self.step < most, [row.outcome for row in self.controller.log.rows]

    def run_until_noisy(self, outcome: Outcome, step_s: Callable[[], float]) -> None:
        while self.newest_outcome is not outcome:
            self.step_s = step_s()
            self.run(1)
            assert self.step < 20_000

    @property
    def newest_outcome(self) -> Outcome | None:
        return self.newest.outcome if self.controller.log.rows else None

    @property
    def newest(self) -> Any:
        return self.controller.log.rows[0]

    def _beat(self) -> None:
        beat = self.controller.beat(self.step, self.now_s)
        assert unpack_beat(pack_beat(beat)) == beat
        self.beats.append(beat)
        self.next_beat = self.step + beat.next_in
        self.recording = beat.recording
        if beat.action is Action.GATHER:
            self.controller.gathered([self._report(rank) for rank in range(SHAPE.ranks)])
            self.recorded_steps = 0
        elif beat.action is Action.MOVE:
            layers, rows = self.controller.move_rows()
            assert len(layers) == beat.layers
            if self.ok:
                self.held[list(layers)] = rows
            self.controller.moved(self.move_s, self.ok)
            assert self.controller.version == beat.version or not self.ok

    def _report(self, rank: int) -> Report:
        tokens = np.tile(self.tokens * self.recorded_steps, (SHAPE.layers, 1))
        counted = Counted(tokens=tokens, pairs=np.zeros((0, 4, 4), np.int64), pair_passes=0)
        return Report(counted=counted, checksum=1 if rank == self.stray else checksum(self.held))

    def kinds(self) -> set[ProblemKind]:
        return {kind for kind, _ in self.controller.problems()}

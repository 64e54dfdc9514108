"""The ranks of one server: they step together, idle ones run dummy steps, a step takes as long as its slowest rank.

As vLLM's `DPEngineCoreProc` (0.32): a counter of steps that all ranks share decides in which of them prefills may
begin (`prefill_schedule_interval`), and starts anew when the whole group has become idle. Each rank schedules its part
of the next step by itself, and the step is launched when the last one has. With asynchronous scheduling a rank may have
two parts on their way; what comes meanwhile waits for the next. Our scheduler defers the second (`Rank.defer_s`).

A rank that has no part on its way, in a group that runs, has nothing to keep it: vLLM's core enters the next dummy pass
at once, and is stuck in it until the others have scheduled. Ours waits until one of them has, and those that still wait
with theirs then do not any longer (`keeps_step`).

Invariants: steps end in the order of their launch; a group without requests makes no steps.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_tools.simulator.costs import IDLE, CostModel
from moe_tools.simulator.rank import Progress, Rank, ScheduledStep
from moe_tools.simulator.workload import SimRequest

# vLLM's engine core sleeps so long when it has requests and could schedule none.
NOTHING_TO_RUN_S = 0.001
# Instead of seconds: until another rank has scheduled its part.
_WITH_OTHERS = -1.0


class GroupStep(NamedTuple):
    """One step of all ranks."""

    steps: tuple[ScheduledStep | None, ...]
    duration_s: float


class LockstepGroup:
    """The ranks of one server in lockstep: schedules their parts of a step and ends it for all.

    Args:
        name: of the server.
        ranks: its ranks.
        cost: of its steps.
        prefill_interval: prefills may begin in every n-th step.
        ahead: parts of a rank on their way at once: 2 is vLLM's asynchronous scheduling, its default; 1 is without.
        exposed_s: seconds from the scheduling of a step to its begin, where no other step runs as long.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[Rank],
        cost: CostModel,
        *,
        prefill_interval: int = 1,
        ahead: int = 2,
        exposed_s: float = 0.0,
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.steps_made = 0
        self.busy_s = 0.0
        # Called with the number of a rank when a step begins in which it fetches KV blocks; set by the world.
        self.on_pull: Callable[[int, Any], None] | None = None
        self._cost = cost
        self._interval = prefill_interval
        self._ahead = ahead
        self._exposed_s = exposed_s
        self._counter = 0
        self._on_way: deque[GroupStep] = deque()
        self._ends_s = 0.0
        # Of the step that is being made, by rank.
        self._parts: dict[int, ScheduledStep | None] = {}
        balance, pressures = cost.expert_pressures([IDLE] * len(self.ranks))
        for rank, pressure in zip(self.ranks, pressures, strict=True):
            rank.expert_values = {"expert_balance": balance, "expert_pressure": pressure}

    @property
    def is_running(self) -> bool:
        """Whether a step of the group is under way."""
        return bool(self._on_way)

    @property
    def requests(self) -> list[SimRequest]:
        """Requests that have not finished."""
        return [request for rank in self.ranks for request in rank.requests]

    def fill(self, now_s: float) -> float:
        """Lets the ranks schedule their parts; returns seconds until the next is due, 0 if a step must end first."""
        while any(rank.has_requests for rank in self.ranks):
            wait_s = self._schedule_parts(now_s)
            if len(self._parts) < len(self.ranks):
                return wait_s
            step = self._launch(now_s)
            if not any(part is not None and part.work.tokens for part in step.steps):
                return 0.0
        return 0.0

    def _schedule_parts(self, now_s: float) -> float:
        """The parts whose time has come; seconds until that of the next one has, 0 for an end."""
        throttle = self._interval > 1 and self._counter % self._interval != 0
        waits_s = {
            number: self._wait_s(number, now_s) for number in range(len(self.ranks)) if number not in self._parts
        }
        others_go = any(wait_s == 0.0 for wait_s in waits_s.values())
        for number, wait_s in waits_s.items():
            rank = self.ranks[number]
            if wait_s == 0.0 or (wait_s < math.inf and others_go and rank.keeps_step):
                self._parts[number] = rank.schedule(now_s, throttle_prefills=throttle) if rank.has_requests else None
        left_s = [waits_s[number] for number in waits_s if number not in self._parts]
        return min((wait_s for wait_s in left_s if 0.0 < wait_s < math.inf), default=0.0)

    def _wait_s(self, number: int, now_s: float) -> float:
        """Seconds until a rank schedules its part: infinite for an end, `_WITH_OTHERS` for another rank."""
        on_way = self._parts_on_way(number)
        if on_way >= self._ahead:
            return math.inf
        rank = self.ranks[number]
        if on_way:
            return rank.defer_s(now_s)
        others_run = any(self._parts_on_way(other) for other in range(len(self.ranks)) if other != number)
        return _WITH_OTHERS if others_run and rank.keeps_step and self._ahead > 1 else 0.0

    def _parts_on_way(self, number: int) -> int:
        return sum(step.steps[number] is not None for step in self._on_way)

    def _works_on_way(self) -> bool:
        return any(part is not None and part.work.tokens for step in self._on_way for part in step.steps)

    def _launch(self, now_s: float) -> GroupStep:
        self._counter += 1
        steps = tuple(self._parts[number] for number in range(len(self.ranks)))
        self._parts = {}
        works = [IDLE if step is None else step.work for step in steps]
        if any(work.tokens for work in works):
            # The part of the scheduling that the running step does not hide.
            left_s = self._ends_s - now_s if self._on_way else 0.0
            duration_s = self._cost.group_step_s(works) + max(0.0, self._exposed_s - left_s)
            self.steps_made += 1
        elif self._works_on_way() or not any(rank.has_unfinished for rank in self.ranks):
            # Only updates the scheduler: requests have ended, or all tokens are on their way.
            duration_s = 0.0
        else:
            duration_s = NOTHING_TO_RUN_S if len(self.ranks) == 1 else self._cost.group_step_s(works)
        if not self._on_way:
            self._ends_s = now_s + duration_s
        step = GroupStep(steps, duration_s)
        self._on_way.append(step)
        if len(self._on_way) == 1:
            self._begin_pulls(step)
        return step

    def _begin_pulls(self, step: GroupStep) -> None:
        """The worker of a rank begins its transfers when its step runs."""
        if self.on_pull is not None:
            for number, part in enumerate(step.steps):
                for pull in () if part is None else part.pulls:
                    self.on_pull(number, pull)

    @property
    def current_s(self) -> float:
        """Seconds of the step that runs."""
        return self._on_way[0].duration_s

    def finish(self, now_s: float) -> Progress:
        """Ends the running step; returns its progress."""
        step = self._on_way.popleft()
        self.busy_s += step.duration_s
        if self._on_way:
            self._ends_s = now_s + self._on_way[0].duration_s
            self._begin_pulls(self._on_way[0])
        ended = Progress([], [], [])
        for rank, part in zip(self.ranks, step.steps, strict=True):
            if part is not None:
                progress = rank.finish(part, now_s)
                ended.first_tokens.extend(progress.first_tokens)
                ended.finished.extend(progress.finished)
                ended.prefilled.extend(progress.prefilled)
        if not self._on_way and not any(rank.has_unfinished for rank in self.ranks):
            self._counter = 0
            self._parts = {}
        return ended

    def close(self) -> None:
        """Ends the server: drops its steps under way and closes its ranks."""
        self._on_way.clear()
        self._parts = {}
        for rank in self.ranks:
            rank.close()

"""The ranks of one server: they step together, idle ones run dummy steps, a step takes as long as its slowest rank.

As vLLM's `DPEngineCoreProc` (0.32): a counter of steps that all ranks share decides in which of them prefills may
begin (`prefill_schedule_interval`), and starts anew when the whole group has become idle. With asynchronous scheduling
a step is scheduled while the one before it runs; what comes meanwhile waits for the next. Our scheduler lets the core
wait with that (`late_s`). A step that is scheduled while none runs begins later by what scheduling takes.

Invariants: steps end in the order of their scheduling; a group without requests makes no steps.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from moe_bench.simulator.costs import IDLE, CostModel
from moe_bench.simulator.rank import Progress, Rank, Step
from moe_bench.simulator.workload import SimRequest

# vLLM's engine core sleeps so long when it has requests and could schedule none.
NOTHING_TO_RUN_S = 0.001


class GroupStep(NamedTuple):
    """One step of all ranks."""

    steps: tuple[Step | None, ...]
    duration_s: float


class Group:
    """See the module.

    Args:
        name: of the server.
        ranks: its ranks.
        cost: of its steps.
        prefill_interval: in every so manieth step prefills may begin.
        ahead: steps on their way at once: 2 is vLLM's asynchronous scheduling, its default; 1 is without.
        exposed_s: seconds that a step takes longer when it was not scheduled while another one ran.
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
        self._cost = cost
        self._interval = prefill_interval
        self._ahead = ahead
        self._exposed_s = exposed_s
        self._counter = 0
        self._on_way: deque[GroupStep] = deque()
        balance, pressures = cost.expert_pressures([IDLE] * len(self.ranks))
        for rank, pressure in zip(self.ranks, pressures, strict=True):
            rank.expert_values = {"expert_balance": balance, "expert_pressure": pressure}

    @property
    def is_running(self) -> bool:
        """Whether a step is on its way."""
        return bool(self._on_way)

    @property
    def requests(self) -> list[SimRequest]:
        """Those that have not ended."""
        return [request for rank in self.ranks for request in rank.requests]

    def fill(self, now_s: float) -> float:
        """Schedules as many steps as may be on their way; seconds until the next one may be, 0 where it has to wait for
        an end."""
        while len(self._on_way) < self._ahead and any(rank.has_requests for rank in self.ranks):
            if (late_s := self._late_s(now_s)) > 0.0:
                return late_s
            step = self._schedule(now_s)
            self._on_way.append(step)
            if not any(part is not None and part.work.tokens for part in step.steps):
                return 0.0
        return 0.0

    def _late_s(self, now_s: float) -> float:
        """The first rank that has waited long enough schedules; the others have to be with it."""
        if len(self._on_way) != 1 or self._ahead == 1:
            return 0.0
        computing = [rank for rank, part in zip(self.ranks, self._on_way[0].steps, strict=True) if part is not None]
        return min((rank.late_s(now_s) for rank in computing), default=0.0)

    def _schedule(self, now_s: float) -> GroupStep:
        throttle = self._interval > 1 and self._counter % self._interval != 0
        self._counter += 1
        steps = tuple(
            rank.schedule(now_s, throttle_prefills=throttle) if rank.has_requests else None for rank in self.ranks
        )
        works = [IDLE if step is None else step.work for step in steps]
        if any(work.tokens for work in works):
            duration_s = self._cost.group_step_s(works) + (0.0 if self._on_way else self._exposed_s)
            self.steps_made += 1
        elif self._on_way or not any(rank.has_unfinished for rank in self.ranks):
            # Only takes note of what ended, or of what is on its way already.
            duration_s = 0.0
        else:
            duration_s = NOTHING_TO_RUN_S if len(self.ranks) == 1 else self._cost.group_step_s(works)
        return GroupStep(steps, duration_s)

    @property
    def current_s(self) -> float:
        """Seconds of the step that runs."""
        return self._on_way[0].duration_s

    def finish(self, now_s: float) -> Progress:
        """The step that runs is over."""
        step = self._on_way.popleft()
        self.busy_s += step.duration_s
        first_tokens: list[SimRequest] = []
        finished: list[SimRequest] = []
        for rank, part in zip(self.ranks, step.steps, strict=True):
            if part is not None:
                progress = rank.finish(part, now_s)
                first_tokens += progress.first_tokens
                finished += progress.finished
        if not self._on_way and not any(rank.has_unfinished for rank in self.ranks):
            self._counter = 0
        return Progress(first_tokens, finished)

    def close(self) -> None:
        """The server is gone."""
        self._on_way.clear()
        for rank in self.ranks:
            rank.close()

"""Watches each data-parallel rank of an engine: names the one that its group waits for, and says when to start anew.

Run by the supervisor beside the health checks, which a server that waits for its cores may answer late. What counts as
a trouble is decided in `rank_health`; a rank of a group cannot be replaced alone, so the engine starts anew as a whole.

Invariant: `troubles` is of the engine that lives; each change is followed by a call of `on_change`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
from moe_contract.agent_state import RankTrouble

from moe_agent.shared_memory.rank_record import RankRecords, RankState
from moe_agent.shared_memory.turn_record import TurnRecords, TurnState
from moe_agent.supervisor.rank_health import ProcessLife, RankSight, StepPace, judge_ranks

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
_ASLEEP_TIMEOUT_S = 1.0
# Without a step for this long the workers below a rank are looked at too, which reads all of /proc.
_LOOK_BELOW_AFTER_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRules:
    """How long a trouble may last before the engine is started anew; a silent rank has the limit of a hang.

    Attributes:
        suspended_s: a suspended process may be resumed by whoever suspended it.
        behind_s: a rank that is behind, and uses no processor time, waits for something that does not come. One that
            compiles or loads is behind for some seconds, or works.
        idle_cpu_s: processor time within `behind_s` up to which a rank counts as one that uses none.
    """

    suspended_s: float = 10.0
    behind_s: float = 120.0
    idle_cpu_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Since:
    """When a trouble was first seen, and the processor time of the rank until then."""

    trouble: RankTrouble
    since_s: float
    cpu_s: float


class RankWatch:
    """The ranks of this node over the lives of the engine.

    Args:
        ranks: what each published.
        turns: the step that each began last.
        rules: times.

    Attributes:
        troubles: the ranks that keep the group from going on; empty while all is well.
    """

    def __init__(self, ranks: RankRecords, turns: TurnRecords, rules: RankRules = RankRules()) -> None:
        self._ranks, self._turns, self._rules = ranks, turns, rules
        self.troubles: Mapping[int, RankTrouble] = {}
        self._since: dict[int, _Since] = {}
        self._paces: dict[int, StepPace] = {}
        self._processes: dict[int, psutil.Process | None] = {}

    async def run(
        self, is_ready: Callable[[], bool], is_asleep: Callable[[], Awaitable[bool]], on_change: Callable[[], None]
    ) -> str:
        """Looks until the engine has to start anew, and returns the reason.

        Args:
            is_ready: whether the engine is ready: before, its ranks are not judged.
            is_asleep: as for `look`.
            on_change: called after each change of `troubles`.
        """
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not is_ready():
                continue
            before = self.troubles
            reason = await self.look(time.monotonic(), is_asleep)
            if self.troubles != before:
                on_change()
            if reason is not None:
                return reason

    def forget(self) -> None:
        """The engine has ended, or is about to start: nothing is known of its ranks."""
        self._turns.remove()
        self._paces.clear()
        self._processes.clear()
        self._since.clear()
        self.troubles = {}

    async def look(self, now_s: float, is_asleep: Callable[[], Awaitable[bool]]) -> str | None:
        """Judges the ranks; returns why the engine has to start anew, None while it need not.

        Args:
            now_s: the monotonic clock of the machine.
            is_asleep: whether the engine was put to sleep or paused; it then keeps its requests and makes no steps.
        """
        found = judge_ranks(self._sights(now_s), now_s)
        if not all(trouble.is_certain for trouble in found.values()) and await _within(is_asleep):
            found = {}
        self._take(found, now_s)
        return next(filter(None, (self._why_anew(rank, now_s) for rank in self._since)), None)

    def _sights(self, now_s: float) -> dict[int, RankSight]:
        turns, states = self._turns.read(), self._ranks.read()
        # A worker of a rank without requests can be the one that the others wait for.
        is_quiet = any(not row.idle and now_s - row.written_s > _LOOK_BELOW_AFTER_S for row in states.values())
        return {rank: self._sight(rank, row, turns.get(rank), with_workers=is_quiet) for rank, row in states.items()}

    def _sight(self, rank: int, state: RankState, turn: TurnState | None, *, with_workers: bool) -> RankSight:
        pace = self._paces.get(rank, StepPace())
        pace = self._paces[rank] = pace.observe(state.signal.step, state.written_s, idle=state.idle)
        return RankSight(
            life=life_of(self._process(state.pid), with_workers=with_workers),
            idle=state.idle,
            warm=state.signal.step_time is not None,
            written_s=state.written_s,
            turn=None if turn is None else turn.turn,
            entered_s=0.0 if turn is None else turn.entered_s,
            slowest_step_s=pace.slowest_s,
        )

    def _process(self, pid: int) -> psutil.Process | None:
        if pid not in self._processes:
            self._processes[pid] = None
            with suppress(psutil.NoSuchProcess):
                self._processes[pid] = psutil.Process(pid)
        return self._processes[pid]

    def _take(self, found: Mapping[int, RankTrouble], now_s: float) -> None:
        if found == self.troubles:
            return
        before = self._since
        self._since = {
            rank: old
            if (old := before.get(rank)) is not None and old.trouble is trouble
            else _Since(trouble=trouble, since_s=now_s, cpu_s=self._cpu_s(rank))
            for rank, trouble in found.items()
        }
        for rank in found.keys() - self.troubles.keys():
            log.warning("rank %d: %s", rank, found[rank].words)
        self.troubles = dict(found)

    def _why_anew(self, rank: int, now_s: float) -> str | None:
        since, rules = self._since[rank], self._rules
        lasted_s, name = now_s - since.since_s, f"rank {rank}: {since.trouble.words}"
        match since.trouble:
            case RankTrouble.ENDED:
                return name
            case RankTrouble.SUSPENDED if lasted_s >= rules.suspended_s:
                return f"{name} for {rules.suspended_s:g} s"
            case RankTrouble.BEHIND if lasted_s >= rules.behind_s:
                used_s = self._cpu_s(rank) - since.cpu_s
                return f"{name} for {lasted_s:.0f} s and it does nothing" if used_s <= rules.idle_cpu_s else None
        return None

    def _cpu_s(self, rank: int) -> float:
        state = self._ranks.read().get(rank)
        process = None if state is None else self._process(state.pid)
        return 0.0 if process is None else cpu_time_of(process)


def life_of(process: psutil.Process | None, *, with_workers: bool) -> ProcessLife:
    """What the system says of a process; `with_workers`: one that is stopped below it stops it too."""
    if process is None:
        return ProcessLife.ENDED
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return ProcessLife.ENDED
        below = process.children(recursive=True) if with_workers else []
        return ProcessLife.SUSPENDED if any(map(_is_stopped, (process, *below))) else ProcessLife.RUNS
    except psutil.NoSuchProcess:
        return ProcessLife.ENDED
    except psutil.AccessDenied:
        return ProcessLife.RUNS


def cpu_time_of(process: psutil.Process) -> float:
    """Processor time in seconds that a process and the living ones below it have used."""
    total_s = 0.0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                times = one.cpu_times()
                total_s += times.user + times.system
    return total_s


def _is_stopped(process: psutil.Process) -> bool:
    """Whether a process is stopped by a signal; one that a debugger looks at is in another state."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


async def _within(is_asleep: Callable[[], Awaitable[bool]]) -> bool:
    """The answer of an engine that answers soon; one that sleeps does, one whose core hangs does not."""
    try:
        async with asyncio.timeout(_ASLEEP_TIMEOUT_S):
            return await is_asleep()
    except TimeoutError:
        return False

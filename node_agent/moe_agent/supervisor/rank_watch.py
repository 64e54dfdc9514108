"""Watches each data-parallel rank of an engine: names the one that its group waits for, and says when to start anew.

Run by the supervisor beside the health checks, which a server that waits for its cores may answer late. What counts as
a trouble is decided in `rank_health`; a rank of a group cannot be replaced alone, so the engine starts anew as a whole.

Invariants: `troubles` is of the engine that lives; each change is followed by a call of `on_change`; time in which the
agent itself did not run lengthens no trouble; an error of a look ends nothing.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
from moe_contract.agent_state import RankTrouble

from moe_agent.shared_memory.rank_record import RankRecords, RankState
from moe_agent.shared_memory.turn_record import TurnRecords, TurnState
from moe_agent.supervisor.rank_health import ProcessLife, RankSight, StepPace, judge_ranks

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
_ASLEEP_TIMEOUT_S = 1.0
# More time than this between two looks was none in which the ranks were watched: the agent was stopped, or its machine.
MOST_GAP_S = 5.0
# Without a step for this long the workers below a rank are looked at too.
_LOOK_BELOW_AFTER_S = 1.5
# To find the workers reads all of /proc once a rank, and they are the same for as long as the engine lives.
_FIND_WORKERS_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRules:
    """How long a trouble may last before the engine is started anew; a silent rank has the limit of a hang.

    Attributes:
        suspended_s: a suspended process may be resumed by whoever suspended it.
        behind_s: where no rank uses processor time, one that is behind waits for something that does not come. While
            one compiles or loads, it works, and others that are behind wait for it. Infinite where the group has ranks
            on other nodes, whose work is not seen.
        idle_cpu_s: processor time during the trouble up to which a rank counts as one that uses none.
    """

    suspended_s: float = 10.0
    behind_s: float = 120.0
    idle_cpu_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Since:
    """When a trouble was first seen, and the processor time of each rank until then."""

    trouble: RankTrouble
    since_s: float
    cpu_s: Mapping[int, float]


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
        self._looked_s = math.inf
        self._paces: dict[int, StepPace] = {}
        self._processes: dict[int, psutil.Process | None] = {}
        self._workers: dict[int, Sequence[psutil.Process]] = {}
        self._workers_found_s = -math.inf

    async def run(
        self, is_ready: Callable[[], bool], is_asleep: Callable[[], Awaitable[bool]], on_change: Callable[[], None]
    ) -> str:
        """Looks until the engine has to start anew, and returns the reason.

        Args:
            is_ready: whether the engine is ready: before, its ranks are not judged.
            is_asleep: as for `look`.
            on_change: called after each change of `troubles`.
        """
        fails = False
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not is_ready():
                continue
            before, reason = self.troubles, None
            try:
                reason = await self.look(time.monotonic(), is_asleep)
                fails = False
            except (psutil.Error, OSError):
                # Once: it looks twice a second.
                if not fails:
                    log.exception("the ranks could not be looked at")
                fails = True
                self._take({}, time.monotonic())
            if self.troubles != before:
                on_change()
            if reason is not None:
                return reason

    def forget(self) -> None:
        """The engine has ended, or is about to start: nothing is known of its ranks."""
        self._turns.remove()
        self._paces.clear()
        self._processes.clear()
        self._workers.clear()
        self._workers_found_s = -math.inf
        self._since.clear()
        self._looked_s = math.inf
        self.troubles = {}

    async def look(self, now_s: float, is_asleep: Callable[[], Awaitable[bool]]) -> str | None:
        """Judges the ranks; returns why the engine has to start anew, None while it need not.

        Args:
            now_s: the monotonic clock of the machine.
            is_asleep: whether the engine was put to sleep or paused; it then keeps its requests and makes no steps.
        """
        self._leave_out_gap(now_s)
        found = judge_ranks(self._sights(now_s), now_s)
        if not all(trouble.is_certain for trouble in found.values()) and await _within(is_asleep):
            found = {}
        self._take(found, now_s)
        return next(filter(None, (self._why_anew(rank, now_s) for rank in self._longest())), None)

    def _longest(self) -> Iterable[int]:
        """The rank that has had it for the longest time, for each kind of trouble: it decides for all of that kind."""
        found: dict[RankTrouble, int] = {}
        for rank, row in sorted(self._since.items(), key=lambda item: item[1].since_s):
            found.setdefault(row.trouble, rank)
        return found.values()

    def _leave_out_gap(self, now_s: float) -> None:
        """Moves the beginnings of all troubles by a time in which nobody looked."""
        if (gap_s := now_s - self._looked_s) > MOST_GAP_S:
            self._since = {rank: replace(row, since_s=row.since_s + gap_s) for rank, row in self._since.items()}
        self._looked_s = now_s

    def _sights(self, now_s: float) -> dict[int, RankSight]:
        turns, states = self._turns.read(), self._ranks.read()
        # A worker of a rank without requests can be the one that the others wait for.
        is_quiet = any(not row.idle and now_s - row.written_s > _LOOK_BELOW_AFTER_S for row in states.values())
        if is_quiet and now_s - self._workers_found_s > _FIND_WORKERS_EVERY_S:
            self._workers = {row.pid: find_workers(self._process(row.pid)) for row in states.values()}
            self._workers_found_s = now_s
        return {rank: self._sight(rank, row, turns.get(rank), is_quiet=is_quiet) for rank, row in states.items()}

    def _sight(self, rank: int, state: RankState, turn: TurnState | None, *, is_quiet: bool) -> RankSight:
        pace = self._paces.get(rank, StepPace())
        pace = self._paces[rank] = pace.observe(state.signal.step, state.written_s, idle=state.idle)
        return RankSight(
            life=life_of(self._process(state.pid), self._workers.get(state.pid, ()) if is_quiet else ()),
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
        before, cpu_s = self._since, self._cpu_s() if RankTrouble.BEHIND in found.values() else {}
        self._since = {
            rank: old
            if (old := before.get(rank)) is not None and old.trouble is trouble
            else _Since(trouble=trouble, since_s=now_s, cpu_s=cpu_s)
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
                return f"{name} for {lasted_s:.0f} s and no rank does anything" if self._all_rest(since) else None
        return None

    def _all_rest(self, since: _Since) -> bool:
        """Whether no rank of the group has used processor time since then, and no debugger holds one."""
        used_s = {rank: cpu_s - since.cpu_s.get(rank, -math.inf) for rank, cpu_s in self._cpu_s().items()}
        works = any(one_s > self._rules.idle_cpu_s for one_s in used_s.values())
        return not works and not any(map(is_traced, filter(None, self._processes.values())))

    def _cpu_s(self) -> dict[int, float]:
        rows = {rank: self._process(row.pid) for rank, row in self._ranks.read().items()}
        return {rank: cpu_time_of(process) for rank, process in rows.items() if process is not None}


def life_of(process: psutil.Process | None, workers: Sequence[psutil.Process] = ()) -> ProcessLife:
    """What the system says of a process; one of its workers that is stopped stops it too."""
    if process is None:
        return ProcessLife.ENDED
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return ProcessLife.ENDED
    except psutil.NoSuchProcess:
        return ProcessLife.ENDED
    except psutil.AccessDenied:
        return ProcessLife.RUNS
    return ProcessLife.SUSPENDED if any(map(_is_stopped, (process, *workers))) else ProcessLife.RUNS


def find_workers(process: psutil.Process | None) -> Sequence[psutil.Process]:
    """The living processes below one."""
    with suppress(psutil.Error):
        return () if process is None else process.children(recursive=True)
    return ()


def cpu_time_of(process: psutil.Process) -> float:
    """Processor time in seconds that a process and all below it have used, those that have ended included.

    A compiler runs as one short process after another.
    """
    total_s = 0.0
    for one in (process, *find_workers(process)):
        with suppress(psutil.Error):
            times = one.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def is_traced(process: psutil.Process) -> bool:
    """Whether a debugger holds a process, or one below it."""
    return any(_has_status(one, psutil.STATUS_TRACING_STOP) for one in (process, *find_workers(process)))


def _is_stopped(process: psutil.Process) -> bool:
    """Whether a process is stopped by a signal; one that a debugger looks at is in another state."""
    return _has_status(process, psutil.STATUS_STOPPED)


def _has_status(process: psutil.Process, status: str) -> bool:
    try:
        return bool(process.status() == status)
    except psutil.Error:
        return False


async def _within(is_asleep: Callable[[], Awaitable[bool]]) -> bool:
    """The answer of an engine that answers soon; one that sleeps does, one whose core hangs does not."""
    try:
        async with asyncio.timeout(_ASLEEP_TIMEOUT_S):
            return await is_asleep()
    except TimeoutError:
        return False

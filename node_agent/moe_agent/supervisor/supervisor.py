"""The supervisor: starts one engine, watches it, starts it again when it ends, and drains it.

Run by `moe_agent.app` as one task, which alone changes the state here; others read it and ask for a drain.

Invariants: at most one engine process group lives, and none after `run` has returned; `accepting` is false from the
moment a drain is asked for; the engine's port stays the same over restarts.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from moe_contract.addresses import authority, bind_socket, http_url, local_host
from moe_contract.agent_config import EngineConfig
from moe_contract.agent_state import RankTrouble, StartProgress
from moe_contract.engine_process import END_GRACE_S, SETTLE_S, leader_end_s

from moe_agent.supervisor import launcher
from moe_agent.supervisor.engine_log import EngineLog
from moe_agent.supervisor.hang_watch import HangWatch, is_asleep
from moe_agent.supervisor.proof import UNSTEADY_DEATHS, generates_token
from moe_agent.supervisor.rank_watch import RankWatch
from moe_agent.supervisor.start_phases import StartWatch
from moe_agent.supervisor.watched_clock import WatchedClock

log = logging.getLogger(__name__)

KILLED_WITHIN_S = 10.0
"""Time in which the system ends killed processes, the ones that hold GPU memory included."""


class Phase(StrEnum):
    """Phase of the engine's life cycle."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    BACKOFF = "backoff"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRules:
    """Times of the supervisor that no resource sets.

    Attributes:
        first_backoff_s: pause before the first restart; each further failure doubles it.
        last_backoff_s: longest pause between restarts.
        steady_s: an engine that was ready for this long has recovered: the next failure counts as a first one.
        health_every_s: time between two health checks.
        health_timeout_s: time limit of one health check.
        settle_s: time between `accepting` turning false and SIGTERM, in which gateways stop sending; a request that
            reaches a draining engine gets an error.
        end_grace_s: time for the engine to end after its streams are over, before it is killed.
        hang_s: time for which an engine that has requests makes no step, or one that has none does not answer; it is
            then restarted. It is far above any step: one takes up to some seconds on CPUs, moves of experts take
            seconds, and kernels that are compiled for a first request some minutes at most. It is twice the silence
            after which a gateway gives a request up.
    """

    first_backoff_s: float = 1.0
    last_backoff_s: float = 60.0
    steady_s: float = 60.0
    health_every_s: float = 1.0
    health_timeout_s: float = 5.0
    settle_s: float = SETTLE_S
    end_grace_s: float = END_GRACE_S
    hang_s: float = 600.0

    def backoff_s(self, failures: int) -> float:
        """Pause after the `failures`-th failure in a row."""
        return min(self.last_backoff_s, self.first_backoff_s * 2.0 ** min(failures - 1, 30))


class EngineSupervisor:
    """Runs one engine process: starts it, restarts it after a failure, and drains it on request.

    Args:
        engine: address and time limits of the engine.
        command: what to run.
        environment: its environment.
        log_path: where its output goes.
        rules: times.
        headless: the engine has no HTTP server here; it is ready, and healthy, while its process lives.
        leader_end: for a headless engine: returns once the leader, to which the engine lends its devices, has ended. A
            drain waits for it.
        unstepped_s: for how long the engine has made no step though it has requests, in seconds, at a monotonic time.
        rank_watch: of the engine's ranks; None where they are not watched.
        model_cache: folder of the model in the hub's cache, for how far its download is; None: it comes from elsewhere.
        obstacle: why no start can succeed; the engine is then not started at all. Empty: nothing is known against it.
        on_restart: called before each start and after each end of the engine, when no engine lives.
        on_change: called after each change of the phase and each start of a process.
    """

    def __init__(
        self,
        engine: EngineConfig,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        rules: SupervisorRules = SupervisorRules(),
        *,
        headless: bool = False,
        leader_end: Callable[[], Coroutine[Any, Any, None]] | None = None,
        unstepped_s: Callable[[float], float] = lambda now_s: 0.0,
        rank_watch: RankWatch | None = None,
        model_cache: Path | None = None,
        obstacle: str = "",
        on_restart: Callable[[], None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._command, self._environment, self._rules = engine, command, environment, rules
        self._log, self._starting = EngineLog(log_path), StartWatch(log_path, model_cache)
        self._headless, self._leader_end, self._unstepped_s = headless, leader_end, unstepped_s
        self._obstacle, self._rank_watch = obstacle, rank_watch
        self._local_host = local_host(engine.host)
        self._on_restart, self._on_change = on_restart, on_change
        self._drain, self._force_stop = asyncio.Event(), asyncio.Event()
        self._resume, self._is_leaving = asyncio.Event(), False
        self._process: asyncio.subprocess.Process | None = None
        self._server_pid: int | None = None
        self._phase = Phase.STARTING
        self._ready_since_s: float | None = None
        self._unsteady_deaths = 0
        self.revision = 0
        self.restarts = 0
        self.last_exit = ""
        self.max_model_len: int | None = None

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def accepting(self) -> bool:
        return self._phase is Phase.READY and not any(trouble.is_certain for trouble in self.troubles.values())

    @property
    def troubles(self) -> Mapping[int, RankTrouble]:
        """The ranks that keep their group from going on."""
        return {} if self._rank_watch is None else self._rank_watch.troubles

    @property
    def start(self) -> StartProgress | None:
        """How far the start of the engine is; None while it does not start."""
        return self._starting.progress() if self._phase is Phase.STARTING else None

    def look_at_start(self) -> int:
        """Looks how far a start is; the number that is returned rises when that has changed."""
        if self._phase is Phase.STARTING:
            self._starting.look()
        return self._starting.version

    @property
    def url(self) -> str:
        return http_url(self._local_host, self._engine.port)

    @property
    def pid(self) -> int | None:
        """Process of the engine's API server; None while there is none."""
        if self._process is not None and self._server_pid is None:
            # Found once: looking for children reads all of /proc, and this is asked for at each step.
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self._process.pid).children()
                self._server_pid = children[0].pid if children else None
        return self._server_pid

    def request_drain(self) -> None:
        """Stops accepting work, and ends the engine once its streams are over; further calls change nothing."""
        self._resume.clear()
        if not self._drain.is_set():
            self._drain.set()
            if self._phase is not Phase.STOPPED:
                self._enter(Phase.DRAINING)

    def request_resume(self) -> bool:
        """Has a drained engine start again once it has ended; False where none is drained or the agent ends."""
        if not self._drain.is_set() or self._is_leaving:
            return False
        self._resume.set()
        return True

    def request_end(self) -> None:
        """Drains for good: the agent ends with the engine."""
        self._is_leaving = True
        self.request_drain()

    async def run_until(self, leave: asyncio.Event) -> None:
        """Keeps an engine alive, also one that was drained and resumed; returns when `leave` is set and it has ended.

        An engine that was drained over HTTP leaves an agent that still says so.
        """
        while True:
            await self.run()
            waits = [asyncio.create_task(event.wait()) for event in (leave, self._resume)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            await cancel(waits)
            if leave.is_set():
                return
            self._resume.clear()
            self._drain.clear()

    def request_kill(self) -> None:
        """Ends the engine without waiting for its streams."""
        self.request_drain()
        self._force_stop.set()

    async def run(self) -> None:
        """Keeps an engine alive until a drain is asked for; returns when it has ended."""
        failures = 0
        if self._obstacle:
            await self._wait_without_engine()
        while not self._drain.is_set():
            self._starting.begin()
            self._enter(Phase.STARTING)
            ended = await self._live_once()
            if self._drain.is_set():
                break
            failures = 1 if self._was_steady() else failures + 1
            if self._ready_since_s is not None:
                self._unsteady_deaths = 0 if self._was_steady() else self._unsteady_deaths + 1
            self.restarts += 1
            self.last_exit = ended
            pause_s = self._rules.backoff_s(failures)
            log.warning("engine ended: %s; next start in %.0f s", ended, pause_s)
            self._enter(Phase.BACKOFF)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drain.wait(), pause_s)
        self._enter(Phase.STOPPED)

    async def _wait_without_engine(self) -> None:
        """Says why nothing is started, and waits for a drain."""
        log.error("the engine is not started: %s", self._obstacle)
        self.last_exit = self._obstacle
        self._enter(Phase.BACKOFF)
        await self._drain.wait()

    async def _live_once(self) -> str:
        """Starts the engine once and returns, when it has ended, the reason."""
        self._ready_since_s = None
        if not self._headless and (taken := find_port_conflict(self._engine.host, self._engine.port)) is not None:
            return taken
        self._forget_engine()
        process = self._process = await self._spawn()
        self._notify_change()
        watchers = {
            asyncio.create_task(process.wait(), name="exit"),
            asyncio.create_task(self._watch_process() if self._headless else self._watch_health(), name="health"),
            asyncio.create_task(self._watch_ranks(), name="ranks"),
            asyncio.create_task(self._drain.wait(), name="drain"),
        }
        try:
            done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
            names = {task.get_name(): task for task in done}
            if "exit" in names:
                return describe_exit(process.returncode, self._log.last_error())
            if "drain" in names:
                # A question to its core that is still open would keep the engine's server from ending.
                await cancel(watchers - {names["drain"]})
                await self._drain_engine(process)
                return "drained"
            return self._with_cause(done.pop())
        finally:
            await cancel(watchers)
            kill_group(process.pid)
            await process.wait()
            await wait_for_group_end(process.pid)
            self._process = self._server_pid = None
            self._forget_engine()

    def _with_cause(self, watcher: asyncio.Task[Any]) -> str:
        """The reason of a watcher; that of a rank which has ended itself is in the log."""
        reason, cause = str(watcher.result()), self._log.last_error() if watcher.get_name() == "ranks" else ""
        return f"{reason}: {cause}" if cause and RankTrouble.ENDED in self.troubles.values() else reason

    def _forget_engine(self) -> None:
        """Called when no engine lives."""
        if self._rank_watch is not None:
            self._rank_watch.forget()
        self._on_restart()

    async def _spawn(self) -> asyncio.subprocess.Process:
        with self._log.open_for_start() as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", launcher.__file__),
                *self._command,
                # The launcher's lifeline: it ends with this process, however that one ends.
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(self._environment),
                start_new_session=True,
            )

    async def _drain_engine(self, process: asyncio.subprocess.Process) -> None:
        streams = self._ready_since_s is not None and not self._headless
        forced = asyncio.create_task(self._force_stop.wait())
        exited = asyncio.create_task(process.wait())
        try:
            if streams:
                await asyncio.wait({forced}, timeout=self._rules.settle_s)
            await self._wait_for_leader(forced, exited)
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            limit_s = self._rules.end_grace_s + (self._engine.drain_timeout_s if streams else 0.0)
            await asyncio.wait({forced, exited}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            forced.cancel()
            exited.cancel()

    async def _wait_for_leader(self, forced: asyncio.Task[Any], exited: asyncio.Task[Any]) -> None:
        """Lets a headless engine live while its leader's streams may need it, for as long as the leader may take."""
        if self._leader_end is None:
            return
        ended = asyncio.create_task(self._leader_end())
        try:
            limit_s = leader_end_s(self._engine.drain_timeout_s)
            await asyncio.wait({forced, exited, ended}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    async def _watch_health(self) -> str:
        """Returns, with the reason, when the engine did not come up in time or has stopped answering."""
        timeout = aiohttp.ClientTimeout(total=self._rules.health_timeout_s)
        async with aiohttp.ClientSession(self.url, timeout=timeout) as session:
            hangs = HangWatch(session, self._unstepped_s, limit_s=self._rules.hang_s)
            with closing(hangs):
                return await self._watch_until_it_fails(session, hangs, WatchedClock())

    async def _watch_until_it_fails(self, session: aiohttp.ClientSession, hangs: HangWatch, clock: WatchedClock) -> str:
        started_s, last_answer_s = time.monotonic(), clock.read()
        up_by_s = started_s + self._engine.startup_timeout_s
        while True:
            healthy = await is_healthy(session)
            now_s, watched_s = time.monotonic(), clock.read()
            if healthy:
                last_answer_s = watched_s
                if self._ready_since_s is None and await self._is_proven(session, up_by_s - now_s):
                    self.max_model_len = await fetch_max_model_len(session)
                    self._ready_since_s, last_answer_s = time.monotonic(), clock.read()
                    log.info("engine is ready after %.1f s", self._ready_since_s - started_s)
                    self._enter(Phase.READY)
            if self._ready_since_s is None and time.monotonic() > up_by_s:
                why = "it answers and generates no token" if healthy else self._log.last_error()
                return f"not ready within {self._engine.startup_timeout_s:g} s: {why}"
            if self._ready_since_s is not None and watched_s - last_answer_s > self._engine.liveness_timeout_s:
                return f"no healthy answer for {self._engine.liveness_timeout_s:g} s"
            if self._ready_since_s is not None and (reason := await hangs.look(watched_s)) is not None:
                return reason
            await asyncio.sleep(self._rules.health_every_s)

    async def _is_proven(self, session: aiohttp.ClientSession, limit_s: float) -> bool:
        """Whether an engine that answers may become ready: after repeated deaths it has to generate a token first."""
        return self._unsteady_deaths < UNSTEADY_DEATHS or await generates_token(session, limit_s)

    async def _watch_process(self) -> str:
        """For an engine without a server: ready from its start; its end is seen elsewhere."""
        self._ready_since_s = time.monotonic()
        self._enter(Phase.READY)
        await asyncio.Event().wait()
        return ""

    async def _watch_ranks(self) -> str:
        """Returns, with the reason, when a rank keeps the engine from going on."""
        if self._rank_watch is None:
            await asyncio.Event().wait()
            return ""
        async with aiohttp.ClientSession(self.url) as session:
            return await self._rank_watch.run(
                lambda: self._phase is Phase.READY, lambda: is_asleep(session), self._notify_change
            )

    def _was_steady(self) -> bool:
        return self._ready_since_s is not None and time.monotonic() - self._ready_since_s >= self._rules.steady_s

    def _enter(self, phase: Phase) -> None:
        # A drain that was asked for while an engine was starting must not be undone by its becoming ready.
        if self._drain.is_set() and phase not in (Phase.DRAINING, Phase.STOPPED):
            return
        self._phase = phase
        self._notify_change()

    def _notify_change(self) -> None:
        self.revision += 1
        self._on_change()


async def is_healthy(session: aiohttp.ClientSession) -> bool:
    """Whether the engine's `/health` answers 200."""
    try:
        async with session.get("/health") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def fetch_max_model_len(session: aiohttp.ClientSession) -> int | None:
    """Longest request in tokens, as the engine states it; None for an engine that does not."""
    try:
        async with session.get("/v1/models") as answer:
            return int((await answer.json())["data"][0]["max_model_len"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def find_port_conflict(host: str, port: int) -> str | None:
    """Why an engine could not listen there; None when it could. Another server's answers must not pass for its own."""
    try:
        bind_socket(host, port).close()
    except OSError as error:
        return f"cannot listen on {authority(host, port)}: {explain_os_error(error)}"
    return None


def explain_os_error(error: OSError) -> str:
    """The reason of an error in lower case; that of a name that does not resolve has no number of the system's."""
    name_error = isinstance(error, socket.gaierror)
    return str(error.strerror if name_error else os.strerror(error.errno or 0)).lower()


def kill_group(group: int) -> None:
    """Kills the remaining processes of a group; does nothing when none remains."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_group_end(group: int) -> None:
    """Waits, for some seconds at most, until the killed processes of a group have given their memory and ports back.

    A worker with tens of GiB of GPU memory takes seconds to end after SIGKILL; the next engine would find none free.
    """
    deadline_s = time.monotonic() + KILLED_WITHIN_S
    while lives_in_group(group):
        if time.monotonic() > deadline_s:
            log.warning("processes of the engine's group %d live %.0f s after they were killed", group, KILLED_WITHIN_S)
            return
        await asyncio.sleep(0.02)


def lives_in_group(group: int) -> bool:
    """Whether a process of the group lives; one that has ended and waits for its parent to notice does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def describe_exit(status: int | None, last_error: str) -> str:
    """`exit status 1: ValueError: ...`, `killed by SIGKILL`."""
    code = -status if status is not None and status < 0 else (status or 0) - 128
    with suppress(ValueError):
        return f"killed by {signal.Signals(code).name}"
    return f"exit status {status}" + (f": {last_error}" if last_error else "")

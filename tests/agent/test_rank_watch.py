"""The watch of ranks on stand-ins for two engine cores: which one is named, what the agent says, when it starts anew.

How long it takes until a rank is noticed is printed and not asserted: on a busy machine it is that machine's.
"""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from moe_agent.api.metrics import AgentCollector
from moe_agent.api.state import build_state
from moe_agent.shared_memory.control_record import Control
from moe_agent.shared_memory.rank_record import RankRecords, RankState
from moe_agent.shared_memory.turn_record import TurnRecords, TurnState
from moe_agent.supervisor.rank_health import ProcessLife
from moe_agent.supervisor.rank_watch import (
    MOST_GAP_S,
    RankRules,
    RankWatch,
    cpu_time_of,
    find_workers,
    is_traced,
    life_of,
)
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase, SupervisorRules
from moe_contract.addresses import ANY, bind_socket
from moe_contract.agent_config import EngineConfig
from moe_contract.agent_state import AgentState, RankTrouble
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_contract.pod_identity import NO_POD
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, StepTime
from prometheus_client import CollectorRegistry

RANKS = 2
STEP_TIME = StepTime(base_s=0.01, prefill_s=0.0, decode_s=0.0)
FAKE = Path(__file__).with_name("fake_engine.py")
QUICK = SupervisorRules(first_backoff_s=0.05, last_backoff_s=0.05, health_every_s=0.05, settle_s=0.05, end_grace_s=0.5)
PATIENT = RankRules(suspended_s=3600.0, behind_s=3600.0)
HASTY = RankRules(suspended_s=0.0, behind_s=0.0, idle_cpu_s=3600.0)


@dataclass
class Agent:
    """The parts of an agent that have to do with ranks, with a fake engine of stand-in cores."""

    run_dir: Path
    ranks: RankRecords
    supervisor: EngineSupervisor
    revision: int = -1

    @property
    def state(self) -> AgentState:
        control = Control(version=1, request=RequestSettings())
        return build_state("engine", "fake", self.supervisor, control, self.ranks.read(), time.monotonic(), NO_POD)

    @property
    def troubles(self) -> dict[int, str]:
        return {row.rank: row.trouble for row in self.state.troubled_ranks}

    def pid(self, rank: int) -> int:
        return self.ranks.read()[rank].pid

    def go(self, rank: int, way: str) -> None:
        fresh = self.run_dir / f"next-{rank}"
        fresh.write_text(way)
        fresh.replace(self.run_dir / f"way-{rank}")

    async def up(self) -> None:
        """All ranks make steps."""
        first = {rank: row.signal.step for rank, row in self.ranks.read().items()}

        def holds() -> bool:
            now = self.ranks.read()
            steps = all(rank in now and now[rank].signal.step > first.get(rank, 0) for rank in range(RANKS))
            return self.supervisor.phase is Phase.READY and steps

        await until(holds)


async def until(holds: Callable[[], bool], what: str = "") -> None:
    begun_s = time.monotonic()
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)
    if what:
        print(f"{what} after {time.monotonic() - begun_s:.2f} s")


@asynccontextmanager
async def running(folder: Path, rules: RankRules, **ways: Any) -> AsyncIterator[Agent]:
    with bind_socket(ANY, 0) as probe:
        port = int(probe.getsockname()[1])
    engine = EngineConfig(port=port, model="m", served_name="fake", drain_timeout_s=1.0)
    ranks = RankRecords(folder, range(RANKS))
    supervisor = EngineSupervisor(
        engine,
        [sys.executable, str(FAKE), str(port), json.dumps({"cores": RANKS} | ways)],
        os.environ | {RUN_DIR_VARIABLE: str(folder)},
        folder / "engine.log",
        QUICK,
        rank_watch=RankWatch(ranks, TurnRecords(folder, range(RANKS)), rules),
        on_restart=ranks.remove,
    )
    agent = Agent(folder, ranks, supervisor)
    for rank in range(RANKS):
        agent.go(rank, "busy")
    task = asyncio.create_task(supervisor.run())
    try:
        await agent.up()
        yield agent
    finally:
        supervisor.request_kill()
        await asyncio.wait_for(task, 60)


def metric(state: AgentState, rank: int, trouble: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(AgentCollector(lambda: state, lambda: None))
    labels = {"engine": "engine", "rank": str(rank), "trouble": trouble}
    return registry.get_sample_value("moeserving_engine_rank_trouble", labels)


async def test_a_rank_whose_process_is_killed_is_named_and_the_engine_starts_anew(tmp_path):
    async with running(tmp_path, PATIENT) as agent:
        assert agent.troubles == {}
        with (tmp_path / "engine.log").open("a") as engine_log:
            engine_log.write("torch.OutOfMemoryError: CUDA out of memory\n")
        os.kill(agent.pid(1), signal.SIGKILL)
        await until(lambda: agent.supervisor.restarts == 1, "a killed rank: restart")
        assert agent.supervisor.last_exit.startswith("rank 1: its process has ended")
        assert agent.supervisor.last_exit.endswith("torch.OutOfMemoryError: CUDA out of memory")
        await agent.up()
        assert agent.troubles == {}


async def test_a_suspended_rank_takes_no_work_until_it_is_resumed(tmp_path):
    async with running(tmp_path, PATIENT) as agent:
        revision, pid = agent.supervisor.revision, agent.pid(1)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: agent.troubles == {1: "suspended"}, "a suspended rank: noticed")
        state = agent.state
        assert not state.accepting
        assert state.phase == "ready"
        assert metric(state, 1, "suspended") == 1.0
        assert metric(state, 1, "ended") == metric(state, 0, "suspended") == 0.0
        assert agent.supervisor.revision > revision, "watchers are sent the change at once"
        os.kill(pid, signal.SIGCONT)
        await until(lambda: not agent.troubles)
        assert agent.state.accepting
        assert agent.supervisor.restarts == 0


async def test_a_rank_that_stays_suspended_ends_the_engine(tmp_path):
    async with running(tmp_path, HASTY) as agent:
        os.kill(agent.pid(0), signal.SIGSTOP)
        await until(lambda: agent.supervisor.restarts == 1)
        assert agent.supervisor.last_exit.startswith("rank 0: its process is suspended for 0 s")
        await agent.up()


async def test_of_a_group_that_waits_the_rank_without_requests_is_named_that_keeps_it_waiting(tmp_path):
    async with running(tmp_path, PATIENT) as agent:
        agent.go(1, "idle")
        await until(lambda: agent.state.ranks[1].running == 0)
        agent.go(1, "stuck")
        await until(lambda: agent.troubles == {1: "behind"}, "a rank behind: noticed")
        assert agent.state.accepting, "it may be amid a long step"
        assert metric(agent.state, 1, "behind") == 1.0
        agent.go(1, "idle")
        await until(lambda: not agent.troubles)
        assert agent.supervisor.restarts == 0


async def test_a_rank_that_stays_behind_and_does_nothing_ends_the_engine(tmp_path):
    async with running(tmp_path, HASTY) as agent:
        agent.go(1, "stuck")
        await until(lambda: agent.supervisor.restarts == 1)
        assert agent.supervisor.last_exit.startswith("rank 1: the other ranks wait for it")
        agent.go(1, "busy")
        await agent.up()


async def test_a_rank_that_works_is_waited_for(tmp_path):
    async with running(tmp_path, RankRules(suspended_s=3600.0, behind_s=0.0, idle_cpu_s=-1.0)) as agent:
        agent.go(1, "stuck")
        await until(lambda: agent.troubles == {1: "behind"})
        agent.go(1, "busy")
        await until(lambda: not agent.troubles)
        assert agent.supervisor.restarts == 0


async def test_a_group_that_sleeps_makes_no_steps_and_has_no_trouble(tmp_path):
    asleep = tmp_path / "asleep"
    asleep.touch()
    async with running(tmp_path, PATIENT, asleep_file=str(asleep)) as agent:
        watch = agent.supervisor._rank_watch
        for rank in range(RANKS):
            agent.go(rank, "stuck")
        far_s = time.monotonic() + 1000.0

        async def sleeps() -> bool:
            return True

        async def does_not_answer() -> bool:
            await asyncio.Event().wait()
            return True

        assert await watch.look(far_s, sleeps) is None
        assert agent.troubles == {}
        await watch.look(far_s, does_not_answer)
        assert agent.troubles


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_life_of_a_process_is_that_of_its_workers_too(number):
    program = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        watched, worker = psutil.Process(process.pid), int(process.stdout.readline())
        try:
            workers = find_workers(watched)
            assert [row.pid for row in workers] == [worker]
            assert life_of(watched, workers) is ProcessLife.RUNS
            os.kill(worker, signal.SIGSTOP)
            asyncio.run(until(lambda: life_of(watched, workers) is ProcessLife.SUSPENDED))
            assert life_of(watched) is ProcessLife.RUNS
            os.kill(process.pid, number)
            wanted = ProcessLife.SUSPENDED if number is signal.SIGSTOP else ProcessLife.ENDED
            asyncio.run(until(lambda: life_of(watched) is wanted))
        finally:
            os.kill(worker, signal.SIGKILL)
            process.kill()
    assert life_of(watched, workers) is ProcessLife.ENDED
    assert life_of(None) is ProcessLife.ENDED
    assert find_workers(watched) == find_workers(None) == ()


def test_a_compiler_that_has_ended_counts_as_work_of_the_rank_that_ran_it():
    """One short process after another: none of them is alive for long."""
    work = "import time; t = time.process_time() + 0.5\nwhile time.process_time() < t: pass"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert cpu_time_of(psutil.Process(process.pid)) > 0.4
        process.stdin.close()


class Records:
    """Two ranks of which the first has requests and waits for the second, as their records say."""

    def __init__(self, written_s: float, *pids: int) -> None:
        signals = [EngineSignal(step=20, running=rank == 0, step_time=STEP_TIME) for rank in range(RANKS)]
        self.states = {
            rank: RankState(pid=pids[rank], written_s=written_s, config_version=1, signal=signals[rank])
            for rank in range(RANKS)
        }
        self.turns = {0: TurnState(21, written_s), 1: TurnState(20, written_s)}


class Turns:
    def __init__(self, records: Records) -> None:
        self.read = lambda: records.turns

    def remove(self) -> None:
        pass


@contextmanager
def watched_pair(rules: RankRules, program: str = "import time; time.sleep(600)") -> Iterator[tuple[RankWatch, float]]:
    """A watch of two processes, the second of which the first waits for; the first one runs `program`."""
    with ExitStack() as stack:
        commands = [[sys.executable, "-c", text] for text in (program, "import time; time.sleep(600)")]
        processes = [stack.enter_context(subprocess.Popen(command)) for command in commands]
        for process in processes:
            stack.callback(process.kill)
        began_s = time.monotonic()
        records = Records(began_s, *(process.pid for process in processes))
        reader = SimpleNamespace(read=lambda: records.states)
        yield RankWatch(reader, Turns(records), rules), began_s


async def awake() -> bool:
    return False


def looks(until_s: float) -> Iterator[float]:
    """The times of looks, from where a trouble is first seen."""
    yield from (10.0 + MOST_GAP_S * number for number in range(int((until_s - 10.0) / MOST_GAP_S)))


async def reasons(watch: RankWatch, times: Iterable[float]) -> list[str | None]:
    return [await watch.look(time_s, awake) for time_s in times]


async def test_time_in_which_the_agent_itself_was_stopped_ends_no_engine():
    """A machine, a container or the agent stood still for an hour amid a step, and the ranks have not gone on yet."""
    rules = RankRules(idle_cpu_s=3600.0)
    with watched_pair(rules) as (watch, began_s):
        assert await reasons(watch, (began_s + 10.0, began_s + 3600.0)) == [None, None]
        assert watch.troubles == {1: RankTrouble.BEHIND}
        after = [began_s + 3600.0 + time_s for time_s in looks(rules.behind_s + 20.0)]
        assert (await reasons(watch, after))[-1].startswith("rank 1: the other ranks wait")


async def test_while_another_rank_works_one_that_is_behind_is_waited_for():
    """The first rank compiles in a worker, amid a step that its core has left already."""
    with watched_pair(RankRules(idle_cpu_s=0.5), "while True: pass") as (watch, began_s):
        await reasons(watch, [began_s + 10.0])
        process = watch._process(watch._ranks.read()[0].pid)
        first_s = cpu_time_of(process)
        await until(lambda: cpu_time_of(process) > first_s + 1.0)
        assert not any(await reasons(watch, (began_s + time_s for time_s in looks(400.0))))
        assert watch.troubles == {1: RankTrouble.BEHIND}


async def test_a_group_with_ranks_on_other_nodes_is_not_judged_by_the_work_of_this_one():
    rules = RankRules(behind_s=math.inf, idle_cpu_s=3600.0)
    with watched_pair(rules) as (watch, began_s):
        assert not any(await reasons(watch, (began_s + time_s for time_s in looks(1000.0))))


async def test_an_error_of_a_look_ends_nothing(caplog):
    with watched_pair(RankRules()) as (watch, _):
        looked, times = asyncio.Event(), iter(range(3))

        async def look(*_: object) -> None:
            if next(times, None) is None:
                looked.set()
            raise PermissionError("/proc")

        watch.look = look
        running = asyncio.create_task(watch.run(lambda: True, awake, lambda: None))
        await asyncio.wait_for(looked.wait(), 60)
        assert not running.done()
        running.cancel()
    assert len(caplog.records) == 1


def test_only_a_process_that_a_debugger_holds_is_traced():
    assert not is_traced(psutil.Process())

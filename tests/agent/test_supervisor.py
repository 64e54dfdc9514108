"""The supervisor against a fake engine process: start, restart with back-off, liveness, drain, nothing left behind."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from moe_agent.supervisor.engine_log import find_error_line
from moe_agent.supervisor.supervisor import (
    EngineSupervisor,
    Phase,
    SupervisorRules,
    describe_exit,
    lives_in_group,
    wait_for_group_end,
)
from moe_contract.agent_config import EngineConfig

FAKE = Path(__file__).with_name("fake_engine.py")
QUICK = SupervisorRules(first_backoff_s=0.05, last_backoff_s=0.2, health_every_s=0.02, settle_s=0.05, end_grace_s=0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline_s, f"never: {what}"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Start = Callable[..., Awaitable[EngineSupervisor]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Runs supervisors of fake engines, and ends them."""
    running: list[tuple[EngineSupervisor, asyncio.Task[None]]] = []

    async def begin(
        *,
        rules: SupervisorRules = QUICK,
        port: int | None = None,
        limits: dict[str, float] | None = None,
        headless: bool = False,
        unstepped_s: Callable[[float], float] = lambda now_s: 0.0,
        **ways: Any,
    ) -> EngineSupervisor:
        engine = EngineConfig(
            port=port or free_port(), model="m", served_name="fake", **({"drain_timeout_s": 5.0} | (limits or {}))
        )
        command = [sys.executable, str(FAKE), str(engine.port), json.dumps(ways)]
        supervisor = EngineSupervisor(
            engine,
            command,
            dict(os.environ),
            tmp_path / "engine.log",
            rules,
            headless=headless,
            unstepped_s=unstepped_s,
        )
        running.append((supervisor, asyncio.create_task(supervisor.run())))
        return supervisor

    yield begin
    for supervisor, task in running:
        supervisor.request_kill()
        await asyncio.wait_for(task, 20)


async def ready(supervisor: EngineSupervisor) -> None:
    await until(lambda: supervisor.phase is Phase.READY, "ready")


async def test_an_engine_becomes_ready_once_it_answers(start):
    supervisor = await start(start_delay_s=0.3)
    assert supervisor.phase is Phase.STARTING
    assert not supervisor.accepting
    await ready(supervisor)
    assert supervisor.accepting
    assert supervisor.max_model_len == 4096
    assert psutil.Process(supervisor.pid).cmdline()[1] == str(FAKE)


async def test_a_crash_is_seen_at_once_and_the_engine_is_started_again_on_its_port(start, tmp_path):
    supervisor = await start(crash_file=str(tmp_path / "crash"))
    await ready(supervisor)
    first, url = supervisor.pid, supervisor.url
    (tmp_path / "crash").touch()
    await until(lambda: supervisor.restarts == 1, "a restart")
    (tmp_path / "crash").unlink()
    assert supervisor.last_exit == "exit status 3: ValueError: no memory left for the KV cache"
    await ready(supervisor)
    assert supervisor.pid != first
    assert supervisor.url == url


async def test_a_start_that_is_announced_is_not_described_by_the_one_before(start, tmp_path):
    supervisor = await start(crash_file=str(tmp_path / "crash"))
    await ready(supervisor)
    with (tmp_path / "engine.log").open("a") as log:
        log.write("Starting to load model /m\n")
    phases = []

    def note() -> None:
        if supervisor.start is not None:
            phases.append(supervisor.start.phase)

    supervisor._on_change = note
    # As when the start before lasted long enough to be looked at.
    supervisor._starting._looked_s -= 60.0
    supervisor._starting.look()
    (tmp_path / "crash").touch()
    await until(lambda: supervisor.restarts == 1, "a restart")
    (tmp_path / "crash").unlink()
    await ready(supervisor)
    assert phases[0] == "loading Python packages"


async def dies_twice(supervisor: EngineSupervisor) -> None:
    """Sends requests that end it, after which it has to prove that it generates tokens."""
    for _ in range(2):
        await until(lambda: supervisor.accepting, "ready before it is known to die")
        before = supervisor.restarts
        async with aiohttp.ClientSession() as session:
            with suppress(aiohttp.ClientError):
                await session.post(f"{supervisor.url}/v1/completions", json={})
        await until(lambda before=before: supervisor.restarts > before, "seen to have died")


async def test_an_engine_that_dies_at_each_first_request_is_not_ready_in_between(start, tmp_path):
    requests, healed = tmp_path / "requests", tmp_path / "healed"
    supervisor = await start(requests_file=str(requests), healed_file=str(healed))
    await dies_twice(supervisor)
    seen = set()

    def proven_in_vain() -> bool:
        seen.add(supervisor.phase)
        return supervisor.restarts >= 4

    await until(proven_in_vain, "died at the supervisor's own request")
    assert Phase.READY not in seen
    assert len(requests.read_text().splitlines()) >= 4
    healed.touch()
    await until(lambda: supervisor.accepting, "ready after a token")


@pytest.mark.parametrize("status", ["500", "0"])
async def test_an_engine_that_generates_no_token_in_its_time_to_start_is_started_again(start, tmp_path, status):
    requests, healed = tmp_path / "requests", tmp_path / "healed"
    limits = {"startup_timeout_s": 4.0}
    supervisor = await start(requests_file=str(requests), healed_file=str(healed), limits=limits)
    await dies_twice(supervisor)
    healed.write_text(status)
    await until(lambda: "generates no token" in supervisor.last_exit, "started again")
    assert not supervisor.accepting
    healed.write_text("200")
    await until(lambda: supervisor.accepting, "ready after a token")


async def test_an_engine_that_wants_a_key_needs_no_token_to_be_ready(start, tmp_path):
    requests, healed, locked = tmp_path / "requests", tmp_path / "healed", tmp_path / "locked"
    supervisor = await start(requests_file=str(requests), healed_file=str(healed), locked_file=str(locked))
    locked.touch()
    await dies_twice(supervisor)
    await until(lambda: supervisor.accepting, "ready without a token")
    assert len(requests.read_text().splitlines()) == 2


async def test_an_engine_whose_core_hangs_is_started_again_unless_it_sleeps(start, tmp_path):
    unstepped_s, checks = 0.0, 0
    asleep = tmp_path / "asleep"

    def look(_now_s: float) -> float:
        nonlocal checks
        checks += 1
        return unstepped_s

    async def more_checks() -> None:
        before = checks
        await until(lambda: checks > before + 3, "some checks")

    supervisor = await start(unstepped_s=look, asleep_file=str(asleep))
    await ready(supervisor)
    asleep.touch()
    unstepped_s = QUICK.hang_s + 1.0
    await more_checks()
    assert supervisor.restarts == 0
    asleep.unlink()
    await until(lambda: supervisor.restarts == 1, "a restart")
    assert supervisor.last_exit == "no step for 600 s though there are requests"
    unstepped_s = QUICK.hang_s - 1.0
    await ready(supervisor)
    await more_checks()
    assert supervisor.restarts == 1


async def test_an_engine_that_is_killed_is_started_again(start):
    supervisor = await start()
    await ready(supervisor)
    os.kill(supervisor.pid, signal.SIGKILL)
    await until(lambda: supervisor.restarts == 1, "a restart")
    assert supervisor.last_exit == "killed by SIGKILL"
    await ready(supervisor)


async def test_restarts_wait_longer_each_time_up_to_the_last_pause():
    rules = SupervisorRules(first_backoff_s=1.0, last_backoff_s=60.0)
    assert [rules.backoff_s(failures) for failures in (1, 2, 3, 7, 100)] == [1.0, 2.0, 4.0, 60.0, 60.0]


async def test_an_engine_that_cannot_start_stays_in_back_off_and_says_why(start):
    supervisor = await start(error="OSError: no such model: m")
    await until(lambda: supervisor.restarts >= 3, "three restarts")
    assert supervisor.last_exit == "exit status 1: OSError: no such model: m"
    assert supervisor.phase in (Phase.BACKOFF, Phase.STARTING)


async def test_an_engine_that_does_not_come_up_in_time_is_killed(start):
    supervisor = await start(start_delay_s=600, limits={"startup_timeout_s": 0.3})
    await until(lambda: supervisor.restarts >= 1, "a restart")
    assert supervisor.last_exit.startswith("not ready within 0.3 s")


async def test_an_engine_that_stops_answering_is_killed_and_started_again(start, tmp_path):
    supervisor = await start(sick_file=str(tmp_path / "sick"), limits={"liveness_timeout_s": 0.3})
    await ready(supervisor)
    (tmp_path / "sick").touch()
    await until(lambda: supervisor.restarts == 1, "a restart")
    assert supervisor.last_exit == "no healthy answer for 0.3 s"
    (tmp_path / "sick").unlink()
    await ready(supervisor)


async def test_a_short_silence_is_no_failure(start, tmp_path):
    supervisor = await start(sick_file=str(tmp_path / "sick"), limits={"liveness_timeout_s": 30.0})
    await ready(supervisor)
    (tmp_path / "sick").touch()
    await asyncio.sleep(0.2)
    (tmp_path / "sick").unlink()
    assert supervisor.accepting
    assert supervisor.restarts == 0


async def test_a_taken_port_is_named_and_no_engine_is_started(start):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        supervisor = await start(port=port)
        await until(lambda: supervisor.restarts >= 1, "a restart")
        assert supervisor.last_exit == f"cannot listen on 127.0.0.1:{port}: address already in use"
    await ready(supervisor)


async def test_a_drain_stops_accepting_at_once_and_lets_the_engine_finish(start, tmp_path):
    supervisor = await start(drain_s=0.4)
    await ready(supervisor)
    supervisor.request_drain()
    assert not supervisor.accepting
    assert supervisor.phase is Phase.DRAINING
    pid = supervisor.pid
    await asyncio.sleep(0.2)
    assert alive(pid)
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")
    assert not alive(pid)
    assert "drains" in (tmp_path / "engine.log").read_text()
    assert supervisor.restarts == 0


async def test_an_engine_that_ignores_the_drain_is_killed_at_the_bound(start):
    supervisor = await start(deaf=True, limits={"drain_timeout_s": 0.3})
    await ready(supervisor)
    pid = supervisor.pid
    supervisor.request_drain()
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")
    assert not alive(pid)


async def test_a_second_wish_kills_without_waiting(start):
    supervisor = await start(drain_s=600.0, limits={"drain_timeout_s": 600.0})
    await ready(supervisor)
    supervisor.request_drain()
    supervisor.request_kill()
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")


async def test_a_drain_during_the_start_ends_it(start):
    supervisor = await start(start_delay_s=600.0)
    await until(lambda: supervisor.pid is not None, "a process")
    supervisor.request_drain()
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")


async def test_a_drain_during_back_off_ends_it(start):
    supervisor = await start(error="x", rules=SupervisorRules(first_backoff_s=600.0, last_backoff_s=600.0))
    await until(lambda: supervisor.phase is Phase.BACKOFF, "back-off")
    supervisor.request_drain()
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")


async def test_a_question_to_the_core_does_not_keep_the_engine_from_ending(start, tmp_path):
    supervisor = await start(asked_file=str(tmp_path / "asked"), rules=replace(QUICK, end_grace_s=600.0))
    await ready(supervisor)
    await until((tmp_path / "asked").exists, "a question")
    supervisor.request_drain()
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")


async def test_the_end_of_a_group_is_waited_for(tmp_path):
    """Processes end some time after SIGKILL: the next engine must not start beside them."""
    script = "import os, sys, time; os.setpgid(0, 0); print(flush=True); time.sleep(float(sys.argv[1]))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, "0.3", stdout=asyncio.subprocess.PIPE)
    await process.stdout.readline()
    assert lives_in_group(process.pid)
    await wait_for_group_end(process.pid)
    assert not alive(process.pid)
    assert not lives_in_group(process.pid)
    await process.wait()


async def test_a_crash_leaves_no_worker_of_the_engine_behind(start, tmp_path):
    supervisor = await start(crash_file=str(tmp_path / "crash"), worker_file=str(tmp_path / "worker"))
    await ready(supervisor)
    worker = int((tmp_path / "worker").read_text())
    assert alive(worker)
    (tmp_path / "crash").touch()
    await until(lambda: supervisor.restarts >= 1, "a restart")
    assert not alive(worker)


AGENT = """
import asyncio, json, os, sys
from pathlib import Path
from moe_contract.agent_config import EngineConfig
from moe_agent.supervisor.supervisor import EngineSupervisor, SupervisorRules

port, command = int(sys.argv[1]), json.loads(sys.argv[2])
engine = EngineConfig(port=port, model="m", served_name="fake")
async def main():
    rules = SupervisorRules(health_every_s=0.05)
    supervisor = EngineSupervisor(engine, command, dict(os.environ), Path(sys.argv[3]), rules)
    task = asyncio.create_task(supervisor.run())
    while not supervisor.accepting:
        await asyncio.sleep(0.02)
    print(supervisor.pid, flush=True)
    await task
asyncio.run(main())
"""


async def test_an_agent_that_is_killed_leaves_no_process_behind(tmp_path):
    port, worker_file = free_port(), tmp_path / "worker"
    command = [sys.executable, str(FAKE), str(port), json.dumps({"worker_file": str(worker_file)})]
    arguments = [str(port), json.dumps(command), str(tmp_path / "engine.log")]
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, *arguments, stdout=asyncio.subprocess.PIPE
    )
    engine = int(await agent.stdout.readline())
    worker = int(worker_file.read_text())
    assert alive(engine)
    assert alive(worker)
    agent.kill()
    await agent.wait()
    await until(lambda: not alive(engine) and not alive(worker), "all processes gone")
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        raise AssertionError("the port is still served")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("all is well\nbye\n", "bye"),
        ("(EngineCore pid=1) ERROR 08-01 [core.py:5] ValueError: no memory\n  frame\n", "ValueError: no memory"),
        (
            "ValueError: root\nRuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: root",
        ),
        (
            "usage: api_server\napi_server.py: error: unrecognized arguments: --x\n",
            "error: unrecognized arguments: --x",
        ),
        (
            "(EngineCore_DP0 pid=7) ValueError: too long\n"
            "(APIServer pid=1) WARNING 08-01 12:00:00 [a.py:5] First inference may OOM due to MemoryError: lower it\n",
            "ValueError: too long",
        ),
        ("(APIServer pid=1) WARNING 08-01 12:00:00 [a.py:5] may fail with torch.OutOfMemoryError: lower it\n", ""),
        ("(APIServer pid=1) INFO 08-01 12:00:00 [a.py:5] Using max model len 4096\n", ""),
        ("\x1b[1;36m(Worker pid=1)\x1b[0;0m WARNING 08-01 12:00:00 [a.py:5] OOM\nbye\n", "bye"),
        ("/x/y.py:3: UserWarning: CUDA out of memory is near\n  warn()\n", "warn()"),
        ("[W1129 12:00:00.1 ProcessGroupNCCL.cpp:1] Warning: out of memory\n[rank0]: ValueError: x\n", "ValueError: x"),
        (
            "(EngineCore_DP0 pid=7) ERROR 08-01 12:00:00 [core.py:1] EngineCore failed to start.\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. "
            "Failed core proc(s): {'EngineCore_DP0': 1}\n",
            "EngineCore failed to start.",
        ),
        (
            "(APIServer pid=1) INFO 08-01 12:00:00 [a.py:5] loading\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. "
            "Failed core proc(s): {'EngineCore_DP0': -9}\n",
            "RuntimeError: Engine core initialization failed. See root cause above. "
            "Failed core proc(s): {'EngineCore_DP0': -9}",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Invalid repository ID or local directory specified: 'x'.\n",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
            "Value error, Invalid repository ID or local directory specified: 'x'.",
        ),
        (
            "terminate called after throwing an instance of 'std::bad_alloc'\n  what():  x\n",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        ("Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File x\n", "Fatal Python error: Segmentation fault"),
        ("MemoryError\n", "MemoryError"),
        ("ValueError: model\x1b]0;x\x07\tgone\n", "ValueError: model ]0;x  gone"),
    ],
)
def test_the_error_line_is_the_last_that_says_why(text, line):
    assert find_error_line(text) == line


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "exit status 0: x"), (1, "exit status 1: x"), (137, "killed by SIGKILL"), (-11, "killed by SIGSEGV")],
)
def test_an_exit_is_described(status, text):
    assert describe_exit(status, "x") == text


async def test_an_engine_without_a_server_is_ready_while_its_process_lives(start, tmp_path):
    crash = tmp_path / "crash"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        supervisor = await start(headless=True, port=other.getsockname()[1], start_delay_s=600.0, crash_file=str(crash))
        await ready(supervisor)
        first = supervisor.pid
        crash.touch()
        await until(lambda: supervisor.restarts == 1, "a restart")
        assert "no memory left for the KV cache" in supervisor.last_exit
        crash.unlink()
        await until(lambda: supervisor.phase is Phase.READY and supervisor.pid not in {None, first}, "ready again")


async def test_an_engine_without_a_server_is_drained_by_sigterm(start):
    supervisor = await start(headless=True)
    await until(lambda: supervisor.phase is Phase.READY and supervisor.pid is not None, "ready")
    supervisor.request_drain()
    assert not supervisor.accepting
    await until(lambda: supervisor.phase is Phase.STOPPED, "stopped")

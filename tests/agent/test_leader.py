"""A worker of a replica over several nodes outlasts its leader, also when both get the signal at the same moment."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from moe_agent.supervisor import leader as leader_module
from moe_agent.supervisor.leader import SILENT, Leader
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase, SupervisorRules
from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import (
    END_GRACE_S,
    ENGINE_NOTICE_S,
    LEADER_NOTICE_S,
    SETTLE_S,
    engine_grace_s,
    leader_end_s,
    worker_grace_s,
)

FAKE = Path(__file__).with_name("fake_engine.py")
QUICK = SupervisorRules(first_backoff_s=0.05, last_backoff_s=0.2, health_every_s=0.02, settle_s=0.05, end_grace_s=5.0)


class LeadersAgent:
    """Answers `/v1/state` with the phases of a list, one at each question; the last one stays."""

    def __init__(self, *phases: str) -> None:
        self.phases, self.asked = [*phases], 0
        self.questioned = asyncio.Event()

    async def state(self, request: web.Request) -> web.Response:
        self.asked += 1
        self.questioned.set()
        phase = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        if phase == "silent":
            return web.Response(status=500)
        return web.json_response({"phase": phase, "engine": {}, "ranks": [], "config": {}})


@contextlib.asynccontextmanager
async def served(agent: LeadersAgent) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/v1/state", agent.state)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await web.SockSite(runner, listener).start()
        try:
            yield listener.getsockname()[1]
        finally:
            await runner.cleanup()


@pytest.mark.parametrize(
    ("phases", "asked"),
    [
        (("ready", "ready", "draining", "draining", "stopped"), 5),
        (("starting",), 1),
        (("backoff",), 1),
        (("draining", *["silent"] * SILENT), SILENT + 1),
        # An answer that is missing once is no end.
        (("draining", "silent", "draining", "stopped"), 4),
    ],
)
async def test_the_leader_has_ended_once_it_says_so_or_is_silent_for_long(phases, asked):
    agent = LeadersAgent(*phases)
    async with served(agent) as port:
        leader = Leader("localhost", port, every_s=0.0)
        await leader.find()
        await asyncio.wait_for(leader.wait_for_end(), 60)
    assert agent.asked == asked


async def test_the_address_is_kept_when_the_name_is_gone(monkeypatch):
    """The controller's Service goes with its leader's pod, before the leader has drained."""
    names = {"set-0.set-0.ns": ("127.0.0.1", 0)}

    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host][0], port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    agent = LeadersAgent("draining", "stopped")
    async with served(agent) as port:
        leader = Leader("set-0.set-0.ns", port, every_s=0.0)
        await leader.find()
        del names["set-0.set-0.ns"]
        await asyncio.wait_for(leader.wait_for_end(), 60)
    assert agent.asked == 2


async def test_a_name_that_comes_later_is_found_then(monkeypatch):
    tries = []

    async def resolve(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::7", port, 0, 0))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    monkeypatch.setattr(leader_module, "LOOK_UP_EVERY_S", 0.0)
    leader = Leader("set-0.set-0.ns", 8080)
    await leader.find()
    assert (leader.url, len(tries)) == ("http://[fd00::7]:8080", 3)


async def test_a_leader_that_was_never_found_is_not_waited_for():
    await asyncio.wait_for(Leader("nowhere.invalid", 1).wait_for_end(), 60)


async def worker(tmp_path: Path, leader: Leader) -> tuple[EngineSupervisor, asyncio.Task[None]]:
    """The supervisor of a worker's engine, which lives."""
    engine = EngineConfig(port=1, model="m", served_name="fake", drain_timeout_s=60.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(FAKE), str(port), json.dumps({})]
    supervisor = EngineSupervisor(
        engine,
        command,
        dict(os.environ),
        tmp_path / "engine.log",
        QUICK,
        headless=True,
        leader_end=leader.wait_for_end,
    )
    task = asyncio.create_task(supervisor.run())
    while supervisor.phase is not Phase.READY or "fake_engine" not in read_command(supervisor.pid):
        await asyncio.sleep(0.01)
    return supervisor, task


def read_command(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


async def test_a_worker_lives_until_its_leader_has_drained(tmp_path):
    agent = LeadersAgent("draining")
    async with served(agent) as port:
        leader = Leader("127.0.0.1", port, every_s=0.01)
        await leader.find()
        supervisor, task = await worker(tmp_path, leader)
        supervisor.request_drain()
        while agent.asked < 10:
            agent.questioned.clear()
            await asyncio.wait_for(agent.questioned.wait(), 60)
        assert (supervisor.phase, task.done()) == (Phase.DRAINING, False)
        assert supervisor.pid is not None
        agent.phases = ["stopped"]
        await asyncio.wait_for(task, 60)
    assert supervisor.phase is Phase.STOPPED


async def test_a_second_signal_ends_a_worker_at_once(tmp_path):
    agent = LeadersAgent("ready")
    async with served(agent) as port:
        leader = Leader("127.0.0.1", port, every_s=0.01)
        await leader.find()
        supervisor, task = await worker(tmp_path, leader)
        supervisor.request_drain()
        await asyncio.wait_for(agent.questioned.wait(), 60)
        supervisor.request_kill()
        await asyncio.wait_for(task, 60)


async def test_a_worker_whose_engine_ends_waits_for_nothing(tmp_path):
    agent = LeadersAgent("ready")
    async with served(agent) as port:
        leader = Leader("127.0.0.1", port, every_s=0.01)
        await leader.find()
        supervisor, task = await worker(tmp_path, leader)
        pid = supervisor.pid
        supervisor.request_drain()
        await asyncio.wait_for(agent.questioned.wait(), 60)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(task, 60)


@pytest.mark.parametrize("drain_s", [1.0, 120.0, 3600.0])
def test_a_worker_has_the_time_to_outlast_the_longest_drain_of_its_leader(drain_s):
    leaders_end_s = ENGINE_NOTICE_S + SETTLE_S + drain_s + END_GRACE_S
    assert leader_end_s(drain_s) >= leaders_end_s + LEADER_NOTICE_S
    assert worker_grace_s(drain_s) > ENGINE_NOTICE_S + leader_end_s(drain_s) + END_GRACE_S
    assert worker_grace_s(drain_s) > engine_grace_s(drain_s)

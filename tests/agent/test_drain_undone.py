"""A drain that is undone: the engine starts again, in an agent that ends as ever."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase
from moe_contract.addresses import LOOPBACK, http_url
from moe_contract.agent_config import EngineConfig
from moe_contract.clients import AgentClient, Refused

from tests.agent.test_agent_process import agent_process, until


async def test_a_drained_engine_serves_again_and_its_agent_ends_at_sigterm(tmp_path):
    async with agent_process(tmp_path, LOOPBACK, {}) as config, aiohttp.ClientSession() as session:
        client = AgentClient(session, http_url(LOOPBACK, config["listen"]["port"]))

        async def is_in(phase: str) -> bool:
            return (await client.state()).phase == phase

        with pytest.raises(Refused, match="not drained"):
            await client.resume(["secret"])
        for _ in range(2):
            await client.drain(["secret"])
            await until(lambda: is_in("stopped"))
            with pytest.raises(Refused, match="token"):
                await client.resume(["wrong"])
            await client.resume(["secret"])
            await until(lambda: is_in("ready"))
        assert (await client.state()).engine.restarts == 0


def make(folder: Path) -> EngineSupervisor:
    return EngineSupervisor(EngineConfig(port=1, model="m", served_name="m"), ["false"], {}, folder / "engine.log")


@pytest.mark.parametrize(
    ("asked", "taken"), [((), False), (("drain",), True), (("end",), False), (("drain", "end"), False)]
)
async def test_only_a_drain_that_is_not_the_end_is_undone(tmp_path, asked, taken):
    supervisor = make(tmp_path)
    for what in asked:
        getattr(supervisor, f"request_{what}")()
    assert supervisor.request_resume() is taken


async def test_a_drain_after_it_was_undone_holds(tmp_path):
    """No engine starts: the second drain came before the first one had ended."""
    supervisor, leave = make(tmp_path), asyncio.Event()
    supervisor.request_drain()
    supervisor.request_resume()
    supervisor.request_drain()
    running = asyncio.create_task(supervisor.run_until(leave))
    while supervisor.phase is not Phase.STOPPED:
        await asyncio.sleep(0)
    assert not running.done()
    leave.set()
    await asyncio.wait_for(running, 60)
    assert supervisor.phase is Phase.STOPPED

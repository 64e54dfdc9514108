"""The agent as a process: the families of addresses that it and its engine answer, and the engine's environment."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from moe_contract.addresses import ANY, LOOPBACK, LOOPBACK_IPV6, bind_socket, http_url, is_bindable
from moe_contract.clients import AgentClient
from moe_contract.one_connection import one_connection
from moe_contract.pod_identity import UID_VARIABLE
from moe_operator.kubernetes.peers import Peer, put_settings

PROGRAM = Path(__file__).with_name("agent_with_fake_engine.py")
needs_ipv6 = pytest.mark.skipif(not is_bindable(LOOPBACK_IPV6), reason="this machine has no IPv6 on loopback")


def free_port() -> int:
    with bind_socket(ANY, 0) as probe:
        return int(probe.getsockname()[1])


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def agent_process(folder: Path, host: str, environment: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
    """A running agent and its engine, both ready; yields its configuration."""
    config = {
        "run_dir": str(folder / "run"),
        "listen": {"host": host, "port": free_port()},
        "token_file": str(folder / "token"),
        "engine": {"host": host, "port": free_port(), "model": str(folder), "served_name": "fake"},
    }
    (folder / "token").write_text("secret")
    (folder / "agent.json").write_text(json.dumps(config))
    ways = json.dumps({"environment_file": str(folder / "environment.json")})
    command = [sys.executable, str(PROGRAM), str(folder / "agent.json"), ways]
    with (folder / "agent.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=os.environ | environment, stderr=log)
    try:
        own = LOOPBACK_IPV6 if host == LOOPBACK_IPV6 else LOOPBACK

        async def ready() -> bool:
            assert process.returncode is None, (folder / "agent.log").read_text()
            return await answers(http_url(own, config["listen"]["port"]) + "/readyz")

        await until(ready)
        yield config
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def state_of(host: str, config: dict[str, Any]) -> dict[str, Any]:
    url = http_url(host, config["listen"]["port"]) + "/v1/state"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return dict(await answer.json())


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "reached"),
    [(ANY, {LOOPBACK, LOOPBACK_IPV6}), (LOOPBACK_IPV6, {LOOPBACK_IPV6}), (LOOPBACK, {LOOPBACK})],
)
async def test_agent_and_engine_answer_in_the_families_of_their_address(tmp_path, host, reached):
    async with agent_process(tmp_path, host, {}) as config:
        for port, path in ((config["listen"]["port"], "/readyz"), (config["engine"]["port"], "/health")):
            found = {one for one in (LOOPBACK, LOOPBACK_IPV6) if await answers(http_url(one, port) + path)}
            assert found == reached
        own = LOOPBACK_IPV6 if host == LOOPBACK_IPV6 else LOOPBACK
        state = await state_of(own, config)
        assert state["engine"]["url"] == http_url(own, config["engine"]["port"])


async def test_the_engine_has_no_variable_of_a_service_and_no_proxy_stands_before_it(tmp_path):
    environment = {
        "VLLM_SERVICE_HOST": "10.96.0.7",
        "VLLM_SERVICE_PORT": "80",
        "VLLM_PORT": "tcp://10.96.0.7:80",
        "VLLM_PORT_80_TCP": "tcp://10.96.0.7:80",
        "VLLM_PORT_80_TCP_ADDR": "10.96.0.7",
        "MASTER_PORT": "29500",
        "MOESERVING_POD_NAME": "olmoe-engine-5d9c-x7",
        # Nobody listens there: a health check through it would fail.
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }
    async with agent_process(tmp_path, ANY, environment) as config:
        found = json.loads((tmp_path / "environment.json").read_text())
        assert (await state_of(LOOPBACK, config))["name"] == "olmoe-engine-5d9c-x7"
    assert [name for name in found if name.startswith(("VLLM_PORT", "VLLM_SERVICE"))] == []
    assert found["MASTER_PORT"] == "29500"
    assert found["HTTP_PROXY"] == "http://127.0.0.1:1", "downloads go there"
    assert "127.0.0.1" in found["NO_PROXY"].split(",")


async def test_the_operators_settings_come_on_the_connection_on_which_the_agent_says_its_uid(tmp_path):
    """Its server keeps the connection open for the call that follows, and after a token that it does not know."""
    async with agent_process(tmp_path, LOOPBACK, {UID_VARIABLE: "mine"}) as config:
        url = http_url(LOOPBACK, config["listen"]["port"])
        peer = Peer(pod="p", url=url, component="engine", revision="stable", uid="mine", says_uid=True)
        assert await put_settings(peer, {"request": {"policy": "fcfs"}}, ("newer", "secret")) == ""
        assert (await state_of(LOOPBACK, config))["config"]["request"]["policy"] == "fcfs"
        other = replace(peer, uid="other")
        assert await put_settings(other, {"request": {"policy": "sjf"}}, ("secret",)) == (
            "another pod answers at its address"
        )
        assert (await state_of(LOOPBACK, config))["config"]["request"]["policy"] == "fcfs"
        async with one_connection() as session:
            client = AgentClient(session, url)
            await client.state()
            await client.put_settings({"request": {"policy": "sjf"}}, ("newer", "newest", "secret"))


async def test_a_port_that_is_taken_in_the_other_family_is_reported(tmp_path):
    if not is_bindable(LOOPBACK_IPV6):
        pytest.skip("this machine has no IPv6 on loopback")
    with socket.create_server((LOOPBACK_IPV6, 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        config = {
            "run_dir": str(tmp_path),
            "listen": {"host": ANY, "port": port},
            "token_file": str(tmp_path / "token"),
            "engine": {"port": free_port(), "model": str(tmp_path), "served_name": "fake"},
        }
        (tmp_path / "token").write_text("secret")
        (tmp_path / "agent.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "moe_agent", "--config", str(tmp_path / "agent.json")]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().strip().endswith(f"listen: cannot listen on [::]:{port}: address already in use")

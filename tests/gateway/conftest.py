"""A real gateway on loopback sockets, in front of engines and agents that do as a test's script says.

`serve` starts a gateway and returns it running; `make_engine` starts an engine with its agent. An exception that nobody
caught, which the event loop reports, fails the test.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway
from pydantic.alias_generators import to_camel

from tests.gateway.clients import KEY, TOKEN, Served
from tests.gateway.fake_api import FakeApi
from tests.gateway.peers import FakeAgent, MockEngine, Script, answer_ok
from tests.gateway.waiting import free_port, until

# As the endpoint picker sets it before gRPC is imported: handlers of gRPC run in no process that is about to start.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """The loop that the product runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def unreported() -> AsyncIterator[list[dict[str, Any]]]:
    """What the event loop reports, exceptions out of callbacks above all, fails the test."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: reports.append(context))
    yield reports
    assert reports == []


@pytest.fixture
async def make_engine(unreported: Any) -> AsyncIterator[Callable[..., Awaitable[MockEngine]]]:
    """Starts an engine, with an agent unless `agent=False`."""
    engines: list[MockEngine] = []

    async def make(
        script: Script = answer_ok,
        *,
        name: str = "",
        agent: bool = True,
        ranks: int = 1,
        start: bool = True,
        host: str = "127.0.0.1",
    ) -> MockEngine:
        engine = MockEngine(name or f"engine-{len(engines)}", script, host)
        engines.append(engine)
        if start:
            await engine.start()
        if agent:
            engine.agent = FakeAgent(engine.url, ranks, host)
            await engine.agent.start()
        return engine

    yield make
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def serve(make_engine: Any, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Starts a gateway in front of these engines and waits until it accepts requests for all of them."""
    running: list[Served] = []

    async def start(*engines: MockEngine, ranks: int = 1, ready: bool = True, **sections: Any) -> Served:
        (tmp_path / "token").write_text(TOKEN)
        document = {
            "listen": {"port": free_port()},
            "admin": {"port": free_port()},
            "token_file": str(tmp_path / "token"),
            **({"engines": [engine.address | {"ranks": ranks} for engine in engines]} if engines else {}),
            **sections,
        }
        config = parse_model(GatewayConfig, document)
        served = Served(Gateway(config, ControlTokens(tmp_path / "token")), config)
        await served.gateway.start()
        running.append(served)
        if ready:
            states = served.gateway.dispatcher.target_states
            await until(lambda: all(row.accepting for row in states.values()), "a ready gateway")
        return served

    yield start
    for served in running:
        await served.close()


@pytest.fixture
def limited(make_engine: Any, serve: Any, tmp_path: Path) -> Callable[..., Awaitable[tuple[MockEngine, Served]]]:
    """Starts a gateway whose clients need `KEY`, of the tenant `team-a`, with this class and quota."""

    async def start(
        script: Script = answer_ok, *, engines: int = 1, priority: int | None = None, **quota: int
    ) -> tuple[MockEngine, Served]:
        folder = tmp_path / "keys"
        folder.mkdir()
        spelt = {to_camel(name): bound for name, bound in quota.items()}
        (folder / "team-a").write_text(json.dumps({"keys": [KEY], "priority": priority, "quota": spelt}))
        made = [await make_engine(script) for _ in range(engines)]
        return made[0], await serve(*made, auth={"key_dirs": [str(folder)]})

    return start


@pytest.fixture
async def api(unreported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApi]:
    """An API server, which gateways find by `KUBECONFIG`."""
    server = FakeApi(tmp_path, free_port())
    await server.start()
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    yield server
    await server.stop()


@pytest.fixture
async def discover(serve: Any, api: FakeApi) -> Callable[..., Awaitable[Served]]:
    """Starts a gateway that finds its engines there: in the group `tiny-engine`, unless other weights are given."""

    async def start(weights: dict[str, int] | None = None, *, synced: bool = True, **sections: Any) -> Served:
        groups = [{"service": name, "weight": weight} for name, weight in (weights or {"tiny-engine": 100}).items()]
        served = await serve(ready=False, discovery={"namespace": "models", "groups": groups}, **sections)
        if synced:
            await until(lambda: served.gateway.ready, "an answer of the API server")
        return served

    return start


@pytest.fixture
async def front(serve: Any, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Starts the endpoint picker for these engines and an Envoy in front of them."""
    from tests.gateway.fronted import Fronts

    fronts = Fronts(serve, tmp_path)
    yield fronts.start
    await fronts.stop()


@pytest.fixture
def fleet(make_engine: Any, serve: Any) -> Callable[..., Awaitable[Any]]:
    """Starts a gateway before engines with these roles, which exchange KV blocks."""
    from tests.gateway.split_fleet import start_fleet

    return partial(start_fleet, make_engine, serve)

"""A real Envoy in front of engines, and the gateway that picks for it."""

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from moe_gateway.gateway import Gateway

from tests.gateway.clients import Served
from tests.gateway.envoy import Envoy
from tests.gateway.peers import MockEngine
from tests.gateway.waiting import free_port

PATIENCE_S = 60.0


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


@dataclass
class Fronted:
    """An Envoy, the gateway process that picks for it, and the engines behind both."""

    envoy: Envoy
    served: Served
    engines: tuple[MockEngine, ...]
    session: aiohttp.ClientSession
    port: int
    answers: list[Any] = field(default_factory=list)

    @property
    def gateway(self) -> Gateway:
        return self.served.gateway

    async def ask(
        self, body: Any, path: str = "/v1/completions", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.session.post(self.envoy.url + path, headers=headers, data=data) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text

    def got(self) -> list[int]:
        """Requests by engine, without lists of models."""
        return [sum(b"POST" in request.line for request in engine.requests) for engine in self.engines]

    async def settled(self) -> None:
        """Nothing is in flight or held any more."""
        dispatcher = self.gateway.dispatcher
        await until(lambda: dispatcher.in_flight == 0 and dispatcher.held == 0, "nothing in flight")
        picker = self.gateway._picker
        assert picker is not None
        await until(lambda: not picker._parts.open, "no open request")


Front = Callable[..., Awaitable[Fronted]]


class Fronts:
    """Starts gateways with an Envoy in front, and ends what it started.

    Args:
        serve: the fixture that starts gateways.
        folder: for configurations.
    """

    def __init__(self, serve: Any, folder: Path) -> None:
        self._serve = serve
        self._folder = folder
        self._started: list[Fronted] = []

    async def start(
        self,
        *engines: MockEngine,
        ready: bool = True,
        picker: dict[str, Any] | None = None,
        envoy: Any = None,
        **sections: Any,
    ) -> Fronted:
        """The endpoint picker for these engines and an Envoy in front of them."""
        port = free_port()
        section = {"listen": {"port": port}, **(picker or {})}
        served = await self._serve(*engines, ready=ready, listen=None, endpoint_picker=section, **sections)
        process = Envoy(self._folder, port, tls=bool(section.get("tls")), **(envoy or {}))
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S))
        fronted = Fronted(process, served, engines, session, port)
        self._started.append(fronted)
        await process.start()
        return fronted

    async def stop(self) -> None:
        """Ends clients and proxies."""
        for fronted in self._started:
            await fronted.session.close()
        for fronted in self._started:
            await fronted.envoy.stop()


async def two(make_engine: Any) -> tuple[MockEngine, MockEngine]:
    return await make_engine(), await make_engine()

"""A stand-in for all agents and gateways: answers at every loopback address, once or as a stream of states.

It says that it is idle. Of one address a number of restarts can be set, which each stream of that address then carries.
"""

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from aiohttp import web
from moe_contract.routes import CONFIG, STATE, STREAM_HEARTBEAT_S
from moe_contract.state_stream import parse_interval, stream_headers

Document = dict[str, Any]


class StandIn:
    """The states by address.

    Args:
        pods: name and uid of the pod at each address, which its state repeats.

    Attributes:
        port: at which it listens, on every loopback address.
    """

    def __init__(self, pods: Mapping[str, Document]) -> None:
        self.port, self._pods = 0, pods
        self._settings: defaultdict[str, Document] = defaultdict(dict)
        self._restarts: defaultdict[str, int] = defaultdict(int)
        self._changed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def restart(self, address: str) -> int:
        """Counts one more restart at an address; returns how many there are."""
        self._restarts[address] += 1
        self._wake(address)
        return self._restarts[address]

    def _wake(self, address: str) -> None:
        self._changed.pop(address, asyncio.Event()).set()

    def _state(self, address: str) -> bytes:
        state = build_state(self._settings[address], self._restarts[address]) | {"pod": self._pods.get(address, {})}
        return orjson.dumps(state) + b"\n"

    async def get_state(self, request: web.Request) -> web.StreamResponse:
        """The state, or with `watch` the state now and after each change."""
        address = _address(request)
        if request.query.get("watch") != "1":
            return web.Response(body=self._state(address), content_type="application/json")
        stream = web.StreamResponse(headers=stream_headers(parse_interval(request.query)))
        # An operator that ends leaves its questions.
        with contextlib.suppress(ConnectionError):
            await stream.prepare(request)
            await stream.write(self._state(address))
            while True:
                await stream.write(await self._next(address))
        return stream

    async def _next(self, address: str) -> bytes:
        """The state after a change, or an empty line after a while without one."""
        try:
            async with asyncio.timeout(STREAM_HEARTBEAT_S):
                await self._changed[address].wait()
        except TimeoutError:
            return b"\n"
        return self._state(address)

    async def put_config(self, request: web.Request) -> web.Response:
        """Takes settings, which are in force at that address from then on."""
        address = _address(request)
        self._settings[address].update(await request.json())
        self._wake(address)
        return web.json_response({})


def build_state(settings: Document, restarts: int = 0) -> Document:
    """The state of an idle agent and of an idle gateway at once."""
    return {
        "phase": "ready",
        "accepting": True,
        "engine": {"restarts": restarts, "last_exit": ""},
        "ranks": [{"rank": 0, "running": 0, "waiting": 0, "kv_usage": 0.0, "computed_tokens": 0}],
        "config": settings,
        "held": 0,
    }


@contextlib.asynccontextmanager
async def stand_in(pods: Mapping[str, Document]) -> AsyncIterator[StandIn]:
    """Listens until the end of the block; `pods` has the pod of each address."""
    made = StandIn(pods)
    app = web.Application()
    app.router.add_get(STATE, made.get_state)
    app.router.add_put(CONFIG, made.put_config)
    # A stream ends with its reader; none is waited for at the end.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listener:
        made.port = int(listener.getsockname()[1])
        await web.SockSite(runner, listener).start()
        try:
            yield made
        finally:
            await runner.cleanup()


def _address(request: web.Request) -> str:
    transport = request.transport
    return str(transport.get_extra_info("sockname")[0]) if transport is not None else ""

"""Clients: one raw connection each, and a running gateway with what a test does with it."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway

from tests.gateway.messages import parse_headers
from tests.gateway.peers import MockEngine
from tests.gateway.waiting import PATIENCE_S, until

TOKEN = "a-token"
# Of a client.
KEY = "sk-0123456789abcdef0123"
IN_FORCE_WITHIN_S = 1.0


@dataclass
class Answer:
    """`raw` is the message as it came, `body` its body without the frames of chunks."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def framed_body(self) -> bytes:
        return self.raw.split(b"\r\n\r\n", 1)[1]


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, head_only: bool = False) -> Answer:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        status, headers = int(head.split(b" ", 2)[1]), parse_headers(head)
        if head_only or status == 100:
            return Answer(status, headers, b"", head)
        framed, body = await asyncio.wait_for(self._body(headers), PATIENCE_S)
        return Answer(status, headers, body, head + framed)

    async def _body(self, headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
        if b"content-length" in headers:
            body = await self.reader.readexactly(int(headers[b"content-length"]))
            return body, body
        if b"transfer-encoding" not in headers:
            body = await self.reader.read()
            return body, body
        framed = body = b""
        while True:
            line = await self.reader.readuntil(b"\r\n")
            data = await self.reader.readexactly(int(line.split(b";")[0], 16) + 2)
            framed, body = framed + line + data, body + data[:-2]
            if len(data) == 2:
                return framed, body

    async def rest(self) -> bytes:
        """All that comes until the gateway ends the connection."""
        return await asyncio.wait_for(self.reader.read(), PATIENCE_S)

    async def ended(self) -> bool:
        """Whether the gateway ends the connection, by whatever means, and says nothing before."""
        try:
            return await self.rest() == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        self.writer.transport.abort()


class Served:
    """A running gateway and what a test does with it."""

    def __init__(self, gateway: Gateway, config: GatewayConfig) -> None:
        self.gateway = gateway
        self.config = config
        self._clients: list[Client] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.listen.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.config.admin.port}"

    async def connect(self, **options: Any) -> Client:
        port = self.config.listen.port
        client = Client(*await asyncio.open_connection("127.0.0.1", port, limit=options.pop("limit", 2**26), **options))
        self._clients.append(client)
        return client

    async def ask(self, request: bytes, *, head_only: bool = False) -> Answer:
        """One request on a connection of its own."""
        client = await self.connect()
        client.send(request)
        answer = await client.answer(head_only=head_only)
        client.writer.close()
        return answer

    async def held(self, count: int) -> None:
        await until(lambda: self.gateway.dispatcher.held == count, f"{count} held requests")

    @property
    def in_flight(self) -> int:
        return sum(state.in_flight for state in self.gateway.dispatcher.target_states.values())

    @property
    def accepting(self) -> set[str]:
        """Names of the engines that get new work."""
        return {target.server for target, row in self.gateway.dispatcher.target_states.items() if row.accepting}

    async def takes(self, *engines: MockEngine) -> None:
        """A change of the engines is in force within its bound: these get new requests and no others."""
        names, changed_s = {engine.name for engine in engines}, time.monotonic()
        await until(lambda: self.accepting == names, f"work for {sorted(names)} alone")
        assert time.monotonic() - changed_s < IN_FORCE_WITHIN_S

    def target_state(self, name: str, rank: int = 0) -> Any:
        return next(row for target, row in self.gateway.dispatcher.target_states.items() if target == (name, rank))

    async def close(self) -> None:
        for client in self._clients:
            client.writer.close()
        await self.gateway.close()


# The admin port.


async def get(served: Served, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(served.admin_url + path) as answer:
        return answer.status, await (answer.json() if answer.content_type == "application/json" else answer.text())


async def put(served: Served, body: Any, token: str | None = TOKEN) -> tuple[int, Any]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    data = {"data": body} if isinstance(body, bytes) else {"json": body}
    url = served.admin_url + "/v1/config"
    async with aiohttp.ClientSession() as session, session.put(url, headers=headers, **data) as answer:
        return answer.status, await answer.json()

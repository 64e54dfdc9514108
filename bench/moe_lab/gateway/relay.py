"""A relay that does as little as a proxy in Python can: `python -m moe_lab.gateway.relay KIND PORT ENGINE_PORT...`.

It chooses nothing, keeps no accounts and knows no errors: it shows the share of a CPU second that asyncio, the
kernel and a parser take. Each request of a connection has the connection of an engine to itself, and the
engines take turns.

Invariant: for the load of the comparison its clients get the engine's answer.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import cycle
from typing import Any

import httptools
import uvloop


class RelayKind(StrEnum):
    """What a relay does with the bytes.

    `UNREAD`: each client's connection has one of its own to an engine, and bytes pass as they come. `FRAMED`: llhttp
    tells where requests and answers end, so that each request goes to an engine of its own; their bytes pass as they
    came. `REWRITTEN`: the same, and both heads are read header by header and written anew, as a proxy has to that
    sets one.
    """

    UNREAD = "unread"
    FRAMED = "framed"
    REWRITTEN = "rewritten"


class RelaySide(asyncio.Protocol):
    """One connection, and the one that its bytes go to."""

    def __init__(self) -> None:
        self.other: Any = None
        self.write: Callable[[bytes], None]
        self._transport: asyncio.BaseTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        # uvloop's transports are no subclass of the one that can write.
        self.write = transport.write  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.close()

    def close(self) -> None:
        """Ends this connection, and so the other one."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self.other.write(data)


class UnreadClient(RelaySide):
    """A client's connection that has one of its own to an engine."""

    def __init__(self, ports: "cycle[int]") -> None:
        super().__init__()
        self._ports = ports
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        _, engine = await asyncio.get_running_loop().create_connection(RelaySide, "127.0.0.1", next(self._ports))
        self.other, engine.other = engine, self
        engine.write(self._early)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early += data
        else:
            self.other.write(data)


class FramedEngine(RelaySide):
    """An engine's connection, free for the next request at the end of an answer."""

    def __init__(self, idle: "list[FramedEngine]") -> None:
        super().__init__()
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        client = self.other
        self._parser.feed_data(data)
        client.write(data)

    def on_message_complete(self) -> None:
        self.other = None
        self._idle.append(self)


class RewritingEngine(FramedEngine):
    """An engine's connection that writes the head of an answer anew; the load's heads come in one read."""

    def __init__(self, idle: list[FramedEngine]) -> None:
        super().__init__(idle)
        self._lines: list[bytes] = []
        self._has_head = False

    def data_received(self, data: bytes) -> None:
        client, had_head = self.other, self._has_head
        self._parser.feed_data(data)
        if not had_head:
            head = b"HTTP/1.1 %d OK\r\n%b\r\n" % (self._parser.get_status_code(), b"".join(self._lines))
            self._lines.clear()
            data = head + data[data.index(b"\r\n\r\n") + 4 :]
        client.write(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_message_complete(self) -> None:
        self._has_head = False
        super().on_message_complete()


class RelayPool:
    """The idle connections to each engine."""

    def __init__(self, ports: Sequence[int], kind: type[FramedEngine]) -> None:
        self._turns = cycle(ports)
        self._kind = kind
        self._idle: dict[int, list[FramedEngine]] = {port: [] for port in ports}
        self._connecting: set[asyncio.Task[None]] = set()

    def send(self, client: RelaySide, request: bytes) -> None:
        """Sends a request to the engine whose turn it is; its answer goes to the client."""
        port = next(self._turns)
        if idle := self._idle[port]:
            engine = idle.pop()
            engine.other = client
            engine.write(request)
        else:
            task = asyncio.get_running_loop().create_task(self._connect(port, client, request))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, port: int, client: RelaySide, request: bytes) -> None:
        make = lambda: self._kind(self._idle[port])  # noqa: E731 - a factory
        _, engine = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port)
        engine.other = client
        engine.write(request)


class FramedClient(RelaySide):
    """A client's connection whose requests pass as they came."""

    def __init__(self, engines: RelayPool) -> None:
        super().__init__()
        self._engines = engines
        self._pieces: list[bytes] = []
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        request = b"".join(self._pieces)
        self._pieces.clear()
        self._engines.send(self, request)


class RewritingClient(FramedClient):
    """A client's connection whose requests get a new head."""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._pieces.append(b"POST %b HTTP/1.1\r\n" % url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pieces.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        self._pieces.append(b"\r\n")

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)


async def serve(kind: RelayKind, port: int, ports: Sequence[int]) -> None:
    """Serves on a port of the loopback until killed."""
    turns = cycle(ports)
    rewrites = kind is RelayKind.REWRITTEN
    engines = RelayPool(ports, RewritingEngine if rewrites else FramedEngine)

    def make() -> RelaySide:
        if kind is RelayKind.UNREAD:
            return UnreadClient(turns)
        return RewritingClient(engines) if rewrites else FramedClient(engines)

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(RelayKind(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3:]]))

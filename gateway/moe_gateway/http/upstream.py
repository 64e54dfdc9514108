"""Connections to engines: one request at a time on each, kept open and used again.

An exchange takes a connection from the engine's pool, writes its request, and gets the answer's bytes as they come. The
parser only looks for the ends of the head and of the message; the bytes themselves are passed on unchanged.
"""

import asyncio
from typing import Protocol

import httptools
from moe_contract.peer_tokens import PeerTokens

from moe_gateway.http.bodies import Body, LargeBody

LONGEST_HEAD_BYTES = 256 * 1024


class Receiver(Protocol):
    """The exchange that gets the answer."""

    def received(self, data: bytes, connection: "UpstreamConnection") -> None:
        """More bytes of the answer came; `connection` has its state."""

    def lost(self, connection: "UpstreamConnection", reason: str) -> None:
        """The connection ended, or its bytes were not HTTP, before the answer was whole."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine.

    Attributes:
        status: of the answer, once `head_complete`.
        head_complete: whether the head of the answer is there.
        complete: whether the whole answer is there.
        overrun: whether bytes came after it that belong to no answer.
        reused: whether it has served a request before, so that the engine may just have closed it as idle.
    """

    __slots__ = (
        "_parser",
        "_pool",
        "complete",
        "head_complete",
        "keep_alive",
        "overrun",
        "receiver",
        "reused",
        "status",
        "transport",
    )

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.receiver: Receiver | None = None
        self.reused = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.head_complete = False
        self.complete = False
        self.overrun = False
        self.keep_alive = False

    # What an exchange calls.

    def request(self, receiver: Receiver, head: bytes, body: Body) -> None:
        """Writes a request; the answer goes to `receiver`."""
        assert self.transport is not None
        self._reset()
        self.receiver = receiver
        if (tokens := self._pool.tokens) is not None:
            head = head[:-2] + tokens.head_end
        if isinstance(body, LargeBody):
            self.transport.writelines((head, *body.parts))
        elif len(body) < 16384:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)

    def release(self) -> None:
        """The answer is whole: returns the connection to its pool, or closes it if it cannot be used again."""
        self.receiver = None
        if self.keep_alive and self.complete and not self.overrun:
            self.reused = True
            self._pool.put(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Closes the connection at once, by which the engine learns that its answer is not wanted."""
        self.receiver = None
        if self.transport is not None:
            self.transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is None:
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.complete:
                # It was not closed as idle.
                self.reused = False
                self._lose("the engine's answer is not HTTP")
                return
            self.overrun = True
        receiver.received(data, self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.remove(self)
        self.transport = None
        self._lose("the engine closed the connection" if exc is None else f"the connection to the engine failed: {exc}")

    def _lose(self, reason: str) -> None:
        receiver, self.receiver = self.receiver, None
        if self.transport is not None:
            self.transport.abort()
        if receiver is not None:
            receiver.lost(self, reason)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self.complete:
            self.overrun = True

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        self.head_complete = self.status >= 200

    def on_message_complete(self) -> None:
        if self.head_complete and not self.complete:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()


class Pool:
    """The idle connections to one address, newest last; makes new ones.

    Attributes:
        tokens: shown to the engine with each request; None: the engine is not shown any.
    """

    def __init__(self, host: str, port: int, connect_timeout_s: float, tokens: PeerTokens | None = None) -> None:
        self.tokens = tokens
        self._host = host
        self._port = port
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[UpstreamConnection] = []
        self._closed = False

    def take(self) -> UpstreamConnection | None:
        """Takes out the idle connection that was used last; None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    def put(self, connection: UpstreamConnection) -> None:
        """Keeps a connection that is idle now for the next request."""
        if self._closed:
            connection.abort()
        else:
            self._idle.append(connection)

    def remove(self, connection: UpstreamConnection) -> None:
        """Forgets a connection that has ended."""
        if connection in self._idle:
            self._idle.remove(connection)

    async def connect(self) -> UpstreamConnection:
        """Opens a new connection.

        Raises:
            OSError: the engine cannot be reached, or not within the time (TimeoutError is one).
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await loop.create_connection(lambda: UpstreamConnection(self), self._host, self._port)
        return connection

    def close(self) -> None:
        """Closes all idle connections, and those in use once they are idle."""
        self._closed = True
        for connection in list(self._idle):
            connection.abort()
        self._idle.clear()

"""Clients of the soak: one keep-alive connection each, one request after the other, to a gateway that listens."""

import asyncio
import contextlib
import re
import time
from functools import partial
from typing import Protocol

import httptools

from moe_lab.soak.answers import MOCK_HEADER, MOCK_MODEL, ReadAnswer, SoakRoute, read_piece, read_stream
from moe_lab.soak.deliveries import Received
from moe_lab.soak.traffic import Leaving, SoakRequest

# Far beyond any wait that the gateway allows itself: a stall of 20 s, a hold of 60 s.
PATIENCE_S = 180.0
_RETRY_S = 0.05
_MOCK_TEXT = re.compile(r" \d+\.\d")


class Reachable(Protocol):
    """A gateway as clients see it."""

    name: str
    port: int
    kills: int
    ends: int
    changed_s: float


class SoakConnection(asyncio.Protocol):
    """One connection.

    Args:
        gateway: where it leads.
        kills: how often that had been killed before the connection was made.
        ends: how often it had been asked to end before that.
    """

    def __init__(self, gateway: Reachable, kills: int, ends: int) -> None:
        self.gateway = gateway
        self.kills = kills
        self.ends = ends
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._ended: asyncio.Future[None] | None = None
        self._leave_after: float = float("inf")
        self.is_reused = False
        self._begin()

    def _begin(self) -> None:
        self.body: list[bytes] = []
        self.received_bytes = 0
        self.status = 0
        self.is_complete = self.is_mock = self.has_left = self.surplus = self.is_error = False

    @property
    def is_unread(self) -> bool:
        """Whether its gateway, which stops, ended it without a word: clients ask again elsewhere."""
        return not self.received_bytes and not self.has_left and self.gateway.ends != self.ends

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self.transport is not None and not self.transport.is_closing()

    async def ask(self, request: SoakRequest) -> Received:
        """Sends a request and waits for the end of its answer, of the connection, or of the client's patience."""
        assert self.transport is not None
        self.is_reused = self._ended is not None
        self._begin()
        self._ended = asyncio.get_running_loop().create_future()
        self._leave_after = request.leave_after if request.leaving is Leaving.IN_ANSWER else float("inf")
        message, timed_out = request.encode(), False
        if request.leaving is Leaving.IN_BODY:
            head_bytes = message.index(b"\r\n\r\n") + 4
            self.transport.write(message[: head_bytes + request.leave_after])
        else:
            self.transport.write(message)
        if request.leaving in (Leaving.IN_BODY, Leaving.BEFORE_ANSWER):
            await asyncio.sleep(0.0 if request.leave_after % 2 else 0.01)
            self.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._ended
        timed_out = not self._ended.done() or self._ended.cancelled()
        if timed_out:
            self.leave()
        return self._result(request, timed_out=timed_out)

    def leave(self) -> None:
        """Goes away without a word."""
        self.has_left = True
        if self.transport is not None:
            self.transport.abort()
        self._end()

    def close(self) -> None:
        """Ends a connection that is idle."""
        if self.transport is not None:
            self.transport.close()

    def _result(self, request: SoakRequest, *, timed_out: bool) -> Received:
        answer, body, detail = None, b"".join(self.body), ""
        if self.status == 200:
            try:
                answer = read_body(request.api, body, stream=request.stream, is_complete=self.is_complete)
            except (ValueError, KeyError, TypeError) as error:
                detail = f"{error!r}: "
            if answer is not None and answer.error:
                # The gateway ends the connection after a stream that ended with an error.
                self.close()
        return Received(
            status=self.status,
            answer=answer,
            is_complete=self.is_complete,
            is_mock=self.is_mock or shows_mock(request, answer),
            has_left=self.has_left and not timed_out,
            timed_out=timed_out,
            is_gateway_killed=self.gateway.kills != self.kills,
            surplus=self.surplus,
            detail=f"{detail}{self._describe(request)}: {body[-300:]!r}",
        )

    def _describe(self, request: SoakRequest) -> str:
        kind = "stream" if request.stream else "one piece"
        age = "a warm" if self.is_reused else "a new"
        return f"{self.gateway.name}, {age} connection, {request.api.value}, {kind}, status {self.status}"

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end()

    def data_received(self, data: bytes) -> None:
        if self._ended is None or self._ended.done():
            self.surplus = self.surplus or not self.has_left
            self.close()
            return
        self.received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
            return
        if self.received_bytes > self._leave_after and not self._ended.done():
            self.leave()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == MOCK_HEADER:
            self.is_mock = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        if self.is_complete:
            self.surplus = True
        self.is_complete = True
        if not self._parser.should_keep_alive():
            self.close()
        self._end()


def shows_mock(request: SoakRequest, answer: ReadAnswer | None) -> bool:
    """Whether a mock engine answered, by the model or by the text: the gateway may send a head of its own."""
    text = "" if answer is None else answer.text
    return request.model == MOCK_MODEL or _MOCK_TEXT.match(text) is not None


def read_body(api: SoakRoute, body: bytes, *, stream: bool, is_complete: bool) -> ReadAnswer | None:
    """Reads the body of an answer of status 200; None where it cannot be read yet.

    Raises:
        ValueError: it is whole and no answer.
    """
    if stream:
        return read_stream(api, body)
    return read_piece(api, body) if is_complete else None


async def connect(gateways: tuple[Reachable, ...], first: int) -> SoakConnection:
    """Connects to a gateway, beginning with the one of this index: one that listens, as a Service would choose."""
    loop = asyncio.get_running_loop()
    until_s = time.monotonic() + PATIENCE_S
    for turn in range(first, 1_000_000):
        gateway = gateways[turn % len(gateways)]
        # Counted before the connection is made: its gateway may be killed before it accepts the connection.
        make = partial(SoakConnection, gateway, gateway.kills, gateway.ends)
        try:
            return (await loop.create_connection(make, "127.0.0.1", gateway.port))[1]
        except OSError:
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(_RETRY_S)
    raise TimeoutError("no gateway listens")

"""A light HTTP/1.1 client for measuring: one connection a request, a clock reading for each piece of the answer.

On a small machine the client runs beside the engines, so it does as little as it can: httptools parses, and nothing of
a streamed answer is decoded before its end. Called by `moe_tools.server` (one-off calls) and `moe_tools.replay`.
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httptools
from moe_contract.input_errors import InputError, InvalidInput

KEPT_TAIL_BYTES = 4096
_TOKEN_EVENT = re.compile(rb'"choices"\s*:\s*\[\s*\{')


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Address of an HTTP server: host, port, TLS, a prefix of all paths, and the key that it asks for; empty: none."""

    host: str
    port: int
    tls: bool
    prefix: str
    key: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str, key: str = "") -> "ServerAddress":
        """From `http://host:port`; a path before `/v1` is kept, a trailing `/v1` is not needed."""
        try:
            parts: SplitResult = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidInput([InputError("url", f"{url!r}: {error}")]) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput([InputError("url", f"must look like http://HOST:PORT, got {url!r}")])
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), tls, prefix, key)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


@dataclass(slots=True)
class Answer:
    """What came back. Times are of the event loop's clock; `first_s` and `last_s` are of events that carry tokens."""

    status: int = 0
    first_s: float | None = None
    last_s: float | None = None
    tail: bytes = b""
    body: list[bytes] = field(default_factory=list)
    complete: bool = False


class _AnswerProtocol(asyncio.Protocol):
    """Reads one answer. `done` ends when it is complete or its connection is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, keep_body: bool) -> None:
        self.answer = Answer()
        self.done: asyncio.Future[Answer] = loop.create_future()
        self._clock = loop.time
        self._keep_body = keep_body
        self._parser: Any = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._finish()

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        self._keep_body = self._keep_body or self.answer.status != 200

    def on_body(self, data: bytes) -> None:
        answer = self.answer
        if self._keep_body:
            answer.body.append(data)
            return
        if _TOKEN_EVENT.search(data):
            now = self._clock()
            answer.last_s = now
            if answer.first_s is None:
                answer.first_s = now
        answer.tail = (answer.tail + data)[-KEPT_TAIL_BYTES:]

    def on_message_complete(self) -> None:
        self.answer.complete = True
        self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(self.answer)


async def exchange(
    endpoint: ServerAddress, method: str, path: str, body: bytes = b"", *, stream: bool, timeout_s: float
) -> Answer:
    """Sends one request and reads its answer to the end.

    Raises:
        OSError: no connection.
        TimeoutError: no complete answer within `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    tls = ssl.create_default_context() if endpoint.tls else None
    async with asyncio.timeout(timeout_s):
        transport, protocol = await loop.create_connection(
            lambda: _AnswerProtocol(loop, keep_body=not stream), endpoint.host, endpoint.port, ssl=tls
        )
        try:
            transport.write(build_request(endpoint, method, path, body))
            return await protocol.done
        finally:
            transport.abort()


def build_request(endpoint: ServerAddress, method: str, path: str, body: bytes) -> bytes:
    """Returns the bytes of an HTTP/1.1 request with a JSON body."""
    headers: Mapping[str, str] = {
        **({"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}),
        "host": f"{endpoint.host}:{endpoint.port}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {endpoint.prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode() + body

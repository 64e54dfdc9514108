"""A mock engine that errs on demand: `python -m moe_lab.soak.engine PORT PAGE RECORD` serves until killed.

It computes in steps, a token for each running request, as an engine's batch does. Its page says how it answers at the
moment (`EngineMode`). Its record has a line for each request that it was given (`r NUMBER`) and for each that it has
answered to the end (`f NUMBER`), written at once, so that the record outlives the process.
"""

import asyncio
import os
import sys
from pathlib import Path

import httptools
import orjson
import uvloop

from moe_lab.soak.answers import (
    MOCK_HEADER,
    MOCK_MODEL,
    MODEL,
    SoakRoute,
    build_error_event,
    build_first_events,
    build_last_events,
    build_piece,
    build_token_event,
    read_mark,
)
from moe_lab.soak.page import EngineMode, EnginePage

STEP_S = 0.004
SLOW_STEP_S = 0.08
# uvicorn's own.
IDLE_S = 5.0
TOKENS_BEFORE_CUT = 2
_METRICS = (
    'vllm:num_requests_running{{engine="0"}} {running}\nvllm:num_requests_waiting{{engine="0"}} 0\n'
    'vllm:kv_cache_usage_perc{{engine="0"}} 0.1\nvllm:iteration_tokens_total_count{{engine="0"}} {step}\n'
)
_MODELS = orjson.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in (MODEL, MOCK_MODEL)]})
_ERROR = orjson.dumps({"error": {"message": "the mock engine fails", "type": "InternalServerError", "code": 500}})


def _frame(status: bytes, body: bytes, content_type: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\n%b: 1\r\ncontent-length: %d\r\n\r\n"
    return head % (status, content_type, MOCK_HEADER, len(body)) + body


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"%b: 1\r\ntransfer-encoding: chunked\r\n\r\n" % MOCK_HEADER
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class MockEngine:
    """All that the connections share: the page, the record, and the running requests."""

    def __init__(self, page: EnginePage, record: Path) -> None:
        self.page = page
        self.step = 0
        self.connections: set[MockConnection] = set()
        self._running: dict[MockConnection, Answering] = {}
        self._record = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write_down(self, what: bytes, number: int) -> None:
        """Adds a line to the record."""
        os.write(self._record, b"%b %d\n" % (what, number))

    def add(self, connection: "MockConnection", answering: "Answering") -> None:
        """Computes a request from the next step on."""
        self._running[connection] = answering
        self.page.report(self.step, len(self._running))

    def remove(self, connection: "MockConnection") -> None:
        """Drops the request of a connection that has ended."""
        self._running.pop(connection, None)

    @property
    def running(self) -> int:
        """Number of requests that are computed."""
        return len(self._running)

    async def run(self, port: int) -> None:
        """Makes steps, and listens on the port while the page allows it."""
        server: asyncio.AbstractServer | None = None
        loop = asyncio.get_running_loop()
        while True:
            mode = self.page.mode
            if mode is EngineMode.REFUSE and server is not None:
                server.close()
                server = None
                for connection in list(self.connections):
                    connection.transport.abort()
            elif mode is not EngineMode.REFUSE and server is None:
                server = await loop.create_server(lambda: MockConnection(self), "127.0.0.1", port, backlog=1024)
            if mode is not EngineMode.HANG:
                self._make_step(mode)
            await asyncio.sleep(SLOW_STEP_S if mode is EngineMode.SLOW else STEP_S)

    def _make_step(self, mode: EngineMode) -> None:
        if self._running:
            self.step += 1
        for connection, answering in list(self._running.items()):
            if answering.advance(connection, cut=mode is EngineMode.CUT):
                self._running.pop(connection, None)
        self.page.report(self.step, len(self._running))


class Answering:
    """One request and how much of its answer was computed."""

    def __init__(self, engine: MockEngine, api: SoakRoute, number: int, tokens: int, *, stream: bool) -> None:
        self._engine = engine
        self._api, self._number, self._tokens, self._stream = api, number, tokens, stream
        self._done = 0

    def advance(self, connection: "MockConnection", *, cut: bool) -> bool:
        """Computes one token; returns whether the answer has ended."""
        if self._stream:
            if self._done == 0:
                connection.write(_STREAM_HEAD)
                if first := build_first_events(self._api, self._number):
                    connection.write(_chunk(first))
            connection.write(_chunk(build_token_event(self._api, self._number, self._done)))
        self._done += 1
        if cut and self._stream and self._done == TOKENS_BEFORE_CUT:
            connection.transport.close()
            return True
        if self._done < self._tokens:
            return False
        self._engine.write_down(b"f", self._number)
        if self._stream:
            last = build_last_events(self._api, self._number, self._tokens)
            connection.write(_chunk(last) + b"0\r\n\r\n")
        else:
            connection.write(_frame(b"200 OK", build_piece(self._api, self._number, self._tokens)))
        connection.idle_since_s = asyncio.get_running_loop().time()
        return True


class MockConnection(asyncio.Protocol):
    """One connection of a gateway."""

    def __init__(self, engine: MockEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body: list[bytes] = []
        self.transport: asyncio.Transport
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.write = transport.write  # type: ignore[attr-defined]
        self._engine.connections.add(self)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        loop = asyncio.get_running_loop()
        if self.transport.is_closing():
            return
        if self.idle_since_s and loop.time() - self.idle_since_s > IDLE_S:
            self.transport.close()
        else:
            loop.call_later(1.0, self._close_when_idle)

    def data_received(self, data: bytes) -> None:
        self.idle_since_s = 0.0
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        self._engine.remove(self)

    def on_message_begin(self) -> None:
        self._url = b""
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        mark = read_mark(body)
        if mark is None:
            self.write(self._answer_page())
            self.idle_since_s = asyncio.get_running_loop().time()
            return
        number, tokens = mark
        self._engine.write_down(b"r", number)
        api, stream = SoakRoute(self._url.decode()), bool(orjson.loads(body).get("stream"))
        mode = self._engine.page.mode
        if not self._err(mode, api, stream=stream):
            self._engine.add(self, Answering(self._engine, api, number, tokens, stream=stream))

    def _answer_page(self) -> bytes:
        engine = self._engine
        if self._url == b"/metrics":
            text = _METRICS.format(running=engine.running, step=engine.step)
            return _frame(b"200 OK", text.encode(), b"text/plain; version=0.0.4")
        pages = {b"/health": b"{}", b"/v1/models": _MODELS}
        page = pages.get(self._url)
        return _frame(b"404 Not Found", b"{}") if page is None else _frame(b"200 OK", page)

    def _err(self, mode: EngineMode, api: SoakRoute, *, stream: bool) -> bool:
        """Answers as the mode says; returns False where the request is computed."""
        match mode:
            case EngineMode.FAIL:
                self.write(_frame(b"500 Internal Server Error", _ERROR))
            case EngineMode.STREAM_ERROR if stream:
                self.write(_STREAM_HEAD + _chunk(build_error_event(api)) + b"0\r\n\r\n")
            case EngineMode.STREAM_ERROR:
                self.write(_frame(b"500 Internal Server Error", _ERROR))
            case EngineMode.FULL:
                self.write(_frame(b"503 Service Unavailable", _ERROR))
            case EngineMode.NO_HTTP:
                self.write(b"\x00\xff this is no HTTP\r\n\r\n")
                self.transport.close()
            case EngineMode.BAD_CHUNKS:
                self.write(_STREAM_HEAD + b"zz\r\nno chunk\r\n")
                self.transport.close()
            case EngineMode.EMPTY if stream:
                self.write(_STREAM_HEAD + _chunk(b": nothing\n\n") + b"0\r\n\r\n")
            case EngineMode.EMPTY:
                self.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n")
                self.transport.close()
            case _:
                return False
        self.idle_since_s = asyncio.get_running_loop().time()
        return True


def main() -> None:
    """Serves on the port of the command line until killed."""
    port, page, record = sys.argv[1:]
    uvloop.run(MockEngine(EnginePage(Path(page)), Path(record)).run(int(port)))


if __name__ == "__main__":
    main()

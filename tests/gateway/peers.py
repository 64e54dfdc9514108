"""Engines and node agents that do as a test's script says."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from moe_contract.addresses import http_url

from tests.gateway.messages import OK, Received, json_answer, parse_headers
from tests.gateway.waiting import free_port

Script = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


async def answer_ok(_request: Received, writer: asyncio.StreamWriter) -> None:
    writer.write(json_answer(OK))


def always(data: bytes, *, close: bool = False) -> Script:
    """Answers these bytes."""

    async def script(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            writer.close()

    return script


def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def never(_request: Received, _writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


class PeerServer:
    """A server on a loopback port that can be stopped and started again at the same port."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = free_port()
        self.connections = 0
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return http_url(self.host, self.port)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, limit=2**26)

    async def stop(self) -> None:
        """Ends all connections by a reset and listens no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._guard(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except RuntimeError:
            # What uvloop says of a write to a connection that the other side has closed.
            if not writer.is_closing():
                raise
        finally:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class MockEngine(PeerServer):
    """An HTTP server that answers by `script`; what a scrape asks for is answered by itself."""

    def __init__(self, name: str, script: Script = answer_ok, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.name = name
        self.script = script
        self.requests: list[Received] = []
        self.models = ["tiny"]
        self.health = "200 OK"
        self.metrics = ""
        self.agent: FakeAgent | None = None

    @property
    def address(self) -> dict[str, Any]:
        return {"name": self.name, "url": self.url, "agent_url": None if self.agent is None else self.agent.url}

    async def stop(self) -> None:
        await super().stop()
        if self.agent is not None:
            await self.agent.stop()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = b""
        while True:
            head = ahead + await reader.readuntil(b"\r\n\r\n")
            request = Received(head, await _read_body(head, reader), time.monotonic())
            if own := self._own_answer(request):
                writer.write(own)
                ahead = b""
                continue
            self.requests.append(request)
            ahead = await self._answer(request, reader, writer)

    def _own_answer(self, request: Received) -> bytes:
        path = request.line.split(b" ")[1].split(b"?")[0]
        if path == b"/health":
            return json_answer({}, status=self.health)
        if path == b"/metrics":
            return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(self.metrics), self.metrics.encode())
        if path == b"/v1/models":
            if b"x-request-id" in request.headers:
                self.requests.append(request)
            return json_answer({"object": "list", "data": [{"id": name} for name in self.models]})
        return b""

    async def _answer(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """Runs the script while it watches for the end of the connection."""
        answering = asyncio.ensure_future(self._run_script(request, writer))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and (watching.exception() is not None or not watching.result()):
                request.gone.set()
                raise ConnectionResetError
            await answering
            following = await watching
            if not following:
                raise ConnectionResetError
            return following
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def _run_script(self, request: Received, writer: asyncio.StreamWriter) -> None:
        await self.script(request, writer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()


async def _read_body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    headers, body = parse_headers(head), b""
    if b"transfer-encoding" not in headers:
        return await reader.readexactly(int(headers.get(b"content-length", b"0")))
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


class FakeAgent(PeerServer):
    """A node agent as the gateway sees it: a stream of snapshots, the newest now and then again."""

    def __init__(self, engine_url: str, ranks: int = 1, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.mute = False
        self.experts: Any = None
        self._changed: set[asyncio.Event] = set()
        self.state: dict[str, Any] = {
            "name": "engine",
            "phase": "ready",
            "accepting": True,
            "engine": {"url": engine_url, "model": "tiny", "pid": 1, "restarts": 0, "identity": "tiny-1"},
            "config": {},
            "ranks": [rank_row(number) for number in range(ranks)],
        }

    def say(self, **changes: Any) -> None:
        """Changes the snapshot and sends it."""
        self.state.update(changes)
        for changed in self._changed:
            changed.set()

    def say_rank(self, number: int = 0, **changes: Any) -> None:
        self.state["ranks"][number].update(changes)
        self.say()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/experts?"):
            status = "404 Not Found" if self.experts is None else "200 OK"
            writer.write(json_answer(self.experts, status=status, extra=b"connection: close\r\n"))
            await writer.drain()
            return
        assert head.startswith(b"GET /v1/state?watch=1 ")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n")
        changed = asyncio.Event()
        self._changed.add(changed)
        try:
            while True:
                if not self.mute:
                    writer.write(json.dumps(self.state).encode() + b"\n")
                    await writer.drain()
                changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), 0.2)
        finally:
            self._changed.discard(changed)


def rank_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    row = {
        "rank": number,
        "age_s": 0.0,
        "step": 1,
        "running": 0,
        "waiting": 0,
        "waiting_prefill_tokens": 0,
        "running_prefill_tokens": 0,
        "decode_tokens": 0,
        "kv_usage": 0.0,
        "preemptions": 0,
        "computed_tokens": 0,
        "step_time": {"base_s": 0.004, "prefill_s": 0.0001, "decode_s": 0.0002},
        "expert_balance": 1.0,
    }
    return row | changes

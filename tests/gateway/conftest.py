"""A real gateway on loopback sockets, in front of engines and agents that do as a test's script says.

`serve` starts a gateway and returns it running; `make_engine` and `make_agent` start the peers. What the event loop
had to report by itself, an exception that nobody caught, fails the test.
"""

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway

from tests.gateway.fake_api import FakeApi

TOKEN = "a-token"
PATIENCE_S = 10.0
IN_FORCE_WITHIN_S = 1.0


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """The loop that the product runs on."""
    return {"uvloop": uvloop.new_event_loop}


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Waits until the condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come about"
        await asyncio.sleep(0.005)


def free_port() -> int:
    """A free port below those that the kernel gives to connections, one of which could take it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# Messages.


@dataclass
class Received:
    """A request as an engine got it; `gone` is set when the connection ended before the answer did."""

    head: bytes
    body: bytes
    at_s: float
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def line(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return parse_headers(self.head)


def parse_headers(head: bytes) -> dict[bytes, bytes]:
    rows = [line.split(b":", 1) for line in head.split(b"\r\n")[1:] if line]
    return {name.lower(): value.strip() for name, value in rows}


def json_answer(document: Any, *, status: str = "200 OK", extra: bytes = b"") -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        status.encode(),
        len(body),
        extra,
        body,
    )


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return chunk(b"data: %b\n\n" % json.dumps({"text": text}).encode())


SSE_END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

# Engines.

Script = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]
OK = {"choices": [{"text": "ok"}], "usage": {"prompt_tokens": 3}}


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
        return f"http://{self.host}:{self.port}"

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
            length = int(parse_headers(head).get(b"content-length", b"0"))
            request = Received(head, await reader.readexactly(length), time.monotonic())
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
        hearing = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, hearing}, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done() and (hearing.exception() is not None or not hearing.result()):
                request.gone.set()
                raise ConnectionResetError
            await answering
            heard = await hearing
            if not heard:
                raise ConnectionResetError
            return heard
        finally:
            for task in (answering, hearing):
                task.cancel()
            await asyncio.gather(answering, hearing, return_exceptions=True)

    async def _run_script(self, request: Received, writer: asyncio.StreamWriter) -> None:
        await self.script(request, writer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()


class FakeAgent(PeerServer):
    """A node agent as the gateway sees it: a stream of snapshots, the newest now and then again."""

    def __init__(self, engine_url: str, ranks: int = 1, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.mute = False
        self._changed: set[asyncio.Event] = set()
        self.state: dict[str, Any] = {
            "name": "engine",
            "phase": "ready",
            "accepting": True,
            "engine": {"url": engine_url, "model": "tiny", "pid": 1, "restarts": 0},
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


# Clients.


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


def post(body: bytes | dict[str, Any], path: str = "/v1/completions", extra: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"POST %b HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (path.encode(), extra, len(data)) + data


def prompt(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": text, **fields}


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
        return sum(books.in_flight for books in self.gateway.dispatcher.target_states.values())

    @property
    def accepting(self) -> set[str]:
        """Names of the engines that get new work."""
        return {target.server for target, row in self.gateway.dispatcher.target_states.items() if row.accepting}

    async def takes(self, *engines: MockEngine) -> None:
        """What was just told of engines is in force within its bound: these get new work and no others."""
        names, told_s = {engine.name for engine in engines}, time.monotonic()
        await until(lambda: self.accepting == names, f"work for {sorted(names)} alone")
        assert time.monotonic() - told_s < IN_FORCE_WITHIN_S

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


# Fixtures.


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
            books = served.gateway.dispatcher.target_states
            await until(lambda: all(row.accepting for row in books.values()), "a ready gateway")
        return served

    yield start
    for served in running:
        await served.close()


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

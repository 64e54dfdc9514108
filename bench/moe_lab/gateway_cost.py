"""What a request costs in the gateway's own code: its connections, without sockets, a loop or an engine.

Run by `python -m moe_lab`; a test counts the calls of a request with it. A request is given to the protocol of a
client's connection, its answer to that of the engine's; both write to transports that keep nothing.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway
from moe_gateway.http.client import ClientConnection
from moe_gateway.http.upstream import Pool, UpstreamConnection

from moe_lab.gateway.engine import ANSWER, EVENT, MODEL, STREAM_END, STREAM_HEAD
from moe_lab.gateway.load import build_request
from moe_lab.rows import BenchmarkRow

ENGINES = ("mock-0", "mock-1")
BATCHES = 40
REQUESTS = 500
EVENTS = 200
# The headers of OpenAI's Python client, beside those that the client of the comparison sends.
OPENAI_LINES = (
    b"accept-encoding: gzip, deflate\r\nconnection: keep-alive\r\nauthorization: Bearer sk-0123456789\r\n"
    b"x-stainless-lang: python\r\nx-stainless-package-version: 3.57.0\r\nx-stainless-os: Linux\r\n"
    b"x-stainless-arch: x64\r\nx-stainless-runtime: CPython\r\nx-stainless-runtime-version: 3.11.7\r\n"
    b"x-stainless-async: false\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
)


class NullTransport(asyncio.Transport):
    """A transport that counts the bytes written to it and keeps none."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def write(self, data: Any) -> None:
        """Adds the length of these bytes to the count."""
        self.written += len(data)

    def is_closing(self) -> bool:
        """Never: it has no other side."""
        return False

    def close(self) -> None:
        """Raises, for nothing here may end a connection.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("the gateway closed a connection")

    abort = close


class SocketlessGateway:
    """A gateway with two idle engines and one client, all without sockets."""

    def __init__(self, folder: Path) -> None:
        (folder / "token").write_text("bench\n", "utf-8")
        engines = [{"name": name, "url": f"http://127.0.0.1:{port}"} for port, name in enumerate(ENGINES, 1)]
        config = parse_model(
            GatewayConfig,
            {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": str(folder / "token"), "engines": engines},
        )
        self.gateway = Gateway(config, ControlTokens(folder / "token"))
        pools = {name: Pool("127.0.0.1", 1, 1.0) for name in ENGINES}
        self._engines = [UpstreamConnection(pool) for pool in pools.values()]
        self.gateway._pools = pools
        now_s = self.gateway.clock()
        for name, engine in zip(ENGINES, self._engines, strict=True):
            engine.connection_made(NullTransport())
            pools[name].put(engine)
            self.gateway.dispatcher.set_models(name, {MODEL: {"id": MODEL}})
            self.gateway.dispatcher.set_ready(name, True, now_s)
        self._client: ClientConnection = self.gateway._connection()
        self._client.connection_made(NullTransport())

    def serve(self, request: bytes, answer: Sequence[bytes]) -> None:
        """Serves one request, whose answer comes in these pieces.

        Raises:
            RuntimeError: it did not reach an engine, or was not answered.
        """
        self._client.data_received(request)
        engine = next((engine for engine in self._engines if engine.receiver is not None), None)
        if engine is None:
            raise RuntimeError("the request did not reach an engine")
        for piece in answer:
            engine.data_received(piece)
        if not self._client.idle:
            raise RuntimeError("the request was not answered")


def run() -> Iterator[BenchmarkRow]:
    """Yields the rows of all cases."""
    plain = build_request()
    many_headers = plain.replace(b"\r\n", b"\r\n" + OPENAI_LINES, 1)
    stream = build_request(events=EVENTS)
    with TemporaryDirectory() as folder:
        served = SocketlessGateway(Path(folder))
        yield _row("a request, 5 headers", _measure(served, plain, [ANSWER], REQUESTS))
        yield _row("a request, 17 headers", _measure(served, many_headers, [ANSWER], REQUESTS))
        pieces = [STREAM_HEAD, *[EVENT] * EVENTS, STREAM_END]
        values = [value / EVENTS for value in _measure(served, stream, pieces, REQUESTS // 50)]
        yield _row(f"an event of a stream of {EVENTS}", values)


def _measure(served: SocketlessGateway, request: bytes, answer: Sequence[bytes], requests: int) -> list[float]:
    """Microseconds of CPU time for one request, in each of `BATCHES` batches after two that do not count."""
    values = []
    for _ in range(BATCHES + 2):
        begun_s = time.process_time()
        for _ in range(requests):
            served.serve(request, answer)
        values.append((time.process_time() - begun_s) / requests * 1e6)
    return values[2:]


def _row(case: str, values: Sequence[float]) -> BenchmarkRow:
    return BenchmarkRow(benchmark="gateway", case=case, unit="us", values=values)

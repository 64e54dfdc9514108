"""A gateway and two engines on an event loop of their own thread, for tests that Hypothesis calls many times.

The engines answer what a test has written into it. A test is an ordinary function: it opens connections with blocking
sockets, so that each byte goes out as given.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway

from tests.gateway.messages import OK, json_answer, post, prompt
from tests.gateway.peers import FakeAgent, MockEngine
from tests.gateway.waiting import free_port

PATIENCE_S = 60.0


class FuzzedGateway:
    """A running gateway in front of two engines.

    `answer` are the pieces that an engine writes, then it closes; None: a good answer.
    """

    def __init__(self, folder: Path) -> None:
        self.answer: list[bytes] | None = None
        self.reports: list[dict[str, Any]] = []
        self._loop = uvloop.new_event_loop()
        self._loop.set_exception_handler(lambda _loop, context: self.reports.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        (folder / "token").write_text("a-token")
        self._folder = folder
        self.call(self._start())

    def call(self, coroutine: Any) -> Any:
        """Runs it on the loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _start(self) -> None:
        # A second one, so that a failed attempt is repeated without a wait.
        self._engines = [MockEngine(name, self._script) for name in ("one", "other")]
        for engine in self._engines:
            await engine.start()
            engine.agent = FakeAgent(engine.url)
            await engine.agent.start()
        document = {
            "listen": {"port": free_port()},
            "admin": {"port": free_port()},
            "token_file": str(self._folder / "token"),
            "engines": [engine.address for engine in self._engines],
            "limits": {"max_body_bytes": 4 * 1024 * 1024, "hold_timeout_s": 30.0},
        }
        config = parse_model(GatewayConfig, document)
        self.port = config.listen.port
        self.gateway = Gateway(config, ControlTokens(self._folder / "token"))
        await self.gateway.start()
        states = self.gateway.dispatcher.target_states
        await self._until(lambda: all(state.accepting for state in states.values()))

    async def _script(self, _request: Any, writer: asyncio.StreamWriter) -> None:
        if self.answer is None:
            writer.write(json_answer(OK))
            return
        for piece in self.answer:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def _until(self, condition: Callable[[], Any]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until_s, "the gateway did not come to rest"
            await asyncio.sleep(0.002)

    def close(self) -> None:
        """Ends gateway, engine and thread."""

        async def end() -> None:
            await self.gateway.close()
            for engine in self._engines:
                await engine.stop()

        self.call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    # What a test does.

    def exchange(self, *pieces: bytes, half_close: bool = True) -> bytes:
        """Sends the pieces on a connection of their own, and returns all that comes until its end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received = b""
            # The gateway may end the connection before it has read everything.
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    client.sendall(piece)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
                while data := client.recv(65536):
                    received += data
            return received

    def ask(self, body: dict[str, Any] | bytes, *, extra: bytes = b"") -> bytes:
        """The answer to one whole request, whose connection ends with it."""
        return self.exchange(post(body, extra=b"connection: close\r\n" + extra), half_close=False)

    def check(self) -> None:
        """No exception was left over, nothing is in flight, and the gateway serves."""
        gateway, self.answer = self.gateway, None
        # What a test's engine did may have ejected it; this test is not about that.
        self.call(self._forgive())
        self.call(self._until(lambda: not gateway.dispatcher.in_flight and not gateway.dispatcher.held))
        answer = self.ask(prompt())
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert self.reports == []
        assert internal_errors(gateway) == 0

    async def _forgive(self) -> None:
        now_s = self.gateway.clock()
        for engine in self._engines:
            self.gateway.dispatcher.set_ready(engine.name, False, now_s)
            self.gateway.dispatcher.set_ready(engine.name, True, now_s)


def internal_errors(gateway: Gateway) -> int:
    """Answers of status 500 that are the gateway's own."""
    return gateway.stats.refusals["internal_error"]


@contextmanager
def running(folder: Path) -> Iterator[FuzzedGateway]:
    """A gateway that runs until the end of the block."""
    fuzzed = FuzzedGateway(folder)
    try:
        yield fuzzed
    finally:
        fuzzed.close()


def statuses(answers: bytes) -> list[int]:
    """The statuses of answers that stand one after the other; a body may not contain a status line."""
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]

"""Bodies that take a while to read: failures end the wait of their client, and nobody's bodies are not read."""

import asyncio
import gzip
import json
import os
import signal

import pytest
from moe_gateway.http.bodies import BodyRefused, split_body
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.request import body_reader
from moe_gateway.request.body_reader import BodyReader

from tests.gateway.compiled import interpreted
from tests.gateway.messages import OK, post, prompt
from tests.gateway.test_bad_clients import error_of
from tests.gateway.test_large_bodies import BODY, TEXT, request_of
from tests.gateway.waiting import until

LIMIT = 1 << 30


@pytest.fixture
async def reader():
    made = BodyReader()
    yield made
    await made.close()


@pytest.fixture
def never_here(monkeypatch):
    """Fails where a body is parsed in the gateway's own process."""
    monkeypatch.setattr(body_reader, "parse_body", lambda *_: pytest.fail("parsed in the gateway"))


def deadly(monkeypatch, action: str) -> None:
    """The process that parses does this with every body."""
    monkeypatch.setattr(body_reader, "WORKER", ("-c", f"import os, sys, time; sys.stdin.buffer.read(9); {action}"))


async def test_a_body_that_ends_the_process_is_refused(reader, monkeypatch, never_here):
    deadly(monkeypatch, "os._exit(1)")
    with pytest.raises(BodyRefused, match="ended over it") as refused:
        await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, LIMIT)
    assert refused.value.outcome is RequestOutcome.BAD_REQUEST


async def test_a_process_that_served_before_is_no_fault_of_the_body(reader, never_here):
    for _ in range(2):
        assert (await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, LIMIT)).prompt_bytes == len(TEXT)
        # It has ended, and the gateway does not know yet.
        os.kill(reader._process.pid, signal.SIGKILL)


async def test_a_process_that_hangs_is_ended_and_its_body_refused(reader, monkeypatch, never_here):
    deadly(monkeypatch, "time.sleep(600)")
    monkeypatch.setattr(body_reader, "PARSE_TIMEOUT_S", 0.2)
    with pytest.raises(BodyRefused, match=r"longer than 0\.2 s"):
        await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, LIMIT)
    assert reader._process is None


async def test_after_a_failure_the_next_body_has_its_own_answer(reader, monkeypatch):
    real = body_reader._ask

    async def interrupted(process, body, route):
        await real(process, body, route)
        raise MemoryError

    monkeypatch.setattr(body_reader, "_ask", interrupted)
    with pytest.raises(MemoryError):
        await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, LIMIT)
    assert reader._process is None


async def test_a_body_that_nobody_waits_for_takes_no_turn(reader, monkeypatch):
    asked = []
    monkeypatch.setattr(reader, "_parse", lambda *_: asked.append(1))
    with pytest.raises(BodyRefused, match="nobody waits"):
        await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, LIMIT, lambda: False)
    packed = request_of(gzip.compress(BODY))
    packed.headers = b"content-encoding: gzip\r\n"
    with pytest.raises(BodyRefused, match="nobody waits"):
        await reader.read(packed, Route.COMPLETIONS, LIMIT, lambda: False)
    assert asked == []


async def test_two_bodies_are_decoded_at_a_time(reader, monkeypatch):
    running, most, go = 0, 0, asyncio.Event()

    async def slow(_decode, body, *_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1
        return BODY[:0] + json.dumps(prompt()).encode()

    monkeypatch.setattr(asyncio, "to_thread", slow)
    requests = [request_of(b"x") for _ in range(5)]
    for request in requests:
        request.headers = b"content-encoding: gzip\r\n"
    reads = [asyncio.ensure_future(reader.read(request, Route.COMPLETIONS, LIMIT)) for request in requests]
    await until(lambda: running == 2)
    go.set()
    assert {parsed.model for parsed in await asyncio.gather(*reads)} == {"tiny"}
    assert most == 2


class Stuck:
    """Reads no body before `go` is set."""

    def __init__(self, served) -> None:
        self.go, self.wanted = asyncio.Event(), []
        self._real = served.gateway._context.bodies.read
        served.gateway._context.bodies.read = self.read

    async def read(self, request, route, most_bytes, is_wanted):
        await self.go.wait()
        self.wanted.append(is_wanted())
        return await self._real(request, route, most_bytes, is_wanted)


async def test_a_pending_body_is_ended_at_its_deadline(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    stuck = Stuck(served)
    client = await served.connect()
    client.send(post(BODY, extra=b"X-Request-Timeout: 0.2\r\n") + post(prompt("behind")))
    answer = await client.answer()
    assert error_of(answer) == (504, "deadline_exceeded", None)
    assert answer.json["error"]["message"] == "X-Request-Timeout passed before the answer began"
    assert (await client.answer()).json == OK
    stuck.go.set()
    await until(lambda: stuck.wanted == [False])
    assert len(engine.requests) == 1


async def test_a_body_whose_client_left_is_not_wanted(make_engine, serve):
    served = await serve(await make_engine())
    stuck = Stuck(served)
    client = await served.connect()
    client.send(post(BODY))
    await until(lambda: any(row._exchange is not None for row in served.gateway._connections))
    client.reset()
    await until(lambda: not served.gateway._connections)
    stuck.go.set()
    await until(lambda: stuck.wanted == [False])


@pytest.mark.parametrize("packed", [False, True])
async def test_an_unexpected_failure_is_an_answer_and_the_end_of_the_connection(
    make_engine, serve, monkeypatch, packed, caplog
):
    served = await serve(await make_engine())

    async def fails(*_):
        raise MemoryError

    monkeypatch.setattr(served.gateway._context.bodies, "read", fails)
    client = await served.connect()
    client.send(post(gzip.compress(BODY), extra=b"content-encoding: gzip\r\n") if packed else post(BODY))
    assert error_of(await client.answer()) == (500, "internal_error", None)
    assert await client.ended()
    assert "a body was not read" in caplog.text
    assert (await served.ask(post(prompt()))).json == OK


@interpreted
async def test_a_failure_once_the_body_is_read_ends_the_connection(make_engine, serve, monkeypatch, caplog):
    served = await serve(await make_engine())

    def fails(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(served.gateway.dispatcher, "build_job", fails)
    client = await served.connect()
    client.send(post(BODY))
    assert await client.ended()
    assert "a body was not read" in caplog.text

"""A client that goes away frees its engine at once, and one that does not read holds up its own stream alone.

The rule is 100 ms from the client's end to the engine's; the bound here is ten times that, because the machine that
tests may be busy with other things.
"""

import asyncio
import socket
import time
import tracemalloc

import pytest

from tests.gateway.messages import OK, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, never
from tests.gateway.waiting import until

GONE_WITHIN_S = 1.0


async def stream_forever(_request, writer):
    writer.write(SSE_HEAD)
    while True:
        writer.write(event("x"))
        await writer.drain()
        await asyncio.sleep(0.01)


async def stream_then_stall(request, writer):
    writer.write(SSE_HEAD + event("x"))
    await never(request, writer)


@pytest.mark.parametrize("leave", ["close", "reset", "half close"])
@pytest.mark.parametrize("script", [stream_forever, stream_then_stall, never], ids=["stream", "stalled", "prefill"])
async def test_a_client_that_leaves_takes_its_request_along(make_engine, serve, script, leave):
    engine = await make_engine(script)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    await until(lambda: engine.requests)
    if script is not never:
        await client.reader.readuntil(event("x"))
    left_s = time.monotonic()
    match leave:
        case "close":
            client.writer.close()
        case "reset":
            client.reset()
        case "half close":
            client.writer.write_eof()
    await asyncio.wait_for(engine.requests[0].gone.wait(), GONE_WITHIN_S)
    assert time.monotonic() - left_s < GONE_WITHIN_S
    await until(lambda: served.in_flight == 0)
    stats = served.gateway.stats
    assert (stats.requests["completions", 499], stats.finished, stats.failed) == (1, 1, 0)
    assert stats.refusals["client_gone"] == 1
    assert served.gateway.dispatcher.engines[engine.name].failures == 0


async def test_a_held_request_leaves_the_queue_with_its_client(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False)
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    client.writer.close()
    await served.held(0)
    engine.agent.say(accepting=True)
    await until(lambda: served.gateway.ready)
    assert (await served.ask(post(prompt("after")))).json == OK
    assert len(engine.requests) == 1


async def test_a_client_that_leaves_while_the_gateway_connects_costs_nothing(make_engine, serve):
    engine = await make_engine(start=False)
    with socket.socket() as busy:
        # A listener whose backlog is full neither accepts nor refuses a connection.
        busy.bind(("127.0.0.1", engine.port))
        busy.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", engine.port))
        served = await serve(engine)
        client = await served.connect()
        client.send(post(prompt()))
        await until(lambda: served.in_flight == 1)
        client.reset()
        await until(lambda: served.in_flight == 0)
        for filler in fillers:
            filler.close()
    assert served.gateway.stats.requests == {("completions", 499): 1}


# Clients that do not read.

PIECE = b"%x\r\n%b\r\n" % (64 * 1024, bytes(64 * 1024))
PIECES = 800


async def test_a_client_that_does_not_read_pauses_its_engine_and_then_gets_all(make_engine, serve):
    written = 0

    async def flood(_request, writer):
        nonlocal written
        writer.write(SSE_HEAD)
        for _ in range(PIECES):
            writer.write(PIECE)
            await writer.drain()
            written += 1
        writer.write(b"0\r\n\r\n")

    served = await serve(await make_engine(flood))
    client = await served.connect(limit=64 * 1024)
    tracemalloc.start()
    client.send(post(prompt(stream=True)))
    await until(lambda: written > 0)
    before = -1
    while before != written:
        before = written
        await asyncio.sleep(0.1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written < PIECES / 2
    assert peak_bytes < 16 * 1024 * 1024
    await client.reader.readuntil(b"\r\n\r\n")
    received = 0
    while received < PIECES * len(PIECE):
        received += len(await asyncio.wait_for(client.reader.readexactly(len(PIECE)), 10))
    assert await client.reader.readexactly(5) == b"0\r\n\r\n"
    client.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert (await client.answer()).status == 200


async def test_a_client_that_pipelines_and_does_not_read_gets_its_answers_one_by_one(make_engine, serve):
    """Each answer ends in a full buffer, and the next must not be added to it."""
    answer, count = json_answer({"x": "y" * 100_000}), 300
    engine = await make_engine(always(answer))
    served = await serve(engine)
    client = await served.connect(limit=1024)
    client.send(post(prompt()) * count)
    asked = -1
    while asked != len(engine.requests):
        asked = len(engine.requests)
        await asyncio.sleep(0.2)
    (connection,) = served.gateway._connections
    assert connection.transport.get_write_buffer_size() < 2**20
    assert asked < count
    for _ in range(count):
        assert len((await client.answer()).body) > 100_000


async def test_a_client_that_asks_and_never_reads_is_not_read_without_end(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect(limit=1024)
    asking = b"GET /pause HTTP/1.1\r\n\r\n" * 1000

    async def ask_for_ever() -> None:
        while True:
            client.send(asking)
            await client.writer.drain()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask_for_ever(), 1.0)
    (connection,) = served.gateway._connections
    assert connection.transport.get_write_buffer_size() < 8 * 2**20


async def test_a_client_that_never_reads_is_cut_off_in_the_end(make_engine, serve):
    async def flood(_request, writer):
        writer.write(SSE_HEAD)
        while True:
            writer.write(PIECE)
            await writer.drain()

    engine = await make_engine(flood)
    served = await serve(engine, limits={"idle_timeout_s": 0.3})
    client = await served.connect(limit=1024)
    client.send(post(prompt(stream=True)))
    await until(lambda: engine.requests and engine.requests[0].gone.is_set())
    await until(lambda: not served.gateway._connections)


async def test_an_answer_that_is_not_fetched_does_not_hold_the_connection_for_ever(make_engine, serve):
    large = json_answer({"x": "y" * 20_000_000})

    async def answer(_request, writer):
        writer.write(large)

    served = await serve(await make_engine(answer), limits={"idle_timeout_s": 0.3})
    client = await served.connect(limit=1024)
    client.send(post(prompt(), extra=b"Connection: close\r\n"))
    await until(lambda: served.gateway._connections)
    await until(lambda: not served.gateway._connections)


async def test_a_client_that_closes_after_the_last_event_got_its_answer(make_engine, serve):
    async def never_ends(_request, writer):
        writer.write(SSE_HEAD + event("a") + chunk(b"data: [DONE]\n\n"))

    engine = await make_engine(never_ends)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    await client.reader.readuntil(b"[DONE]\n\n")
    client.writer.close()
    stats = served.gateway.stats
    await until(lambda: stats.finished == 1)
    assert dict(stats.requests) == {("completions", 200): 1}
    assert (dict(stats.refusals), stats.failed, served.in_flight) == ({}, 0, 0)

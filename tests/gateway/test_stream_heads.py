"""The head of a stream comes soon, whenever its first token does: clients' time-outs meet no long prefill."""

import asyncio
import json

import pytest

from tests.gateway.clients import Client
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, reset
from tests.gateway.waiting import until

SOON = {"stream_head_after_s": 0.1}
ROLE = chunk(b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n')
STREAM = {"stream": True}
REFUSED = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}


class Slow:
    """An engine that sends the first part at once, and the rest when `go` is set."""

    def __init__(self, first: bytes, rest: bytes) -> None:
        self.first, self.rest = first, rest
        self.go = asyncio.Event()

    async def __call__(self, _request, writer):
        writer.write(self.first)
        await self.go.wait()
        writer.write(self.rest)


async def head_of(client: Client) -> bytes:
    return await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5.0)


async def test_the_engines_head_passes_before_the_first_token(make_engine, serve):
    slow = Slow(SSE_HEAD.replace(b"\r\n\r\n", b"\r\nx-engine: 1\r\n\r\n"), event("a") + SSE_END)
    served = await serve(await make_engine(slow), limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    head = await head_of(client)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"x-engine: 1" in head
    assert served.gateway.stats.ttft.counts.count(0) == len(served.gateway.stats.ttft.counts)
    slow.go.set()
    _, body = await client._body({b"transfer-encoding": b"chunked"})
    assert body == b'data: {"text": "a"}\n\ndata: [DONE]\n\n'
    assert sum(served.gateway.stats.ttft.counts) == 1


async def test_what_came_with_the_head_passes_once_with_the_first_token(make_engine, serve):
    slow = Slow(SSE_HEAD + ROLE, event("a") + SSE_END)
    served = await serve(await make_engine(slow), limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    slow.go.set()
    framed, _ = await client._body({b"transfer-encoding": b"chunked"})
    assert framed == ROLE + event("a") + SSE_END


async def test_an_engine_that_keeps_its_own_head_back_gets_one_of_the_gateway(make_engine, serve):
    slow = Slow(b"", SSE_HEAD + event("a") + SSE_END)
    served = await serve(await make_engine(slow), limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM), extra=b"x-request-id: mine\r\n"))
    head = await head_of(client)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    for line in (
        b"content-type: text/event-stream; charset=utf-8",
        b"transfer-encoding: chunked",
        b"x-request-id: mine",
    ):
        assert line in head.split(b"\r\n")
    slow.go.set()
    framed, _ = await client._body({b"transfer-encoding": b"chunked"})
    assert framed == event("a") + SSE_END
    client.send(post(prompt()))
    assert (await client.answer()).status == 200


async def test_a_held_stream_gets_its_head_and_then_its_answer(make_engine, serve):
    engine = await make_engine(always(SSE_HEAD + event("a") + SSE_END))
    served = await serve(engine, ready=False, limits=SOON)
    engine.agent.say(accepting=False)
    await served.takes()
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await served.held(1)
    assert (await head_of(client)).startswith(b"HTTP/1.1 200 OK")
    engine.agent.say(accepting=True)
    framed, _ = await client._body({b"transfer-encoding": b"chunked"})
    assert framed == event("a") + SSE_END


async def test_comments_follow_the_head_while_no_token_comes(make_engine, serve, monkeypatch):
    monkeypatch.setattr("moe_gateway.request.client_answer.KEEP_ALIVE_S", 0.1)
    slow = Slow(SSE_HEAD, event("a") + SSE_END)
    served = await serve(await make_engine(slow), limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    for _ in range(2):
        size = await asyncio.wait_for(client.reader.readuntil(b"\r\n"), 5.0)
        data = await client.reader.readexactly(int(size, 16) + 2)
        assert data.startswith(b":")
        assert data.endswith(b"\n\n\r\n")
    slow.go.set()
    framed, _ = await client._body({b"transfer-encoding": b"chunked"})
    assert framed.endswith(event("a") + SSE_END)


@pytest.mark.parametrize(
    ("first", "rest", "code"),
    [
        (b"", json_answer(REFUSED, status="400 Bad Request"), 400),
        (b"", json_answer(REFUSED | {"error": {"code": 500, "message": "x"}}, status="500 Internal Server Error"), 500),
    ],
)
async def test_an_error_after_the_head_is_an_event(make_engine, serve, first, rest, code):
    slow = Slow(first, rest)
    served = await serve(await make_engine(slow), limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    slow.go.set()
    _, body = await client._body({b"transfer-encoding": b"chunked"})
    assert body.startswith(b"data: {")
    assert json.loads(body.removeprefix(b"data: "))["error"]["code"] == code
    assert served.gateway.dispatcher.engines["engine-0"].errors == (code == 500)


async def test_a_refusal_of_the_gateway_after_the_head_is_an_event(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, limits=SOON | {"hold_timeout_s": 0.5})
    engine.agent.say(accepting=False)
    await served.takes()
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    _, body = await client._body({b"transfer-encoding": b"chunked"})
    assert json.loads(body.strip().removeprefix(b"data: "))["error"]["code"] == "no_engine"
    assert served.gateway.stats.refusals == {"no_engine": 1}
    assert served.gateway.stats.failed == 1
    assert await client.ended()


async def test_another_engine_takes_an_open_stream_over(make_engine, serve):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD)
        await going.wait()
        reset(writer)

    going = asyncio.Event()
    bad, good = await make_engine(breaks), await make_engine(always(SSE_HEAD + event("a") + SSE_END))
    served = await serve(bad, good, dispatch={"policy": "roundRobin"}, limits=SOON)
    clients = [await served.connect() for _ in range(2)]
    for client in clients:
        client.send(post(prompt(**STREAM)))
    for client in clients:
        await head_of(client)
    going.set()
    for client in clients:
        framed, _ = await client._body({b"transfer-encoding": b"chunked"})
        assert framed == event("a") + SSE_END
    assert served.gateway.stats.retried == 1


@pytest.mark.parametrize("fields", [{}, {"stream": False}])
async def test_an_answer_in_one_piece_waits_for_its_status(make_engine, serve, fields):
    slow = Slow(b"", json_answer(REFUSED, status="400 Bad Request"))
    engine = await make_engine(slow)
    served = await serve(engine, limits=SOON)
    streaming, waiting = await served.connect(), await served.connect()
    waiting.send(post(prompt(**fields)))
    await until(lambda: engine.requests)
    # One that came later has its head.
    streaming.send(post(prompt(**STREAM)))
    await head_of(streaming)
    slow.go.set()
    assert (await waiting.answer()).status == 400


async def test_embeddings_and_http_1_0_have_no_early_head(make_engine, serve):
    slow = Slow(b"", json_answer(OK))
    engine = await make_engine(slow)
    served = await serve(engine, limits=SOON)
    streaming, embeds, old = [await served.connect() for _ in range(3)]
    embeds.send(post({"model": "tiny", "input": "x", "stream": True}, path="/v1/embeddings"))
    old.send(post(prompt(**STREAM)).replace(b"HTTP/1.1", b"HTTP/1.0"))
    await until(lambda: len(engine.requests) == 2)
    streaming.send(post(prompt(**STREAM)))
    await head_of(streaming)
    slow.go.set()
    assert (await embeds.answer()).json == OK
    assert (await old.answer()).json == OK


EVENTS = b'data: {"text": "a"}\n\ndata: {"text": "b"}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("framing", [b"connection: close\r\n", b"content-length: %d\r\n" % len(EVENTS + DONE)])
async def test_a_stream_without_chunks_gets_them_behind_an_early_head(make_engine, serve, framing):
    async def answers(_request, writer):
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%b\r\n" % framing + EVENTS)
        await writer.drain()
        await more.wait()
        writer.write(DONE)
        await writer.drain()
        if b"close" in framing:
            writer.close()

    go, more = asyncio.Event(), asyncio.Event()
    engine = await make_engine(answers)
    served = await serve(engine, limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    go.set()
    assert await asyncio.wait_for(client.reader.readexactly(len(chunk(EVENTS))), 5.0) == chunk(EVENTS)
    more.set()
    framed, _ = await client._body({b"transfer-encoding": b"chunked"})
    assert framed == chunk(DONE) + b"0\r\n\r\n"
    await until(lambda: served.in_flight == 0)
    stats, row = served.gateway.stats, served.gateway.dispatcher.engines["engine-0"]
    assert (len(engine.requests), stats.retried, stats.failed, row.errors) == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (b"400 Bad Request", b'{"error": {"code": 400, "message": "too long"}}', 400, "too long"),
        (b"404 Not Found", b"no such page\n", "bad_request", "the engine answered 404: no such page"),
        (b"502 Bad Gateway", b"<html>\n\xff</html>", "engine_failed", "the engine answered 502: <html> \ufffd</html>"),
        (b"422 Unprocessable Content", b'{"detail": "x"}', "bad_request", 'the engine answered 422: {"detail": "x"}'),
    ],
)
@pytest.mark.parametrize("has_length", [True, False])
async def test_any_error_answer_behind_an_early_head_is_an_error_event(
    make_engine, serve, status, body, code, message, has_length
):
    async def answers(_request, writer):
        await go.wait()
        framing = b"content-length: %d" % len(body) if has_length else b"connection: close"
        writer.write(b"HTTP/1.1 %b\r\ncontent-type: text/plain\r\n%b\r\n\r\n" % (status, framing) + body)
        await writer.drain()
        writer.close()

    go = asyncio.Event()
    engine = await make_engine(answers)
    served = await serve(engine, limits=SOON)
    client = await served.connect()
    client.send(post(prompt(**STREAM)))
    await head_of(client)
    go.set()
    _, data = await client._body({b"transfer-encoding": b"chunked"})
    error = json.loads(data.removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"]) == (code, message)
    assert (len(engine.requests), served.gateway.stats.retried) == (1, 0)


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/chat/completions/batch"])
async def test_a_route_without_streams_has_no_early_head(make_engine, serve, path):
    slow = Slow(b"", json_answer(OK))
    engine = await make_engine(slow)
    served = await serve(engine, limits=SOON)
    waiting, streaming = await served.connect(), await served.connect()
    waiting.send(post({"model": "tiny", "messages": [], **STREAM}, path=path))
    await until(lambda: engine.requests)
    streaming.send(post(prompt(**STREAM)))
    await head_of(streaming)
    slow.go.set()
    answer = await waiting.answer()
    assert (answer.status, answer.json) == (200, OK)

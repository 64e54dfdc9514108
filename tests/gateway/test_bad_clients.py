"""A bad client gets one OpenAI-shaped error, costs little, and does not affect other clients."""

import asyncio
import json
import tracemalloc

import pytest

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, post, prompt
from tests.gateway.peers import answer_ok
from tests.gateway.waiting import until

SHORT = {"header_timeout_s": 0.3, "body_timeout_s": 0.3}


def error_of(answer) -> tuple[int, str, str | None]:
    """Status, code and param of an OpenAI-shaped error."""
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers[b"content-type"] == b"application/json"
    return answer.status, error["code"], error["param"]


# Paths.


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "//pause",
        "/pause",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/scale_elastic_ep",
        "/metrics",
        "/v1/../pause",
        "/v1/%2e%2e/pause",
        "/v1/chat/completions/",
        "/v1/chat/completions/../../../pause",
        "/v1/chat/completions%2f..%2fpause",
        "/v1/chat//completions",
        "//v1/models",
        "/V1/models",
        "/v1/models;x=/pause",
        "/v1/state",
        "/v1/config",
        "/pause?/v1/models",
        "/pause?x=/v1/models",
        "http://127.0.0.1/pause",
        "http://127.0.0.1",
        "http://127.0.0.1?x=/v1/models",
        "http://127.0.0.1//v1/models",
        "http:///v1/models",
        "ftp://127.0.0.1/v1/models",
        "*",
        "/v1/models#/pause",
        "/tokenize%00",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
async def test_nothing_but_the_serving_paths_exists(make_engine, serve, target, method):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(f"{method} {target} HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n".encode())
    assert error_of(answer) == (404, "not_found", None)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/completions", b"POST"), ("POST", "/v1/models", b"GET"), ("DELETE", "/tokenize", b"POST")],
)
async def test_another_method_is_answered_with_the_one_that_is_allowed(make_engine, serve, method, path, allowed):
    served = await serve(await make_engine())
    answer = await served.ask(f"{method} {path} HTTP/1.1\r\nhost: g\r\ncontent-length: 0\r\n\r\n".encode())
    assert error_of(answer) == (405, "method_not_allowed", None)
    assert answer.headers[b"allow"] == allowed


async def test_an_error_to_head_has_no_body(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(b"HEAD /v1/models HTTP/1.1\r\n\r\n" + b"HEAD /no HTTP/1.1\r\n\r\n" + b"GET /health HTTP/1.1\r\n\r\n")
    assert [(await client.answer(head_only=True)).status for _ in range(2)] == [405, 404]
    assert (await client.answer()).status == 200


# Bodies.


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b'"text"', None),
        (b"null", None),
        (b"NaN", None),
        (b"[" * 100_000, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, None),
        (b'{"model": 1}', "model"),
        (b'{"model": ["tiny"]}', "model"),
        (b'{"model": "tiny", "priority": "high"}', "priority"),
        (b'{"model": "tiny", "priority": 1.5}', "priority"),
        (b'{"model": "tiny", "priority": []}', "priority"),
        (b'{"model": "tiny", "priority": NaN}', "priority"),
    ],
)
async def test_a_body_that_cannot_be_dispatched_is_refused_and_the_connection_lives(make_engine, serve, body, param):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    client.send(post(body))
    assert error_of(await client.answer()) == (400, "bad_request", param)
    client.send(post(prompt()))
    assert (await client.answer()).json == OK
    assert len(engine.requests) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"])
async def test_what_the_gateway_does_not_need_is_the_engines_to_judge(make_engine, serve, path):
    engine = await make_engine()
    served = await serve(engine)
    deep = b"[" * 1000 + b"]" * 1000
    names = ("messages", "prompt", "input", "instructions")
    for value in (b"7", b"null", b"[[[1], 2], {}]", b'{"content": {"content": []}}', b'[{"text": 5}]', deep):
        body = b'{"model": "tiny", %b}' % b", ".join(b'"%b": %b' % (name.encode(), value) for name in names)
        assert (await served.ask(post(body, path))).status == 200
        assert engine.requests[-1].body == body


async def test_the_error_for_an_unknown_model_names_the_known_ones(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(post(prompt() | {"model": "large\n" * 100}))
    assert error_of(answer) == (404, "model_not_found", "model")
    assert "tiny" in answer.json["error"]["message"]
    assert engine.requests == []


# Sizes.


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_of_100_mb_is_refused_without_being_kept(make_engine, serve, declared):
    engine = await make_engine()
    served = await serve(engine, limits={"max_body_bytes": 1_000_000})
    client = await served.connect()
    framing = b"content-length: 100000000" if declared else b"transfer-encoding: chunked"
    client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\n%b\r\n\r\n" % framing)
    piece = bytes(1_000_000) if declared else chunk(bytes(1_000_000))

    async def send_all() -> None:
        for _ in range(100):
            client.send(piece)
            await client.writer.drain()

    tracemalloc.start()
    try:
        await send_all()
        answer = await client.answer()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error_of(answer) == (413, "body_too_large", None)
    assert answer.headers[b"connection"] == b"close"
    assert peak_bytes < 30_000_000
    assert engine.requests == []


async def test_100_continue_is_not_sent_for_a_body_that_is_too_large(make_engine, serve):
    served = await serve(await make_engine(), limits={"max_body_bytes": 10})
    answer = await served.ask(post(prompt(), extra=b"Expect: 100-continue\r\n"))
    assert answer.status == 413


@pytest.mark.parametrize("pieces", [1, 40])
@pytest.mark.parametrize(
    "head",
    [
        b"GET /v1/models?%b HTTP/1.1\r\n\r\n" % (b"x" * 200_000),
        b"GET /v1/models HTTP/1.1\r\nX-Long: %b\r\n\r\n" % (b"x" * 200_000),
        b"GET /v1/models HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 20_000 + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\nX-Endless: %b" % (b"x" * 400_000),
    ],
    ids=["url", "value", "many", "endless"],
)
async def test_a_head_of_an_absurd_size_is_refused(make_engine, serve, head, pieces):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    step = len(head) // pieces
    for start in range(0, len(head), step):
        client.send(head[start : start + step])
        await asyncio.sleep(0.001)
    assert error_of(await client.answer()) == (431, "head_too_large", None)
    assert await client.ended()
    assert engine.requests == []


async def test_a_trailer_without_end_is_refused(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
    for _ in range(100):
        client.send(b"x-trailer: %b\r\n" % (b"x" * 4000))
        await asyncio.sleep(0)
    assert (await client.answer()).status == 431


# Slowness and ends.


@pytest.mark.parametrize(
    "part", [b"GET /v1/mod", b"GET /v1/models HTTP/1.1\r\nx: y\r\n", post(prompt())[:-3]], ids=["line", "head", "body"]
)
async def test_a_slow_client_gets_a_timeout_error(make_engine, serve, part):
    served = await serve(await make_engine(), limits=SHORT)
    client = await served.connect()
    client.send(part)
    assert error_of(await client.answer()) == (408, "request_timeout", None)
    assert await client.ended()


async def test_a_client_that_drips_does_not_get_more_time(make_engine, serve):
    served = await serve(await make_engine(), limits=SHORT)
    client = await served.connect()

    async def drip() -> None:
        for byte in b"GET /v1/models HTTP/1.1\r\n" + b"x: y\r\n" * 100:
            client.send(bytes([byte]))
            await asyncio.sleep(0.02)

    dripping = asyncio.ensure_future(drip())
    assert (await client.answer()).status == 408
    dripping.cancel()


async def test_a_silent_connection_is_closed(make_engine, serve):
    served = await serve(await make_engine(), limits=SHORT | {"idle_timeout_s": 0.3})
    silent, idle = await served.connect(), await served.connect()
    idle.send(post(prompt()))
    await idle.answer()
    assert await silent.ended()
    assert await idle.ended()


async def test_a_request_behind_a_long_one_has_its_own_time(make_engine, serve):
    async def long(_request, writer):
        await asyncio.sleep(0.5)
        await answer_ok(_request, writer)

    served = await serve(await make_engine(long), limits=SHORT)
    client = await served.connect()
    second = post(prompt("second"))
    client.send(post(prompt()) + second[:30])
    assert (await client.answer()).status == 200
    client.send(second[30:])
    assert (await client.answer()).status == 200


async def test_a_connection_half_closed_amid_a_request_is_answered(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(prompt())[:-3])
    client.writer.write_eof()
    assert error_of(await client.answer()) == (400, "bad_request", None)
    assert await client.ended()


@pytest.mark.parametrize("part", [b"", b"GET /v1/m", post(prompt())[:-3]])
async def test_a_reset_amid_a_request_leaves_nothing_behind(make_engine, serve, part):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(part)
    await asyncio.sleep(0.02)
    client.reset()
    await until(lambda: not served.gateway._connections)
    assert served.in_flight == 0


# Smuggling.


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: +2\r\n\r\n{}",
        b"Content-Length: 0x2\r\n\r\n{}",
        b"Content-Length:\r\n\r\n",
        b"X: a\nX-Injected: b\r\n\r\n",
        b"X: a\rX-Injected: b\r\n\r\n",
        b"X: a\r\n folded\r\n\r\n",
        b"X: a\x00b\r\n\r\n",
        b"X y: a\r\n\r\n",
        b": a\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nZ\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
    ],
)
async def test_what_smuggling_lives_on_is_refused(make_engine, serve, fields):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    client.send(b"POST /v1/completions HTTP/1.1\r\nhost: g\r\n" + fields)
    assert (await client.answer()).status == 400
    assert await client.ended()
    assert engine.requests == []


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"hello\r\n\r\n"]
)
async def test_what_is_not_http_is_refused(make_engine, serve, garbage):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(garbage)
    assert (await client.answer()).status == 400
    assert await client.ended()


async def test_garbage_behind_a_good_request_does_not_spoil_its_answer(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(prompt()) + b"\x00garbage\r\n\r\n")
    assert (await client.answer()).json == OK
    assert (await client.answer()).status == 400
    assert await client.ended()


async def test_bad_clients_do_not_disturb_a_good_stream(make_engine, serve):
    done = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD)
        while not done.is_set():
            writer.write(event("x"))
            await asyncio.sleep(0.002)
        writer.write(SSE_END)

    engine = await make_engine(stream)
    served = await serve(engine, limits=SHORT | {"max_body_bytes": 10_000})
    good = await served.connect()
    good.send(post(prompt(stream=True)))
    await until(lambda: engine.requests)
    bad = [
        b"\x00" * 100,
        post(b"{"),
        post(b"x" * 20_000),
        b"GET /pause HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 600_000,
        post(prompt())[:-2],
        post(prompt() | {"model": "no"}),
    ]
    clients = [await served.connect() for _ in bad]
    for client, message in zip(clients, bad, strict=True):
        client.send(message)
    assert [(await client.answer()).status for client in clients] == [400, 400, 413, 404, 431, 408, 404]
    done.set()
    answer = await good.answer()
    assert answer.framed_body.endswith(SSE_END)
    assert (
        answer.body == answer.body[: len(b'data: {"text": "x"}\n\n')] * answer.body.count(b'"x"') + b"data: [DONE]\n\n"
    )
    assert len(engine.requests) == 1


async def test_refusals_are_counted_once_each(make_engine, serve):
    served = await serve(await make_engine())
    stats = served.gateway.stats
    await served.ask(post(b"{"))
    await served.ask(b"GET /pause HTTP/1.1\r\n\r\n")
    await served.ask(b"GET /v1/completions HTTP/1.1\r\n\r\n")
    await served.ask(b"\x00\r\n\r\n")
    await served.ask(post(json.dumps(prompt()).encode()))
    assert stats.requests == {
        ("completions", 400): 1,
        ("other", 404): 1,
        ("completions", 405): 1,
        ("other", 400): 1,
        ("completions", 200): 1,
    }
    assert dict(stats.refusals) == {"bad_request": 2, "not_found": 1, "method_not_allowed": 1}
    assert (stats.finished, stats.failed, stats.retried) == (5, 0, 0)

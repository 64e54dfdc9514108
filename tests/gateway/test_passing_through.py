"""What a client sends reaches the engine, and what the engine answers reaches the client, byte for byte."""

import asyncio
import gzip
import json

import pytest

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, never
from tests.gateway.waiting import until

ODD_JSON = b'{ "model" :\t"tiny", "prompt":"h\\u00e9llo \xf0\x9f\x8c\x8d", "x": 1.00, "x": 1e0 ,"stream":false}\r\n'


async def test_a_body_reaches_the_engine_byte_for_byte_and_its_answer_comes_back_so(make_engine, serve):
    answer = json_answer({"odd": "\u2603", "n": 1.0}, extra=b"X-Engine:  spaced  \r\n")
    engine = await make_engine(always(answer))
    served = await serve(engine)
    got = await served.ask(post(ODD_JSON))
    assert engine.requests[0].body == ODD_JSON
    status, head_and_body = answer.split(b"\r\n", 1)
    assert got.raw.startswith(status + b"\r\nx-request-id: ")
    assert got.raw.endswith(head_and_body)


async def test_a_stream_keeps_its_chunks_as_they_were_sent_and_comes_as_it_is_made(make_engine, serve):
    go_on = asyncio.Event()
    pieces = [event("a"), b"00B;ext=1\r\ndata: split", b"\r\n", event("b") + event("c"), SSE_END]

    async def stream(_request, writer):
        writer.write(SSE_HEAD)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await go_on.wait()

    served = await serve(await make_engine(stream))
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert await client.reader.readexactly(len(pieces[0])) == pieces[0]
    go_on.set()
    rest = b"".join(pieces[1:])
    assert await client.reader.readexactly(len(rest)) == rest
    assert (await served.ask(post(prompt()))).status == 200


async def test_an_answer_without_a_length_ends_with_the_connection(make_engine, serve):
    served = await serve(await make_engine(always(b"HTTP/1.1 200 OK\r\n\r\nall of it", close=True)))
    client = await served.connect()
    client.send(post(prompt()))
    answer = await client.answer()
    assert (answer.body, answer.headers[b"connection"]) == (b"all of it", b"close")
    assert served.gateway.stats.failed == 0


async def test_a_large_answer_and_a_large_body_pass_whole(make_engine, serve):
    large = bytes(range(256)) * 8000
    engine = await make_engine(always(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large)))
    served = await serve(engine)
    body = json.dumps(prompt("x" * 3_000_000)).encode()
    assert (await served.ask(post(body))).body == large
    assert engine.requests[0].body == body


async def test_heads_of_status_1xx_stay_at_the_gateway(make_engine, serve):
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    served = await serve(await make_engine(always(early + early + json_answer(OK))))
    client = await served.connect()
    for _ in range(2):
        client.send(post(prompt()))
        answer = await client.answer()
        assert answer.status == 200
        assert answer.json == OK
        assert b"link" not in answer.headers


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_without_a_body_is_whole(make_engine, serve, status):
    served = await serve(await make_engine(always(f"HTTP/1.1 {status}\r\nx: y\r\n\r\n".encode())))
    client = await served.connect()
    client.send(post(prompt()))
    assert (await client.answer(head_only=True)).status == int(status[:3])


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "422 Unprocessable", "500 Oops", "429 Busy"])
async def test_an_error_that_is_the_engines_answer_is_passed_on_and_not_retried(make_engine, serve, status):
    engine = await make_engine(always(json_answer({"error": "its own"}, status=status)))
    served = await serve(engine)
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.json) == (int(status[:3]), {"error": "its own"})
    assert len(engine.requests) == 1


async def test_models_and_tokenize_pass(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    models = await served.ask(b"GET /v1/models?x=1 HTTP/1.1\r\nhost: g\r\n\r\n")
    assert models.json["data"] == [{"id": "tiny"}]
    assert (await served.ask(post(prompt(), "/tokenize"))).status == 200
    lines = [request.line for request in engine.requests]
    assert lines == [b"GET /v1/models?x=1 HTTP/1.1", b"POST /tokenize HTTP/1.1"]


# Heads.


async def test_a_request_id_is_taken_or_made_and_sent_to_both_sides(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    own = await served.ask(post(prompt(), extra=b"X-Request-Id: mine-1\r\n"))
    made = await served.ask(post(prompt()))
    bad = await served.ask(post(prompt(), extra=b"X-Request-Id: has space\r\n"))
    seen = [answer.headers[b"x-request-id"] for answer in (own, made, bad)]
    assert seen == [request.headers[b"x-request-id"] for request in engine.requests]
    assert seen[0] == b"mine-1"
    assert b" " not in seen[2]
    assert len(set(seen)) == 3


async def test_errors_carry_the_request_id(make_engine, serve):
    served = await serve(await make_engine())
    answer = await served.ask(post(b"{", extra=b"X-Request-Id: mine-2\r\n"))
    assert (answer.status, answer.headers[b"x-request-id"]) == (400, b"mine-2")


async def test_fields_of_one_connection_and_the_rank_do_not_pass_the_gateway(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    extra = (
        b"Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=9\r\nTE: trailers\r\n"
        b"Proxy-Authorization: x\r\nX-Data-Parallel-Rank: 7\r\nAuthorization: Bearer k\r\nX-Other: 2\r\n"
    )
    await served.ask(post(prompt(), extra=extra))
    headers = engine.requests[0].headers
    of_the_gateway = {b"host", b"x-request-id", b"content-length", b"x-moeserving-peer"}
    assert set(headers) == of_the_gateway | {b"content-type", b"authorization", b"x-other"}
    assert headers[b"host"] == f"127.0.0.1:{engine.port}".encode()


async def test_fields_of_the_engines_connection_do_not_reach_the_client(make_engine, serve):
    extra = (
        b"Connection: close, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\nX-Request-Id: its\r\nX-Other: 2\r\n"
    )
    served = await serve(await make_engine(always(json_answer(OK, extra=extra), close=True)))
    client = await served.connect()
    for _ in range(2):
        client.send(post(prompt(), extra=b"X-Request-Id: mine\r\n"))
        answer = await client.answer()
        assert answer.json == OK
        assert answer.headers[b"x-other"] == b"2"
        assert answer.headers[b"x-request-id"] == b"mine"
        assert not {b"connection", b"keep-alive", b"x-private"} & set(answer.headers)


async def test_a_rank_is_addressed_where_a_server_has_several(make_engine, serve):
    engine = await make_engine(ranks=2)
    served = await serve(engine, ranks=2, dispatch={"policy": "roundRobin"})
    for _ in range(4):
        await served.ask(post(prompt(), extra=b"X-Data-Parallel-Rank: 7\r\n"))
    ranks = [request.headers[b"x-data-parallel-rank"] for request in engine.requests]
    assert sorted(ranks) == [b"0", b"0", b"1", b"1"]


async def test_a_trailer_of_the_client_is_no_header(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    body = json.dumps(prompt()).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await served.ask(head + chunk(body) + b"0\r\nX-Session-Id: a\r\nX-Trailer: b\r\n\r\n")
    assert answer.status == 200
    assert not {b"x-trailer", b"x-session-id"} & set(engine.requests[0].headers)


# Connections of clients.


async def test_a_connection_of_a_client_is_used_again_and_so_is_that_to_the_engine(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    before = engine.connections
    client = await served.connect()
    for _ in range(5):
        client.send(post(prompt()))
        assert (await client.answer()).status == 200
    # Its models may be asked over a connection of their own meanwhile.
    assert engine.connections - before in (1, 2)


async def test_pipelined_requests_are_answered_in_their_order(make_engine, serve):
    async def slow_first(request, writer):
        text = json.loads(request.body)["prompt"]
        await asyncio.sleep(0.05 if text == "0" else 0)
        writer.write(json_answer({"echo": text}))

    served = await serve(await make_engine(slow_first))
    client = await served.connect()
    whole = b"".join(post(prompt(str(number))) for number in range(4))
    client.send(whole + b"GET /nowhere HTTP/1.1\r\nhost: g\r\n\r\n" + post(prompt("5"))[:20])
    assert [(await client.answer()).json["echo"] for _ in range(4)] == ["0", "1", "2", "3"]
    assert (await client.answer()).status == 404
    client.send(post(prompt("5"))[20:])
    assert (await client.answer()).json["echo"] == "5"


async def test_a_client_that_pipelined_and_leaves_is_noticed(make_engine, serve):
    async def second_waits(request, writer):
        if json.loads(request.body)["prompt"] == "2":
            await never(request, writer)
        writer.write(json_answer(OK))

    engine = await make_engine(second_waits)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt("1")) + post(prompt("2")))
    await client.answer()
    await until(lambda: len(engine.requests) == 2)
    client.reset()
    await asyncio.wait_for(engine.requests[1].gone.wait(), 1.0)


@pytest.mark.parametrize("cuts", [(), (7,), (1, 2, 30)])
async def test_a_chunked_body_reaches_the_engine_with_its_length(make_engine, serve, cuts):
    engine = await make_engine()
    served = await serve(engine)
    body = json.dumps(prompt("chunked")).encode()
    parts = [body[start:end] for start, end in zip((0, *cuts), (*cuts, None), strict=True)]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
    assert (await served.ask(head + b"".join(map(chunk, parts)) + b"0\r\n\r\n")).status == 200
    assert engine.requests[0].body == body
    assert engine.requests[0].headers[b"content-length"] == str(len(body)).encode()


async def test_100_continue_is_sent_before_the_body(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    head, body = post(prompt(), extra=b"Expect: 100-continue\r\n").split(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    assert (await client.answer()).status == 100
    client.send(body)
    assert (await client.answer()).status == 200


async def test_a_client_of_http_1_0_gets_its_answer_and_the_end_of_the_connection(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt()).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert (await client.answer()).json == OK
    assert await client.ended()
    assert engine.requests[0].line.endswith(b"HTTP/1.0")


async def test_connection_close_is_kept(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(prompt(), extra=b"Connection: close\r\n") + post(prompt()))
    answer = await client.answer()
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
    assert await client.ended()


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_offer_to_upgrade_is_ignored(make_engine, serve, chunked):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"
    whole = post(prompt(), extra=offer)
    head, body = whole.split(b"\r\n\r\n")
    if chunked:
        head = head.split(b"content-length")[0] + b"transfer-encoding: chunked"
        whole = head + b"\r\n\r\n" + chunk(body) + b"0\r\n\r\n"
    for _ in range(2):
        client.send(whole[:-5])
        await asyncio.sleep(0.01)
        client.send(whole[-5:])
        assert (await client.answer()).json == OK
    assert engine.requests[1].body == body
    assert not {b"upgrade", b"http2-settings"} & set(engine.requests[1].headers)


async def test_the_gateways_own_health_answers_get_and_head(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    assert (await served.ask(b"GET /health HTTP/1.1\r\n\r\n")).status == 200
    client = await served.connect()
    client.send(b"HEAD /health HTTP/1.1\r\n\r\n" + b"GET /health HTTP/1.1\r\n\r\n")
    assert (await client.answer(head_only=True)).status == 200
    assert (await client.answer()).json == {"status": "ok"}
    engine.agent.say(accepting=False)
    await until(lambda: not served.gateway.ready)
    assert (await served.ask(b"GET /health HTTP/1.1\r\n\r\n")).status == 503


async def test_an_engine_is_not_asked_for_compressed_answers_which_the_gateway_could_not_read(make_engine, serve):
    async def compresses(request, writer):
        asked = b"gzip" in request.headers.get(b"accept-encoding", b"")
        body = gzip.compress(b"data: [DONE]\n\n") if asked else b"data: [DONE]\n\n"
        writer.write(SSE_HEAD + chunk(body) + b"0\r\n\r\n")

    engine = await make_engine(compresses)
    served = await serve(engine)
    for extra in (b"Accept-Encoding: gzip, deflate\r\n", b"accept-encoding: br\r\nAccept-Encoding: gzip\r\n"):
        answer = await served.ask(post(prompt(stream=True), extra=extra))
        assert answer.body == b"data: [DONE]\n\n"
    assert all(b"accept-encoding" not in request.headers for request in engine.requests)


async def test_a_stream_that_comes_compressed_all_the_same_passes_as_it_comes(make_engine, serve):
    going = asyncio.Event()
    first, second = gzip.compress(b"data: a\n\n"), gzip.compress(b"data: [DONE]\n\n")

    async def compresses(_request, writer):
        writer.write(SSE_HEAD[:-2] + b"content-encoding: gzip\r\n\r\n" + chunk(first))
        await going.wait()
        writer.write(chunk(second) + b"0\r\n\r\n")

    served = await serve(await make_engine(compresses))
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    await asyncio.wait_for(client.reader.readuntil(first), 10)
    going.set()
    assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(chunk(second) + b"0\r\n\r\n")
    assert served.gateway.stats.requests == {("completions", 200): 1}

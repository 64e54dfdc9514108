"""An error of an engine is one however it comes: in pieces, by its name, with status 200, or as a broken answer."""

import asyncio
import json

import pytest

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, answer_ok, reset
from tests.gateway.test_answers_that_are_errors import BROKEN, REFUSED, TOKEN, TURNS, data, stream
from tests.gateway.waiting import until

DONE = b"data: [DONE]\n\n"
LONG = data({"error": {"message": "x" * 3000, "type": "InternalServerError", "code": 500}})


def in_pieces(*pieces, close=False):
    """An engine that writes these pieces, each in a read of its own."""

    async def script(_request, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        if close:
            writer.close()

    return script


WITHIN = {
    "in two reads": in_pieces(SSE_HEAD + chunk(TOKEN), chunk(LONG)[:40], chunk(LONG)[40:] + SSE_END),
    "in three reads": in_pieces(
        SSE_HEAD + chunk(TOKEN), chunk(LONG)[:9], chunk(LONG)[9:2000], chunk(LONG)[2000:] + SSE_END
    ),
    "behind half a token": in_pieces(
        SSE_HEAD + chunk(TOKEN) + chunk(TOKEN + LONG)[:90], chunk(TOKEN + LONG)[90:] + SSE_END
    ),
    "in two chunks": in_pieces(SSE_HEAD + chunk(TOKEN), chunk(LONG[:12]), chunk(LONG[12:]) + SSE_END),
    "in chunks of one read": stream(TOKEN, LONG[:12], LONG[12:]),
    "with a name and no other sign": stream(TOKEN, b"event: error\n" + data({"message": "no", "code": 500})),
    "with a name and no JSON": stream(TOKEN, b"event:error\ndata: no\n\n"),
    "in two lines": stream(TOKEN, b'data: {"error":\ndata: {"message": "no", "code": 500}}\n\n'),
    "with CRLF": stream(TOKEN, data(BROKEN).replace(b"\n", b"\r\n")),
    "without chunks": in_pieces(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + TOKEN, LONG[:40], LONG[40:], DONE, close=True
    ),
    "after the last event": stream(TOKEN, DONE, data(BROKEN)),
}


@pytest.mark.parametrize("script", WITHIN.values(), ids=WITHIN)
async def test_an_error_within_a_stream_is_seen_however_it_comes(make_engine, serve, script):
    bad, good = await make_engine(script, name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(8):
        assert (await served.ask(post(prompt(stream=True)))).status == 200
    stats = served.gateway.stats
    assert stats.requests == {("completions", 200): 5, ("completions", 500): 3}
    assert served.gateway.dispatcher.ejections["bad"] == 1


TEXTS = {
    "a text about errors": stream(TOKEN, data({"choices": [{"index": 0, "text": 'event: error\n{"error": 500}'}]})),
    "nothing": stream(TOKEN, data({"error": None, "choices": []})),
    "in pieces": in_pieces(SSE_HEAD + chunk(TOKEN)[:20], chunk(TOKEN)[20:], SSE_END),
}


@pytest.mark.parametrize("script", TEXTS.values(), ids=TEXTS)
async def test_what_only_looks_like_an_error_is_none(make_engine, serve, script):
    served = await serve(await make_engine(script))
    await served.ask(post(prompt(stream=True)))
    assert served.gateway.stats.requests == {("completions", 200): 1}


FIRST = {
    "a name": stream(b"event: error\n" + data({"message": "no"})),
    "a name and no JSON": stream(b"event: error\ndata: no\n\n"),
    "an error in one piece": always(json_answer(BROKEN)),
    "an error in one piece, older": always(json_answer({"object": "error", "message": "no", "code": 500})),
    "an error in one piece, a text": always(json_answer({"error": "boom"})),
    "an error in one piece, of Anthropic's": always(json_answer({"type": "error", "error": {"type": "api_error"}})),
    "an error in chunks": in_pieces(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunk(json.dumps(BROKEN).encode()[:30]),
        chunk(json.dumps(BROKEN).encode()[30:]) + b"0\r\n\r\n",
    ),
}


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("script", FIRST.values(), ids=FIRST)
async def test_an_error_with_status_200_is_answered_by_another_engine(make_engine, serve, script, is_stream):
    bad, good = await make_engine(script, name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(12):
        assert (await served.ask(post(prompt(stream=is_stream)))).json == OK
    assert len(bad.requests) <= 4
    assert served.gateway.dispatcher.ejections["bad"] >= 1
    assert served.gateway.stats.failed == 0


@pytest.mark.parametrize(("document", "code"), [(REFUSED, 400), (BROKEN, 500), ({"error": "boom"}, 500)])
async def test_without_another_engine_such_an_error_is_the_answer_and_counts_as_one(make_engine, serve, document, code):
    served = await serve(await make_engine(always(json_answer(document))))
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.json) == (200, document)
    assert served.gateway.stats.requests == {("completions", code): 1}


async def test_an_answer_whose_error_is_null_is_an_answer(make_engine, serve):
    served = await serve(await make_engine(always(json_answer({"error": None, "output": []}))))
    assert (await served.ask(post({"model": "tiny", "input": "x"}, "/v1/responses"))).status == 200
    assert served.gateway.stats.requests == {("responses", 200): 1}


NO_JOBS = {
    "/tokenize": {"model": "tiny", "prompt": "x"},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": []},
    "/v1/chat/completions/render": {"model": "tiny", "messages": []},
}


@pytest.mark.parametrize("path", NO_JOBS)
@pytest.mark.parametrize("status", ["500 Internal Server Error", "502 Bad Gateway"])
async def test_an_engine_that_fails_at_what_needs_no_computing_is_no_black_hole(make_engine, serve, path, status):
    bad, good = await make_engine(always(json_answer(BROKEN, status=status)), name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(12):
        assert (await served.ask(post(NO_JOBS[path], path))).json == OK
    assert len(bad.requests) <= 4
    assert served.gateway.dispatcher.ejections["bad"] >= 1


@pytest.mark.parametrize("path", NO_JOBS)
async def test_the_only_engines_error_there_is_the_answer(make_engine, serve, path):
    engine = await make_engine(always(json_answer(BROKEN, status="500 Internal Server Error")))
    served = await serve(engine)
    for _ in range(6):
        answer = await served.ask(post(NO_JOBS[path], path))
        assert (answer.status, answer.json) == (500, BROKEN)
    assert len(engine.requests) == 6


FULL = always(json_answer({"error": "full"}, status="429 Too Many Requests", extra=b"retry-after: 7\r\n"))


async def test_a_busy_engine_is_left_for_another_one(make_engine, serve):
    busy, good = await make_engine(FULL), await make_engine()
    served = await serve(busy, good, dispatch=TURNS)
    for _ in range(6):
        assert (await served.ask(post(prompt()))).json == OK
    assert 1 <= len(busy.requests) <= 6
    assert dict(served.gateway.dispatcher.ejections) == {}


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_when_all_engines_are_busy_the_client_learns_when_to_come_again(make_engine, serve, status):
    script = always(json_answer({"error": "full"}, status=status, extra=b"retry-after: 7\r\n"))
    first, second = await make_engine(script), await make_engine(script)
    served = await serve(first, second)
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.headers[b"retry-after"], answer.json) == (int(status[:3]), b"7", {"error": "full"})
    assert len(first.requests) + len(second.requests) == 2


async def breaks_off(_request, writer):
    writer.write(SSE_HEAD + event("a"))
    await writer.drain()
    await asyncio.sleep(0.01)
    reset(writer)


async def cut_short(_request, writer):
    writer.write(json_answer(OK)[:-10])
    await writer.drain()
    reset(writer)


@pytest.mark.parametrize("script", [breaks_off, cut_short])
async def test_an_engine_that_breaks_its_answers_off_is_left_for_longer_each_time(make_engine, serve, script):
    bad, good = await make_engine(script, name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    engine = served.gateway.dispatcher.engines["bad"]

    async def breaks(times):
        while len(bad.requests) < times:
            client = await served.connect()
            client.send(post(prompt(stream=script is breaks_off), extra=b"connection: close\r\n"))
            await client.rest()
            await until(lambda: served.in_flight == 0)
            engine.ejected_until_s = engine.suspended_until_s = 0.0
            served.gateway.dispatcher.tick(served.gateway.clock())

    await breaks(4)
    assert engine.errors >= 3
    bad.script = answer_ok
    await until(lambda: served.target_state("bad").accepting)
    for _ in range(16):
        assert (await served.ask(post(prompt()))).json == OK
    assert engine.errors < 3


LAST = {
    "in pieces": [DONE[:5], DONE[5:9], DONE[9:]],
    "in many pieces": [DONE[:4], *(DONE[at : at + 1] for at in range(4, len(DONE)))],
    "a long one": [
        b'event: response.completed\ndata: {"response": {"id": "1", "text": "',
        *[b"x" * 5000] * 6,
        b'"}}\n\n',
    ],
}


@pytest.mark.parametrize("is_one_chunk", [True, False])
@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
async def test_a_client_that_closes_after_the_last_event_in_pieces_got_its_answer(
    make_engine, serve, last, is_one_chunk
):
    pieces = list(last)
    if is_one_chunk:
        pieces[0] = b"%x\r\n%b" % (len(b"".join(last)), pieces[0])
    else:
        pieces = [chunk(piece) for piece in last]

    async def never_ends(_request, writer):
        await in_pieces(SSE_HEAD + event("a"), *pieces)(_request, writer)
        await asyncio.Event().wait()

    served = await serve(await make_engine(never_ends))
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    got, wanted = b"", b"".join(pieces)
    while not got.endswith(wanted):
        got += await asyncio.wait_for(client.reader.read(65536), 10)
    client.writer.close()
    stats = served.gateway.stats
    await until(lambda: stats.finished == 1)
    assert dict(stats.requests) == {("completions", 200): 1}

"""Anthropic's Messages API: its streams, its errors and the rules of every other generating route."""

import json

import pytest

from tests.gateway.clients import get
from tests.gateway.compiled import interpreted
from tests.gateway.messages import SSE_HEAD, chunk, json_answer, post
from tests.gateway.peers import always, never, reset
from tests.gateway.waiting import until

PATH = "/v1/messages"
TURNS = {"policy": "roundRobin"}
ASKED = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
HEALTHY = {"id": "m", "type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 3}}
BROKEN = {"type": "error", "error": {"type": "internal_error", "message": "CUDA error"}}
REFUSED = {"type": "error", "error": {"type": "invalid_request_error", "message": "bad schema"}}


def named(document):
    return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), json.dumps(document).encode())


START = named({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 3}}})
PING = named({"type": "ping"})
BLOCK = named({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
DELTA = named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}})
END = named({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}) + named({"type": "message_stop"})


def stream(*events):
    return always(SSE_HEAD + b"".join(chunk(row) for row in events) + b"0\r\n\r\n")


def ask(**fields):
    return post(ASKED | fields, PATH)


async def test_what_comes_before_the_first_delta_is_no_first_token(make_engine, serve):
    """So another engine can still answer, of which the client alone sees the stream."""
    writers = []

    async def begin(request, writer):
        writers.append(writer)
        writer.write(SSE_HEAD + chunk(START) + chunk(PING) + chunk(BLOCK))
        await never(request, writer)

    bad, good = await make_engine(begin), await make_engine(stream(START, BLOCK, DELTA, END))
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(2):
        client = await served.connect()
        client.send(ask(stream=True))
        before = len(good.requests)
        await until(lambda: writers or len(good.requests) > before)  # noqa: B023
        if writers:
            reset(writers.pop())
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, START + BLOCK + DELTA + END)
    assert len(bad.requests) == 1
    assert (await get(served, "/v1/state"))[1]["ttft_s"] is not None


@pytest.mark.parametrize(
    "error",
    [
        always(json_answer(BROKEN, status="500 Internal Server Error")),
        stream(named(BROKEN)),
        stream(START, PING, named(BROKEN)),
        stream(START, BLOCK),
    ],
    ids=["500", "first event", "after the start", "no end"],
)
async def test_the_error_of_an_engine_is_answered_by_another_one(make_engine, serve, error):
    bad, good = await make_engine(error, name="bad"), await make_engine(stream(START, BLOCK, DELTA, END))
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(8):
        assert (await served.ask(ask(stream=True))).body == START + BLOCK + DELTA + END
    assert served.gateway.dispatcher.ejections["bad"] >= 1


@pytest.mark.parametrize("events", [(), (START,)], ids=["first", "after the start"])
async def test_the_refusal_of_a_client_counts_against_no_engine(make_engine, serve, events):
    engines = [await make_engine(stream(*events, named(REFUSED))) for _ in range(2)]
    served = await serve(*engines, dispatch=TURNS)
    for _ in range(8):
        assert b"bad schema" in (await served.ask(ask(stream=True))).body
    assert [len(engine.requests) for engine in engines] == [4, 4]
    assert dict(served.gateway.dispatcher.ejections) == {}


async def test_a_client_that_closes_at_the_last_event_has_its_answer(make_engine, serve):
    async def stays_open(request, writer):
        writer.write(SSE_HEAD + chunk(START) + chunk(DELTA) + chunk(END))
        await never(request, writer)

    engine = await make_engine(stays_open)
    served = await serve(engine)
    client = await served.connect()
    client.send(ask(stream=True))
    await client.reader.readuntil(named({"type": "message_stop"}))
    client.writer.close()
    await until(lambda: served.gateway.stats.finished == 1)
    assert served.gateway.stats.requests["messages", 200] == 1


async def test_a_stream_that_breaks_ends_with_a_named_error(make_engine, serve):
    async def breaks(request, writer):
        writer.write(SSE_HEAD + chunk(START) + chunk(DELTA))
        await writer.drain()
        writer.close()

    engine = await make_engine(breaks)
    served = await serve(engine)
    answer = await served.ask(ask(stream=True))
    last = answer.body.strip().split(b"\n\n")[-1].split(b"\n")
    assert last[0] == b"event: error"
    document = json.loads(last[1].removeprefix(b"data: "))
    assert (document["type"], document["error"]["type"]) == ("error", "api_error")


REFUSALS = {
    "no JSON": (post(b"{", PATH), 400, "invalid_request_error"),
    "another model": (ask(model="other"), 404, "not_found_error"),
    "method": (b"GET /v1/messages HTTP/1.1\r\nhost: h\r\n\r\n", 405, "invalid_request_error"),
    "too large": (post(b"x" * 3000, PATH), 413, "request_too_large"),
    "a path below": (post(b"{}", PATH + "/batches"), 404, "not_found_error"),
    "no JSON to count": (post(b"[]", PATH + "/count_tokens"), 400, "invalid_request_error"),
}


@pytest.mark.parametrize(("request_bytes", "status", "kind"), REFUSALS.values(), ids=REFUSALS)
async def test_refusals_have_the_shape_of_anthropics_api(make_engine, serve, request_bytes, status, kind):
    engine = await make_engine(always(json_answer(HEALTHY)))
    served = await serve(engine, limits={"max_body_bytes": 2000})
    await until(lambda: served.gateway.dispatcher.models == {"tiny"})
    answer = await served.ask(request_bytes)
    assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (status, "error", kind)
    assert answer.json["error"]["message"]


async def test_a_full_gateway_says_overloaded(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False, phase="draining")
    served = await serve(engine, ready=False, limits={"hold_requests": 0})
    answer = await served.ask(ask())
    assert (answer.status, answer.json["error"]["type"]) == (503, "overloaded_error")


@interpreted
async def test_cached_tokens_are_part_of_the_prompt(make_engine, serve):
    usage = {"input_tokens": 3, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 200}
    engine = await make_engine(always(json_answer(HEALTHY | {"usage": usage})))
    served = await serve(engine)
    learned = []
    served.gateway.dispatcher.learn_tokens = lambda _parsed, tokens: learned.append(tokens)
    await served.ask(ask())
    assert learned == [1203]


async def test_the_user_of_a_coding_agent_is_its_session(make_engine, serve):
    engines = [await make_engine(always(json_answer(HEALTHY))) for _ in range(3)]
    served = await serve(*engines)
    for _ in range(6):
        await served.ask(ask(metadata={"user_id": "user_1_session_2"}))
    assert sorted(len(engine.requests) for engine in engines) == [0, 0, 6]

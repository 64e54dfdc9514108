"""A stream that may go on elsewhere is the same however its bytes come, and its end passes once."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.gateway_config import ContinuedStreams
from moe_gateway.continuation import events as reading
from moe_gateway.continuation.find import find_continuation
from moe_gateway.continuation.stream import Continuation
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import parse_body
from moe_gateway.request.stream_events import split_chunks

from tests.gateway.computing_engine import MAX_MODEL_LEN, Computing
from tests.gateway.messages import SSE_END, SSE_HEAD, chunk, json_answer
from tests.gateway.peers import always
from tests.gateway.test_continuation import PATHS, TEXT, USAGE, ask_for, body_of, events, expected, start, whole

DONE = chunk(b"data: [DONE]\n\n")


def make_stream(route, body):
    data = json.dumps(body).encode()
    request = ClientRequest(b"POST", PATHS[route].encode(), b"", data, b"id", None, True, False, 0.0)
    stream = find_continuation(request, route, parse_body(route, data), ContinuedStreams(chats_by_prefix=True))
    assert isinstance(stream, Continuation)
    return stream


def begin(stream, script):
    """The bytes that the next engine answers."""
    url, sent = stream.start()
    document = json.loads(sent)
    rows = [chunk(row) for row in script.events(url.decode(), document)]
    return [SSE_HEAD, *rows, DONE, b"0\r\n\r\n"]


def feed(stream, data, size, *, has_begun):
    return b"".join(stream.read(data[at : at + size], has_begun=has_begun) for at in range(0, len(data), size))


def is_one_stream(out):
    body, rest = split_chunks(out.removeprefix(SSE_HEAD))
    return out.startswith(SSE_HEAD) and rest == b"0\r\n\r\n" and b"HTTP/1.1" not in body


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_sizes_of_reads_change_nothing(data):
    route = data.draw(st.sampled_from(list(PATHS)))
    body = body_of(route, **data.draw(st.sampled_from([{}, USAGE, {"stop": ["STOP"]}, {"presence_penalty": 1}])))
    script = Computing(TEXT, at_once=data.draw(st.sampled_from([1, 2])))
    want = whole([json.loads(row.removeprefix(b"data: ")) for row in script.events(PATHS[route], body)])
    stream = make_stream(route, body)
    parts = begin(stream, script)
    # Behind the first token, and before the last byte.
    first = len(b"".join(parts[: 3 if route is Route.CHAT else 2]))
    raw = b"".join(parts)
    raw = raw[: data.draw(st.integers(first, len(raw) - 1))]
    out = feed(stream, raw, data.draw(st.integers(1, 400)), has_begun=False)
    assert stream.failure is None
    if (ending := stream.build_ending()) is not None:
        out += ending
    else:
        stream.prepare(MAX_MODEL_LEN)
        out += feed(stream, b"".join(begin(stream, script)), data.draw(st.integers(1, 400)), has_begun=True)
    assert stream.failure is None
    assert is_one_stream(out)
    assert whole(events(split_chunks(out.removeprefix(SSE_HEAD))[0])) == want | {"done": True, "tokens": []}


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"000\r\n\r\n", b"0;x=y\r\n\r\n", b"0\r\nchecksum: 7\r\nx: y\r\n\r\n"])
@pytest.mark.parametrize("size", [1, 2, 5, 100_000])
def test_the_end_passes_once(end, size):
    stream = make_stream(Route.COMPLETIONS, body_of(Route.COMPLETIONS))
    raw = b"".join(begin(stream, Computing(TEXT))[:-1]) + end
    out = feed(stream, raw[:-1], size, has_begun=True)
    assert out.endswith(b"data: [DONE]\n\n\r\n")
    # The engine may fail here: then the end is still missing.
    assert stream.build_ending() == b"0\r\n\r\n"
    out += stream.read(raw[-1:], has_begun=True)
    assert is_one_stream(out)
    assert stream.build_ending() == b""
    assert stream.read(b"0\r\n\r\n", has_begun=True) == b""


async def test_the_next_answer_of_a_connection_follows_an_end_in_pieces(make_engine, serve):
    computing = Computing(TEXT)

    async def script(received, writer):
        rows = list(computing.events("/v1/completions", json.loads(received.body)))
        for piece in (SSE_HEAD + b"".join(map(chunk, rows)) + DONE, b"0\r", b"\n", b"\r", b"\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)

    served = await start(make_engine, serve, script, engines=1)
    client = await served.connect()
    for _ in range(2):
        client.send(ask_for(Route.COMPLETIONS))
        answer = await client.answer()
        assert answer.status == 200
        assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}


def raw_of(received, computing):
    path, body = received.line.split(b" ")[1].decode(), json.loads(received.body)
    computing.bodies.append((path, body))
    return [chunk(row) for row in computing.events(path, body)]


async def test_an_end_that_cannot_be_read_is_a_failure_of_the_engine(make_engine, serve):
    """A chunk size of nine digits is whole for the HTTP parser, and unreadable here."""
    computing = Computing(TEXT)

    async def script(received, writer):
        rows = raw_of(received, computing)
        if len(computing.bodies) == 1:
            rows[9:] = [b"0" * 9 + row for row in rows[9:]]
        writer.write(b"".join([SSE_HEAD, *rows, SSE_END]))

    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}
    assert (served.gateway.stats.continuations, served.in_flight) == ({"prefix": 1}, 0)


async def test_a_stream_whose_end_cannot_be_read_anywhere_ends_with_an_error(make_engine, serve):
    async def script(received, writer):
        rows = raw_of(received, Computing(TEXT))
        writer.write(b"".join([SSE_HEAD, *rows[:9], b"000000000" + chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]))

    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"
    assert served.in_flight == 0


@pytest.mark.parametrize("events_before", [0, 9])
async def test_an_event_without_an_end_is_a_failure_of_the_engine(make_engine, serve, monkeypatch, events_before):
    monkeypatch.setattr(reading, "LONGEST_EVENT_BYTES", 20_000)
    computing = Computing(TEXT)

    async def script(received, writer):
        rows = raw_of(received, computing)
        if len(computing.bodies) == 1:
            rows[events_before:] = [chunk(b"data: " + b"x" * 30_000)]
        writer.write(b"".join([SSE_HEAD, *rows]))
        await writer.drain()
        if len(computing.bodies) == 1:
            await asyncio.Event().wait()
        writer.write(SSE_END)

    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert b"xxx" not in answer.body
    assert b"HTTP/1.1" not in answer.body
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}
    assert len(computing.bodies) == 2
    assert served.in_flight == 0


async def test_only_the_head_of_a_stream_says_that_it_may_go_on(make_engine, serve):
    refusal = always(json_answer({"error": {"message": "too long", "code": 400}}, status="400 Bad Request"))
    for script, header in ((refusal, None), (Computing(TEXT), b"prefix"), (always(json_answer({})), None)):
        served = await start(make_engine, serve, script)
        answer = await served.ask(ask_for(Route.COMPLETIONS))
        assert answer.headers.get(b"x-moeserving-continuation") == header


@pytest.mark.parametrize("fields", [{}, {"presence_penalty": 1}], ids=["prefix", "replay"])
@pytest.mark.parametrize("route", PATHS)
def test_the_ids_of_the_prompt_come_once(route, fields):
    stream = make_stream(route, body_of(route, return_token_ids=True, **fields))
    script = Computing(TEXT)
    out = b"".join(stream.read(part, has_begun=False) for part in begin(stream, script)[:9])
    stream.prepare(MAX_MODEL_LEN)
    out += b"".join(stream.read(part, has_begun=True) for part in begin(stream, script))
    documents = [row for row in events(split_chunks(out.removeprefix(SSE_HEAD))[0]) if type(row) is dict]
    parts = [part for row in documents for part in (row, *row["choices"])]
    prompts = [part["prompt_token_ids"] for part in parts if part.get("prompt_token_ids")]
    assert prompts == [[1000, 1001, 1002, 1003, 1004]]

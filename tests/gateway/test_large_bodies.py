"""Large bodies are parsed in another process, pass as they came, and count as small ones do."""

import asyncio
import io
import json

import pytest
from moe_gateway.engines.job_builder import JobBuilder
from moe_gateway.http.bodies import LARGE_BODY_BYTES, LargeBody, build_body, split_body
from moe_gateway.http.routes import Route
from moe_gateway.request.body_reader import BodyReader
from moe_gateway.request.body_worker import ANSWER, QUESTION, ROUTES, read_answer
from moe_gateway.request.body_worker import serve as answer_questions
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import MOST_KEYED_BYTES, BadBody, parse_body
from moe_scheduling.engine.prefix_index import block_keys

from tests.gateway.clients import get
from tests.gateway.messages import OK, post, prompt
from tests.gateway.test_bad_clients import error_of
from tests.gateway.waiting import until

TEXT = "once upon a time " * 100_000
BODY = json.dumps(prompt(TEXT, stream=False, user="u", priority=3)).encode()


def request_of(body) -> ClientRequest:
    return ClientRequest(b"POST", b"/v1/completions", b"", body, b"id", None, True, False, 0.0)


def ask_worker(route: Route, body: bytes):
    answers = io.BytesIO()
    answer_questions(io.BytesIO(QUESTION.pack(ROUTES.index(route), len(body)) + body), answers)
    head_bytes, prompt_bytes = ANSWER.unpack(answers.getvalue()[: ANSWER.size])
    rest = answers.getvalue()[ANSWER.size :]
    assert len(rest) == head_bytes + prompt_bytes
    return read_answer(rest[:head_bytes], rest[head_bytes:])


@pytest.mark.parametrize(
    ("route", "document"),
    [
        (Route.COMPLETIONS, prompt("x", user="a\ud83d", priority=0.0)),
        (Route.CHAT, {"model": "m", "stream": True, "messages": [{"role": "user", "content": "h\u00e9llo"}]}),
        (Route.CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}),
        (Route.RESPONSES, {"input": "x", "previous_response_id": "r", "background": True, "request_id": "r"}),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3]}),
    ],
)
def test_the_process_reads_what_the_gateway_reads(route, document):
    body = json.dumps(document).encode()
    expected = parse_body(route, body, bounds_answer=True)
    assert ask_worker(route, body) == expected._replace(prompt_bytes=len(expected.prompt), media=dict(expected.media))


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"priority": "high"}', b'{"model": 1}'])
def test_a_bad_body_is_the_same_error(body):
    with pytest.raises(BadBody) as here:
        parse_body(Route.CHAT, body)
    with pytest.raises(BadBody) as there:
        ask_worker(Route.CHAT, body)
    assert (str(here.value), here.value.param) == (str(there.value), there.value.param)


def test_bodies_above_a_size_stay_in_pieces():
    small, large = b"x" * LARGE_BODY_BYTES, b"x" * (LARGE_BODY_BYTES + 1)
    assert split_body(small) == small == build_body([small[:9], small[9:]])
    for body in (split_body(large), build_body([large]), build_body([large[:9], large[9:]])):
        assert isinstance(body, LargeBody)
        assert (len(body), body.join()) == (len(large), large)
        assert len(body.parts) > 1


def test_keys_of_a_part_continue_those_before_it():
    text = bytes(range(256)) * 64
    first = block_keys(text[:2048])
    assert first + block_keys(text[2048:], previous=first[-1]) == block_keys(text)


async def test_a_large_body_is_read_as_a_small_one_is():
    reader = BodyReader()
    body = split_body(BODY)
    assert isinstance(body, LargeBody)
    parsed = await reader.read(request_of(body), Route.COMPLETIONS, 1 << 30)
    await reader.close()
    here = parse_body(Route.COMPLETIONS, BODY)
    assert (parsed.prompt, parsed.prompt_bytes, parsed.keys) == (b"", len(TEXT), block_keys(here.prompt))
    assert (parsed.model, parsed.stream, parsed.priority, parsed.user) == ("tiny", False, 3, "u")
    jobs = JobBuilder()
    assert jobs.build(parsed, None) == jobs.build(here, None)


async def test_only_the_beginning_of_a_huge_prompt_is_indexed():
    reader = BodyReader()
    body = split_body(json.dumps(prompt("x" * (2 * MOST_KEYED_BYTES))).encode())
    parsed = await reader.read(request_of(body), Route.COMPLETIONS, 1 << 30)
    await reader.close()
    assert parsed.keys is not None
    assert (parsed.prompt_bytes, len(parsed.keys)) == (2 * MOST_KEYED_BYTES, MOST_KEYED_BYTES // 512)


async def test_without_the_process_a_body_is_parsed_here(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    reader = BodyReader()
    parsed = await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, 1 << 30)
    assert (parsed.prompt_bytes, parsed.keys) == (len(TEXT), block_keys(TEXT.encode()))
    await reader.close()


async def test_a_process_that_dies_is_started_again():
    reader = BodyReader()
    for _ in range(3):
        assert (await reader.read(request_of(split_body(BODY)), Route.COMPLETIONS, 1 << 30)).prompt_bytes == len(TEXT)
        assert reader._process is not None
        reader._process.kill()
        await reader._process.wait()
    await reader.close()


async def test_a_large_body_passes_byte_for_byte(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    for _ in range(2):
        client.send(post(BODY))
        assert (await client.answer()).json == OK
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    client.send(chunked % (len(BODY), BODY) + post(prompt("behind")))
    assert [(await client.answer()).json for _ in range(2)] == [OK] * 2
    assert [request.body for request in engine.requests[:3]] == [BODY] * 3
    assert json.loads(engine.requests[3].body)["prompt"] == "behind"


async def test_a_large_body_is_sent_again_whole(make_engine, serve):
    async def breaks(_request, writer):
        writer.transport.abort()

    bad, good = await make_engine(breaks), await make_engine()
    served = await serve(bad, good, dispatch={"policy": "roundRobin"})
    for _ in range(2):
        assert (await served.ask(post(BODY))).json == OK
    assert [request.body for request in (*bad.requests, *good.requests)] == [BODY] * 3


async def test_a_large_bad_body_is_refused_and_the_connection_lives(make_engine, serve):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(BODY[:-1]))
    assert error_of(await client.answer()) == (400, "bad_request", None)
    client.send(post(BODY.replace(b"tiny", b"tinz")))
    assert error_of(await client.answer()) == (404, "model_not_found", "model")
    client.send(post(prompt()))
    assert (await client.answer()).json == OK


async def test_a_client_may_leave_and_the_gateway_may_stop_while_a_body_is_read(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    gone, waiting = await served.connect(), await served.connect()
    gone.send(post(BODY))
    waiting.send(post(BODY))
    await until(lambda: sum(connection._exchange is not None for connection in served.gateway._connections) == 2)
    gone.reset()
    closing = asyncio.ensure_future(served.gateway.close())
    answer = await waiting.answer()
    await closing
    assert answer.status in (200, 503)
    assert served.in_flight == 0


async def test_a_continued_prompt_is_found_across_the_size(make_engine, serve):
    engines = [await make_engine() for _ in range(2)]
    served = await serve(*engines)
    text = TEXT[: LARGE_BODY_BYTES - 1000]
    await served.ask(post(prompt(text)))
    await served.ask(post(prompt(text + TEXT[:5000])))
    assert sorted(len(engine.requests) for engine in engines) == [0, 2]
    assert (await get(served, "/v1/state"))[0] == 200

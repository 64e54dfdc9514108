"""Malformed answers of engines: the client gets them, or an error that says so; the gateway serves on."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.fuzzed import FuzzedGateway, internal_errors, running, statuses
from tests.gateway.messages import chunk, post

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with running(tmp_path_factory.mktemp("fuzzed")) as gateway:
        yield gateway


def ends_well(fuzzed: FuzzedGateway, answers: bytes) -> None:
    """Whatever an engine sends, the client's answer begins like HTTP, and the gateway serves on."""
    assert answers.startswith(b"HTTP/1.1 "), answers[:500]
    assert 200 <= statuses(answers)[0] < 1000
    assert internal_errors(fuzzed.gateway) == 0
    fuzzed.check()


EVENTS = st.sampled_from(
    [
        *(
            b"data: [DONE]\n\n",
            b"data:[DONE]\r\n\r\n",
            b"data: {}\n\n",
            b"data: null\n\n",
            b"data: [1]\n\n",
            b"data: \n\n",
        ),
        *(
            b": comment\n\n",
            b":\r\n\r\n",
            b"\n",
            b"\r\n",
            b"\r",
            b"event: error\n",
            b"event: response.created\n",
            b"id: 1\n",
        ),
        b'data: {"choices":[{"index":0,"text":"a"}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\r\n\r\n',
        b'data: {"choices":7}\n\n',
        b'data: {"choices":[7,null,{"delta":8}]}\n\n',
        b'data: {"error":{"message":"m","code":400}}\n\n',
        b'data: {"error":{"message":"m","code":1e999}}\n\n',
        b'data: {"error":"a text"}\n\n',
        b'data: {"error":{"code":"five hundred","type":7}}\n\n',
        b'data: {"type":"response.failed","response":7}\n\n',
        b'data: {"type":"response.completed","response":{"id":7}}\n\n',
        b'event: message_start\ndata: {"type":"message_start","message":[]}\n\n',
        b'event: content_block_delta\ndata: {"type":"content_block_delta"\n\n',
        b'data: {"usage":{"prompt_tokens":-5}}\n\n',
        b"data: " + b"[" * 3000 + b"\n\n",
        b"data: " + b"x" * 100_000 + b"\n\n",
        b"\xff\xfe\x00",
    ]
)
PIECES = st.lists(EVENTS | st.binary(max_size=20), max_size=12)
HEADS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 40\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 400 \r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 999 Strange\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nconnection: content-length, x\r\nx: y\r\ncontent-length: 2\r\n\r\n",
        b"",
    ]
)


@st.composite
def answers(draw) -> list[bytes]:
    """A head, and events in chunks that are cut anywhere, as pieces that are written one by one."""
    head, events, is_chunked = draw(HEADS), draw(PIECES), draw(st.booleans())
    body = b"".join(chunk(event) for event in events if event) if is_chunked else b"".join(events)
    if is_chunked and draw(st.booleans()):
        body += b"0\r\n\r\n"
    data = head + body
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True) if end > begin]


PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize", "/v1/embeddings")


@SHARED
@given(st.sampled_from(PATHS), st.booleans(), answers())
def test_any_answer_of_an_engine_ends_the_request_and_harms_nothing_else(fuzzed, path, stream, pieces):
    fuzzed.answer = pieces
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream}).encode()
    ends_well(fuzzed, fuzzed.exchange(post(body, path, b"connection: close\r\n"), half_close=False))


@st.composite
def cut_streams(draw) -> list[bytes]:
    """A good stream whose bytes are cut, changed or doubled anywhere."""
    events = [b'data: {"choices":[{"index":0,"text":"%d"}]}\n\n' % number for number in range(draw(st.integers(0, 6)))]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    data = bytearray(head + b"".join(map(chunk, [*events, b"data: [DONE]\n\n"])) + b"0\r\n\r\n")
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    end = draw(st.integers(1, len(data)))
    places = sorted(draw(st.lists(st.integers(0, end), max_size=4)))
    return [bytes(data[begin:stop]) for begin, stop in zip([0, *places], [*places, end], strict=True) if stop > begin]


@SHARED
@given(cut_streams())
def test_a_damaged_stream_ends_the_request_and_harms_nothing_else(fuzzed, pieces):
    fuzzed.answer = pieces
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
    ends_well(fuzzed, fuzzed.exchange(post(body, extra=b"connection: close\r\n"), half_close=False))

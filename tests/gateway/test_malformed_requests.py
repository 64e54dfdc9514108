"""Malformed requests of any kind: an error of the client at most, never a fault of the gateway, which serves on.

The profile `soak` of Hypothesis tries 10,000 of them in all, the usual one a hundredth of that.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.fuzzed import FuzzedGateway, running, statuses
from tests.gateway.messages import post

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize"),
    *("/v1/score", "/v1/rerank", "/pooling", "/classify", "/v1/audio/transcriptions", "/v1/messages/count_tokens"),
    *("/inference/v1/generate", "/v1/systemone", "/v1/chat/completions/batch", "/v2/embed", "/detokenize"),
)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with running(tmp_path_factory.mktemp("fuzzed")) as gateway:
        yield gateway


def ends_well(fuzzed: FuzzedGateway, answers: bytes) -> None:
    """The engine answers 200, so no answer of status 500 and up is right."""
    assert all(status < 500 for status in statuses(answers)), answers[:2000]
    fuzzed.check()


# Bodies.

NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "input",
        "instructions",
        "content",
        "text",
        "role",
        "user",
        "priority",
        "stream",
        "tools",
        "tool_calls",
        "function",
        "type",
        "arguments",
        "image_url",
        "input_audio",
        "data",
        "metadata",
        "system",
        "user_id",
        "previous_response_id",
        "conversation",
        "max_tokens",
        "n",
        "documents",
        "query",
        "queries",
        "texts",
        "background",
        "reasoning",
        "output",
        "name",
        "parameters",
        "url",
        "file",
        "store",
        "id",
        "source",
        "thinking",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["tiny", "text", "image_url", "input_text", "function_call", "tool_use", "tool_result", "thinking"]
    )
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=5),
    max_leaves=20,
)
DOCUMENTS = st.dictionaries(NAMES, ANY, max_size=6)


def deep(opening: bytes, closing: bytes) -> st.SearchStrategy[bytes]:
    """A body that is nested deeper than any reader goes."""
    return st.integers(1, 3000).map(lambda depth: b'{"messages":' + opening * depth + closing * depth + b"}")


RAW = (
    DOCUMENTS.map(lambda document: json.dumps(document).encode())
    | DOCUMENTS.map(lambda document: json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.sampled_from(["utf-8-sig", "utf-16", "utf-32", "latin-1"]).flatmap(
        lambda name: DOCUMENTS.map(lambda document: json.dumps(document).encode(name))
    )
    | ANY.map(lambda document: json.dumps(document).encode())
    | st.binary(max_size=200)
    | deep(b"[", b"]")
    | deep(b'{"content":', b"}")
    | st.tuples(DOCUMENTS, st.integers(0, 200)).map(lambda row: json.dumps(row[0]).encode()[: row[1]])
    | st.integers(1, 6000).map(lambda digits: b'{"priority":' + b"9" * digits + b"}")
)
EXTRA = st.sampled_from(
    [
        *(b"", b"content-encoding: gzip\r\n", b"content-encoding: zstd, gzip\r\n", b"content-encoding: br\r\n"),
        *(b"content-type: multipart/form-data; boundary=x\r\n", b"content-type: multipart/form-data\r\n"),
        *(
            b"x-request-timeout: nan\r\n",
            b"x-request-timeout: 1e400\r\n",
            b"x-session-id: \xff\r\n",
            b"origin: null\r\n",
        ),
        *(b"traceparent: 00-zz\r\n", b"x-request-id: \xc3\x28\r\n", b"x-gateway-inference-fairness-id: \x80\r\n"),
    ]
)


@SHARED
@given(st.sampled_from(PATHS), RAW, EXTRA)
def test_any_body_is_answered_and_the_gateway_serves_on(fuzzed, path, body, extra):
    request = post(body, path, b"connection: close\r\n" + extra)
    answers = fuzzed.exchange(request, half_close=False)
    assert statuses(answers), request[:2000]
    ends_well(fuzzed, answers)


# Heads.

TOKENS = st.sampled_from(
    [
        *(
            b"GET",
            b"POST",
            b"PRI",
            b"OPTIONS",
            b"CONNECT",
            b"HEAD",
            b" ",
            b"\r\n",
            b"\n",
            b"\r",
            b"\t",
            b"\x00",
            b":",
            b",",
        ),
        *(b"/v1/completions", b"/v1/models", b"/v1/models/%", b"/v1/responses/a/cancel", b"http://h/v1/models", b"*"),
        *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"host: h", b"content-length: 3", b"content-length: -1"),
        *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"connection: upgrade, close"),
        *(
            b"upgrade: h2c",
            b"expect: 100-continue",
            b"0",
            b"3",
            b"ffffffffffffffff",
            b";a=b",
            b"abc",
            b"\xff",
            b"x" * 300,
        ),
        *(
            b"content-length: 99999999999999999999",
            b"connection: content-length, host",
            b"content-type: a",
            b"\r\n\r\n",
        ),
    ]
)
STREAMS = st.lists(TOKENS | st.binary(max_size=8), min_size=1, max_size=30)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces that end at these places."""
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False) if end > begin]


@SHARED
@given(STREAMS.map(b"".join), st.lists(st.integers(0, 10_000), max_size=3))
def test_any_bytes_are_answered_or_end_the_connection(fuzzed, data, places):
    ends_well(fuzzed, fuzzed.exchange(*cut(data, places)))


@st.composite
def damaged(draw) -> bytes:
    """A good request with some of its bytes changed, left out or doubled."""
    path, document = draw(st.sampled_from(PATHS)), draw(DOCUMENTS)
    data = bytearray(post(json.dumps(document).encode(), path))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data) - 1))
        how = draw(st.sampled_from(["change", "drop", "double"]))
        if how == "change":
            data[at] = draw(st.integers(0, 255))
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 10))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 10))]
        if not data:
            break
    return bytes(data)


@SHARED
@given(damaged(), st.lists(st.integers(0, 10_000), max_size=3))
def test_a_damaged_request_is_answered_or_ends_the_connection(fuzzed, data, places):
    ends_well(fuzzed, fuzzed.exchange(*cut(data, places)))

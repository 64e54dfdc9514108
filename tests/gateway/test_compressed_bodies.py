"""Compressed bodies are decoded within the limit of bodies, and passed on as the engine reads them."""

import contextlib
import gzip
import json
import tracemalloc
import zlib

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.http.content_encoding import EncodingRefused, decode_body, may_have_encoding, take_encoding

from tests.gateway.messages import OK, post, prompt
from tests.gateway.test_bad_clients import error_of

BODY = json.dumps(prompt("hello " * 100)).encode()


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": (b"gzip", gzip.compress(BODY)),
    "x-gzip": (b"X-GZIP", gzip.compress(BODY)),
    "members": (b"gzip", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])),
    "deflate": (b"deflate", zlib.compress(BODY)),
    "raw deflate": (b"deflate", raw_deflate(BODY)),
    "zstd": (b"zstd", zstd.compress(BODY)),
    "frames": (b"zstd", zstd.compress(BODY[:9]) + zstd.compress(BODY[9:])),
    "two": (b"gzip, zstd", zstd.compress(gzip.compress(BODY))),
    "identity": (b"identity", BODY),
}


@pytest.mark.parametrize(("name", "packed"), PACKED.values(), ids=PACKED)
async def test_a_compressed_body_reaches_the_engine_decoded(make_engine, serve, name, packed):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    for header in (b"Content-Encoding", b"content-encoding"):
        client.send(post(packed, extra=b"%b: %b\r\nx-mine: 1\r\n" % (header, name)))
        assert (await client.answer()).json == OK
    for request in engine.requests:
        assert (request.body, request.headers[b"x-mine"]) == (BODY, b"1")
        assert b"content-encoding" not in request.headers
        assert request.headers[b"content-length"] == str(len(BODY)).encode()


@pytest.mark.parametrize("name", [b"br", b"compress", b"gzip, br", b"gzip, gzip, gzip, gzip", b"\xff"])
async def test_an_unknown_encoding_is_refused_with_the_known_ones(make_engine, serve, name):
    served = await serve(await make_engine())
    answer = await served.ask(post(BODY, extra=b"content-encoding: %b\r\n" % name))
    assert error_of(answer) == (415, "unsupported_encoding", None)
    assert answer.headers[b"accept-encoding"] == b"gzip, deflate, zstd"


@pytest.mark.parametrize("name", [b"gzip", b"deflate", b"zstd"])
@pytest.mark.parametrize("packed", [BODY, b"\x00", gzip.compress(BODY, mtime=0)[:-9], zstd.compress(BODY)[:-1]])
async def test_a_body_that_is_not_in_its_encoding_is_a_bad_request(make_engine, serve, name, packed):
    served = await serve(await make_engine())
    client = await served.connect()
    client.send(post(packed, extra=b"content-encoding: %b\r\n" % name))
    assert error_of(await client.answer()) == (400, "bad_request", None)
    client.send(post(prompt()))
    assert (await client.answer()).json == OK


@pytest.mark.parametrize(
    ("name", "pack"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"zstd", zstd.compress)]
)
def test_a_bomb_costs_no_more_than_the_limit(name, pack):
    bomb = pack(b"0" * 100_000_000)
    tracemalloc.start()
    with pytest.raises(EncodingRefused, match="larger than 1000000 bytes") as refused:
        decode_body(bomb, [name], 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert refused.value.outcome.status == 413


def test_a_bomb_within_a_bomb_costs_no_more_either():
    with pytest.raises(EncodingRefused, match="larger than"):
        decode_body(gzip.compress(gzip.compress(b"0" * 10_000_000)), [b"gzip", b"gzip"], 1_000_000)
    assert decode_body(gzip.compress(b"0" * 1000), [b"gzip"], 1000) == b"0" * 1000


async def test_a_client_that_leaves_while_its_body_is_decoded_costs_nothing(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    client.send(post(gzip.compress(BODY), extra=b"content-encoding: gzip\r\n"))
    client.reset()
    assert (await served.ask(post(prompt()))).json == OK
    assert served.in_flight == 0


async def test_requests_behind_a_compressed_one_are_answered_in_order(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    client = await served.connect()
    packed = post(gzip.compress(BODY), extra=b"content-encoding: gzip\r\n")
    client.send(packed + post(prompt("second")) + post(b"{", extra=b"content-encoding: gzip\r\n") + post(prompt("x")))
    assert [(await client.answer()).status for _ in range(4)] == [200, 200, 400, 200]
    assert [json.loads(request.body)["prompt"][:6] for request in engine.requests] == ["hello ", "second", "x"]


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate", b"zstd"]))
def test_any_bytes_are_decoded_or_refused(data, name):
    with contextlib.suppress(EncodingRefused):
        assert len(decode_body(data, [name], 1000)) <= 1000


def test_only_the_encoding_of_the_content_is_read():
    headers = b"accept-encoding: gzip\r\nx-content-encoding: br\r\n"
    assert not may_have_encoding(headers.replace(b"x-content-encoding: br\r\n", b""))
    assert take_encoding(headers) == ([], headers)
    lines = headers + b"Content-Encoding:gzip , identity\r\na: b\r\ncontent-encoding: zstd\r\n"
    assert take_encoding(lines) == ([b"gzip", b"zstd"], headers + b"a: b\r\n")

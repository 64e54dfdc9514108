"""A head that a client repeats is compared, not read again; headers that few requests have are looked for once."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.access.deadlines import read_deadline
from moe_gateway.http.content_encoding import may_have_encoding
from moe_gateway.http.cors import OriginPolicy
from moe_gateway.http.heads import read_tenant
from moe_gateway.http.rare_headers import RareHeaders
from moe_gateway.http.whole_request import LONGEST_REMEMBERED_BYTES, HeadMemory, read_whole_request
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import BadBody
from moe_scheduling.request.fairness import ANONYMOUS_TENANT

from tests.gateway.messages import post, prompt

TENANT = b"x-tenant"
RARE = RareHeaders(TENANT)
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Request-Id: r\r\nX-Session-Id: s\r\nContent-Length: %b\r\n"
    b"A: b\r\n\r\n"
)

lines = st.lists(
    st.tuples(
        st.sampled_from(["accept", "x-session-id", "x-request-id", "Origin", "X-Tenant", "connection"]),
        st.sampled_from(["a", "b", "keep-alive", "close", "a b"]),
    ),
    max_size=3,
)
requests = st.builds(
    lambda fields, name, length, body, path: (
        b"POST %b HTTP/1.1\r\n%b%b%b\r\n\r\n%b"
        % (path, b"".join(b"%b: %b\r\n" % (a.encode(), b.encode()) for a, b in fields), name, length, body)
    ),
    lines,
    st.sampled_from([b"Content-Length: ", b"content-length: ", b"Content-length:", b"CONTENT-LENGTH:  "]),
    st.sampled_from([b"0", b"2", b"02", b"2 ", b"12", b"+2", b"", b"000000000000002", b"0000000000000002"]),
    st.sampled_from([b"", b"{}", b'{"a":"b"}\r\n\r\n', b"{}\r\nContent-Length: 2\r\n\r\n"]),
    st.sampled_from([b"/v1/completions", b"/v1/models"]),
)


@given(st.lists(requests, min_size=2, max_size=6))
def test_a_remembered_head_reads_as_one_that_is_read_anew(messages):
    memory = HeadMemory(RARE)
    for message in messages + messages:
        body, whole = memory.read(message), read_whole_request(message)
        if whole is None:
            assert body is None
        else:
            assert memory.last._replace(body=body) == whole
            assert memory.is_plain is not RARE.may_occur(whole.headers)


@pytest.mark.parametrize("body", [b"{}", b"x" * 100_000, b""])
def test_a_repeated_head_with_another_length_is_not_read_again(monkeypatch, body):
    memory = HeadMemory(RARE)
    assert memory.read(HEAD % b"3" + b"abc") == b"abc"
    first = memory.last
    monkeypatch.setattr("moe_gateway.http.whole_request.read_whole_request", None)
    assert memory.read(HEAD % b"%d" % len(body) + body) == body
    assert memory.last is first


def test_a_long_head_is_not_remembered():
    memory = HeadMemory(RARE)
    long = HEAD.replace(b"A: b", b"A: " + b"b" * LONGEST_REMEMBERED_BYTES) % b"2" + b"{}"
    for _ in range(2):
        assert memory.read(long) == b"{}"
    assert memory._before == b""


names = st.sampled_from(
    ["X-Request-Timeout", "content-encoding", "Content-Encoding", "Origin", "ORIGIN", "x-tenant", "X-TENANT", "accept"]
) | st.from_regex(r"[A-Za-z-]{1,20}", fullmatch=True)


@given(st.lists(st.tuples(names, st.sampled_from(["1", "gzip", "https://a.example", "x-tenant: y"])), max_size=4))
def test_where_no_rare_header_may_occur_none_is_found(rows):
    headers = b"".join(f"{name}: {value}\r\n".encode() for name, value in rows)
    if RARE.may_occur(headers):
        return
    request = ClientRequest(b"POST", b"/", headers, b"", b"", None, True, False, 0.0)
    try:
        read_deadline(request)
    except BadBody:
        pytest.fail("a deadline was found")
    assert request.deadline_s == math.inf
    assert not may_have_encoding(headers)
    assert OriginPolicy(["*"]).answer_lines(headers) == b""
    assert read_tenant(headers, TENANT) == ANONYMOUS_TENANT


async def test_a_rare_header_counts_on_each_request_of_a_connection_that_has_it(make_engine, serve):
    served = await serve(await make_engine(), cors={"allowed_origins": ["*"]})
    client = await served.connect()
    for extra in (
        b"",
        b"Origin: https://a.example\r\n",
        b"Origin: https://a.example\r\n",
        b"",
        b"origin: https://b\r\n",
    ):
        client.send(post(prompt(), extra=extra))
        answer = await client.answer()
        assert answer.status == 200
        assert (b"access-control-allow-origin" in answer.headers) is bool(extra)

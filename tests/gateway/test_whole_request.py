"""The fast reader reads the usual request as llhttp does, and leaves every other one to it."""

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.http.whole_request import LONGEST_HEAD_BYTES, read_whole_request

USUAL = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAccept: */*\r\nContent-Length: 2\r\nX-B: c d\r\n\r\n{}"
NAMES = [
    "accept",
    "x-a",
    "content-type",
    "authorization",
    "x-session-id",
    "x-session-affinity",
    "x-request-id",
    "connection",
    "host",
]
FRAMING = ["content-length", "transfer-encoding", "expect", "te", "trailer", "upgrade", "keep-alive"]


class Parsed:
    """What llhttp says of one message."""

    def __init__(self, data: bytes) -> None:
        self.url = self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = 0
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(data)
        self.method, self.keep_alive = parser.get_method(), parser.should_keep_alive()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete += 1


def test_a_usual_request_is_read_and_its_own_headers_go_on_as_they_came():
    assert read_whole_request(USUAL) == (b"/v1/completions", b"Accept: */*\r\nX-B: c d\r\n", b"{}", b"", None)


@pytest.mark.parametrize(
    ("lines", "session"),
    [
        (b"X-Session-Affinity: a\r\n", "a"),
        (b"X-Session-Affinity: a\r\nX-Session-ID: s\r\n", "s"),
        (b"x-session-id: s\r\nx-session-affinity: a\r\n", "s"),
    ],
)
def test_a_session_is_named_by_either_header_and_both_pass_on(lines, session):
    read = read_whole_request(b"POST /v1/completions HTTP/1.1\r\n%bcontent-length: 2\r\n\r\n{}" % lines)
    assert read.session == session
    assert sorted(read.headers.split(b"\r\n")) == sorted(lines.lower().split(b"\r\n"))


def test_id_and_session_are_read_and_a_rank_from_outside_is_dropped():
    special = b"X-Request-Id: r1\r\nX-Session-Id: s1\r\nX-Data-Parallel-Rank: 3\r\nConnection: Keep-Alive\r\n"
    request = USUAL.replace(b"Accept: */*\r\n", special)
    url, headers, body, request_id, session = read_whole_request(request)
    assert (url, body, request_id, session) == (b"/v1/completions", b"{}", b"r1", "s1")
    assert headers == b"X-B: c d\r\nx-session-id: s1\r\n"


def test_an_unusable_request_id_is_ignored():
    assert read_whole_request(USUAL.replace(b"X-B: c d", b"X-Request-Id: a b"))[3] == b""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"POST", b"GET"),
        (b"POST", b"post"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"/v1/completions", b"/v1/comp letions"),
        (b"/v1/completions", b"/v1/completions\xff"),
        (b"{}", b"{"),
        (b"{}", b"{}{}"),
        (b"{}", b"{}POST / HTTP/1.1\r\n\r\n"),
        (b"Content-Length: 2", b"X-A: 2"),
        (b"Content-Length: 2", b"Content-Length: 02x"),
        (b"Content-Length: 2", b"Content-Length: +2"),
        (b"Content-Length: 2", b"Content-Length: 2, 2"),
        (b"Content-Length: 2", b"Content-Length: 0000000000000002"),
        (b"Content-Length: 2", b"Content-Length : 2"),
        (b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 2"),
        (b"Content-Length: 2", b"Content-Length: 2\r\ncontent-length: 3"),
        (b"Content-Length: 2", b"Content-Length: 2\r\nTransfer-Encoding: chunked"),
        (b"Content-Length: 2", b"Content-Length:\r\n 2"),
        (b"Host: a", b"Host: a\r\nHost: b"),
        (b"Accept: */*", b"Accept: */*\r\n folded"),
        (b"Accept: */*", b"Accept: */*\nX: y"),
        (b"Accept: */*", b"Accept: */*\rX: y"),
        (b"Accept: */*", b"Accept: \0"),
        (b"Accept: */*", b": nameless"),
        (b"Accept: */*", b"no colon"),
        (b"Accept: */*", b"Expect: 100-continue"),
        (b"Accept: */*", b"Connection: close"),
        (b"Accept: */*", b"Connection: keep-alive, X-B"),
        (b"Accept: */*", b"Upgrade: h2c"),
        (b"Accept: */*", b"TE: trailers"),
        (b"Accept: */*", b"Proxy-Authorization: x"),
        (b"Accept: */*", b"X-A: " + b"a" * LONGEST_HEAD_BYTES),
    ],
)
def test_any_other_request_is_left_to_the_parser(old, new):
    assert USUAL.count(old) == 1
    assert read_whole_request(USUAL.replace(old, new)) is None


@given(
    fields=st.lists(
        st.tuples(
            st.sampled_from(NAMES + FRAMING) | st.from_regex(r"[A-Za-z-]{1,8}", fullmatch=True),
            st.sampled_from(["", " ", "\t"]),
            st.sampled_from(["keep-alive", "close", "chunked", "2", "3", "a", ""]) | st.text(max_size=8),
        ),
        max_size=6,
    ),
    line=st.sampled_from(["\r\n", "\r\n", "\n"]),
    body=st.sampled_from([b"{}", b"", b"{}\r\n"]),
)
def test_the_parser_reads_the_same_of_each_request_that_it_reads(fields, line, body):
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Content-Length: 2",
        *(f"{name}:{gap}{value}" for name, gap, value in fields),
    ]
    request = (line.join(lines) + line + line).encode("latin-1", "replace") + body
    usual = read_whole_request(request)
    if usual is None:
        return
    url, headers, read_body, _, _ = usual
    parsed = Parsed(request)
    assert (parsed.complete, parsed.method, parsed.keep_alive) == (1, b"POST", True)
    assert (parsed.url, parsed.body) == (url, read_body)
    forwarded = Parsed(b"POST / HTTP/1.1\r\n" + headers + b"\r\n").headers
    dropped = {b"host", b"content-length", b"connection", b"x-request-id", b"x-data-parallel-rank"}
    kept = [field for field in parsed.headers if field[0] not in dropped]
    assert sorted(forwarded) == sorted(kept)

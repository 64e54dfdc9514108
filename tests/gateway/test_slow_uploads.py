"""A body that keeps coming has time, however long it takes; one that stalls or drips has not."""

import pytest
from moe_contract.gateway_config import Limits
from moe_gateway.http.rare_headers import RareHeaders
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.request_reader import LEAST_BYTES_PER_S, RequestReader

from tests.gateway.messages import post, prompt

LIMITS = Limits(body_timeout_s=30.0)
BODY_BYTES = 400 * 1024


class Owner:
    """The connection as the reader sees it, with a clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.deadline_s = float("inf")
        self.reader = RequestReader(self, LIMITS, lambda: b"id", lambda: self.now_s, RareHeaders())

    def expect_within(self, seconds: float) -> None:
        self.deadline_s = self.now_s + seconds

    def expect_nothing(self) -> None:
        self.deadline_s = float("inf")


def upload(owner: Owner, piece_bytes: int, pause_s: float, *, chunked: bool = False) -> bool:
    """Sends a body in equal pieces; returns whether it was whole before a deadline passed."""
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % BODY_BYTES
    owner.reader.feed(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%b\r\n\r\n" % framing)
    for start in range(0, BODY_BYTES, piece_bytes):
        owner.now_s += pause_s
        if owner.now_s >= owner.deadline_s:
            return False
        piece = b"x" * min(piece_bytes, BODY_BYTES - start)
        owner.reader.feed(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    if chunked:
        owner.reader.feed(b"0\r\n\r\n")
    return len(owner.reader.requests) == 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("piece_bytes", "pause_s", "arrives"),
    [
        (4096, 1.0, True),
        (50 * 1024, 29.0, True),
        (LEAST_BYTES_PER_S, 1.0, True),
        (LEAST_BYTES_PER_S // 2, 1.0, False),
        (1, 1.0, False),
        (200 * 1024, 31.0, False),
    ],
)
def test_a_body_has_time_while_it_keeps_coming(piece_bytes, pause_s, arrives, chunked):
    owner = Owner()
    assert upload(owner, piece_bytes, pause_s, chunked=chunked) is arrives
    assert (owner.deadline_s == float("inf")) is arrives


def test_a_fast_beginning_allows_no_long_pause():
    owner = Owner()
    request = post(prompt("x" * 200_000))
    owner.reader.feed(request[:-1])
    assert owner.deadline_s == owner.now_s + LIMITS.body_timeout_s


def test_bytes_of_frames_alone_give_no_time():
    owner = Owner()
    owner.reader.feed(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    deadline_s = owner.deadline_s
    owner.now_s += 20.0
    owner.reader.feed(b"1;" + b"x" * 1000)
    assert owner.deadline_s == deadline_s


def test_a_body_that_is_too_large_gives_no_time():
    owner = Owner()
    owner.reader.feed(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
    deadline_s = owner.deadline_s
    owner.now_s += 20.0
    owner.reader.feed(b"x" * 1000)
    assert owner.deadline_s == deadline_s
    assert owner.reader.refusal is not None
    assert owner.reader.refusal[0] is RequestOutcome.BODY_TOO_LARGE

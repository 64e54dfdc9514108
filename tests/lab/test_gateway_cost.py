"""What a request costs in the gateway's own code, counted in calls: on any machine the same."""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
from moe_gateway.request import recent_requests
from moe_lab.gateway.engine import ANSWER, EVENT, STREAM_END, STREAM_HEAD
from moe_lab.gateway.load import build_request
from moe_lab.gateway_cost import OPENAI_LINES, SocketlessGateway

from tests.gateway.compiled import interpreted

PLAIN = build_request()
# Of Python functions and of functions in C alike. Raise it only for what every request needs.
MOST_CALLS = 274
MOST_CALLS_OF_AN_EVENT = 10


@pytest.fixture
def served(tmp_path, monkeypatch) -> SocketlessGateway:
    # Choices are explained every few milliseconds, which is more often for each request on a slow machine.
    monkeypatch.setattr(recent_requests, "TERMS_PERIOD_S", 1e9)
    return SocketlessGateway(tmp_path)


def count_calls(serve, *, times: int = 50) -> float:
    """Calls for one request, as the mean over some."""
    for _ in range(5):
        serve()
    calls: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        calls[event] += 1

    sys.setprofile(count)
    try:
        for _ in range(times):
            serve()
    finally:
        sys.setprofile(None)
    return (calls["call"] + calls["c_call"]) / times


def test_a_request_makes_few_calls(served):
    assert count_calls(lambda: served.serve(PLAIN, [ANSWER])) <= MOST_CALLS


@interpreted
def test_a_repeated_head_costs_the_same_however_many_headers_it_has(served):
    plain = count_calls(lambda: served.serve(PLAIN, [ANSWER]))
    many = PLAIN.replace(b"\r\n", b"\r\n" + OPENAI_LINES, 1)
    assert count_calls(lambda: served.serve(many, [ANSWER])) == pytest.approx(plain, abs=2)


def test_an_event_of_a_stream_makes_few_calls(served):
    stream = build_request(events=100)
    long, short = (
        count_calls(lambda events=events: served.serve(stream, [STREAM_HEAD, *[EVENT] * events, STREAM_END]), times=5)
        for events in (110, 10)
    )
    assert (long - short) / 100 <= MOST_CALLS_OF_AN_EVENT

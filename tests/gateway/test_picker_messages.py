"""The endpoint picker's messages without a proxy: in any order and any parts, and nothing stays in flight."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.documents import parse_model
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.input_errors import InvalidInput
from moe_gateway.endpoint_picker import proxy_messages, wire
from moe_gateway.endpoint_picker.admission import PickerParts
from moe_gateway.endpoint_picker.answer_head import read_answer_head
from moe_gateway.endpoint_picker.picked_request import NobodyReads, PickedRequest, endpoint_of
from moe_gateway.endpoint_picker.read_ahead import ReadAhead
from moe_gateway.endpoint_picker.request_head import body_length, find_removed, read_head
from moe_gateway.endpoint_picker.start import check_engines
from moe_gateway.endpoint_picker.wire import (
    HttpHeaders,
    Message,
    Metadata,
    ProcessingRequest,
)
from moe_gateway.http.replies import RequestOutcome, build_error
from moe_gateway.http.routes import Route
from moe_gateway.request.reading import NO_BODY
from moe_scheduling.engine.choice import Send, SendReason
from moe_scheduling.signals import Target

from tests.gateway.picker_messages import (
    ANSWER_TRAILERS,
    ENGINES,
    ONE_PIECE,
    QUESTION,
    STREAM,
    TRAILERS,
    answer_head,
    head,
    make_parts,
    parts_of,
    question_head,
    run,
    sent_back,
)


@given(cuts=st.lists(st.integers(0, 200)), answer_cuts=st.lists(st.integers(0, 200)), streams=st.booleans())
def test_in_both_directions_the_bodies_come_back_whole_in_whatever_parts_they_come(
    cuts: list[int], answer_cuts: list[int], streams: bool
) -> None:
    answer = STREAM if streams else ONE_PIECE
    parts = make_parts()
    messages = [
        question_head(wire.FULL_DUPLEX),
        *parts_of(QUESTION, cuts, of_answer=False),
        answer_head(kind="text/event-stream" if streams else "application/json"),
        *parts_of(answer, answer_cuts, of_answer=True),
    ]
    replies = asyncio.run(run(parts, messages))
    picked = replies[0]
    assert picked.WhichOneof("response") == "request_headers"
    endpoint = picked.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"]
    mutation = picked.request_headers.response.header_mutation
    assert endpoint in ENGINES
    assert {row.header.key: row.header.raw_value for row in mutation.set_headers} == {
        "x-gateway-destination-endpoint": endpoint.encode(),
        "x-request-id": b"made",
    }
    assert sent_back(replies, "request_body") == QUESTION
    assert sent_back(replies, "response_body") == answer
    last = replies[-1].response_body.response.body_mutation.streamed_response
    assert last.end_of_stream
    assert parts.context.stats.requests == {("completions", 200): 1}


async def answered(parts: PickerParts, *answer: Message) -> int:
    """Asks, and returns the errors that the engines have then."""
    await run(parts, [question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False), *answer])
    return sum(engine.errors for engine in parts.context.dispatcher.engines.values())


@pytest.mark.parametrize("cuts", [[], [9], [9, 40, 70]])
async def test_a_stream_that_the_proxy_has_compressed_is_no_error_of_the_engine(cuts: list[int]) -> None:
    parts = make_parts()
    body = parts_of(gzip.compress(STREAM), cuts, of_answer=True)
    assert await answered(parts, answer_head(content_encoding="gzip"), *body) == 0
    assert parts.context.stats.requests == {("completions", 200): 1}


@pytest.mark.parametrize(("code", "errors"), [(400, 0), (500, 1)])
@pytest.mark.parametrize("cuts", [[], [12], [12, 60]])
async def test_an_error_with_status_200_counts_by_its_code_in_whatever_parts_it_comes(
    cuts: list[int], code: int, errors: int
) -> None:
    parts = make_parts()
    error = json.dumps({"error": {"message": "no " * 20, "code": code}}).encode()
    assert await answered(parts, answer_head(kind="application/json"), *parts_of(error, cuts, of_answer=True)) == errors
    assert parts.context.stats.requests == {("completions", code): 1}


MESSAGES = st.lists(
    st.sampled_from(
        [
            question_head(wire.FULL_DUPLEX),
            question_head(wire.FULL_DUPLEX, end=True),
            question_head(wire.BUFFERED),
            question_head(wire.BUFFERED_PARTIAL),
            question_head(wire.STREAMED, answer_mode=wire.NONE),
            question_head(wire.NONE),
            question_head(None),
            ProcessingRequest(request_headers=HttpHeaders()),
            ProcessingRequest(request_headers=HttpHeaders(headers=head(method="GET"))),
            *parts_of(QUESTION, [9], of_answer=False),
            *parts_of(QUESTION, [], of_answer=False, end=False),
            TRAILERS,
            answer_head(),
            answer_head(500, "application/json"),
            answer_head(503, "text/plain"),
            answer_head(503, "application/json", end=True),
            answer_head(504, "text/plain"),
            *parts_of(STREAM, [30, 60], of_answer=True),
            *parts_of(b'{"error": {"message": "EngineCore encountered an issue"}}', [], of_answer=True),
            ANSWER_TRAILERS,
            ProcessingRequest(),
        ]
    ),
    max_size=12,
)


@given(messages=MESSAGES, ready=st.booleans())
def test_whatever_a_proxy_sends_nothing_stays_in_flight(messages: list[Message], ready: bool) -> None:
    parts = make_parts(ready=ready, hold_requests=0)
    asyncio.run(run(parts, messages))
    assert sum(parts.context.stats.requests.values()) == parts.context.stats.finished


async def test_a_held_request_whose_proxy_ends_the_stream_is_held_no_longer() -> None:
    parts = make_parts(ready=False)
    asked = [question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False)]
    assert await run(parts, asked) == []
    assert parts.context.stats.refusals == {"client_gone": 1}


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([question_head(wire.BUFFERED, answer_mode=0), answer_head()], 200),
        ([question_head(wire.BUFFERED, answer_mode=0), answer_head(500, "application/json")], 500),
    ],
)
async def test_an_answer_whose_body_is_not_shown_counts_by_its_status(messages: list[Message], status: int) -> None:
    parts = make_parts()
    await run(parts, [messages[0], *parts_of(QUESTION, [], of_answer=False), *messages[1:]])
    assert parts.context.stats.requests == {("completions", status): 1}


async def test_a_client_that_leaves_at_the_last_event_has_its_answer() -> None:
    parts = make_parts()
    asked = [question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False)]
    await run(parts, [*asked, answer_head(), *parts_of(STREAM, [], of_answer=True, end=False)])
    assert parts.context.stats.requests == {("completions", 200): 1}


async def test_trailers_follow_a_body_in_both_directions() -> None:
    parts = make_parts()
    body = parts_of(QUESTION, [5], of_answer=False, end=False)
    answer = parts_of(STREAM, [], of_answer=True, end=False)
    asked = [question_head(wire.FULL_DUPLEX), *body, TRAILERS, answer_head(), *answer, ANSWER_TRAILERS]
    replies = await run(parts, asked)
    kinds = [reply.WhichOneof("response") for reply in replies]
    assert kinds == [
        *("request_headers", "request_body", "request_trailers"),
        *("response_headers", "response_body", "response_trailers"),
    ]
    assert not replies[1].request_body.response.body_mutation.streamed_response.end_of_stream
    assert parts.context.stats.requests == {("completions", 200): 1}


@pytest.mark.parametrize(
    ("subset", "found"),
    [
        (None, None),
        ({}, None),
        ({"x-gateway-destination-endpoint-subset": []}, frozenset()),
        ({"x-gateway-destination-endpoint-subset": ["10.0.0.1:8000", " b "]}, frozenset({"10.0.0.1:8000", "b"})),
        ({"x-gateway-destination-endpoint-subset": "10.0.0.1:8000, b"}, frozenset({"10.0.0.1:8000", "b"})),
        ({"x-gateway-destination-endpoint-subset": 7}, frozenset()),
    ],
)
def test_the_endpoints_that_a_proxy_names(subset: dict[str, Any] | None, found: frozenset[str] | None) -> None:
    metadata = Metadata()
    if subset is not None:
        metadata.filter_metadata["envoy.lb.subset_hint"].update(subset)
    assert proxy_messages.read_subset(metadata) == found


def test_the_endpoint_that_has_answered_is_read_as_the_protocol_has_it_and_as_envoy_says_it() -> None:
    message = ProcessingRequest()
    assert read_answer_head(message).served == ""
    message.attributes["envoy.filters.http.ext_proc"].update({"upstream.address": "10.0.0.1:1"})
    assert read_answer_head(message).served == "10.0.0.1:1"
    served = {"x-gateway-destination-endpoint-served": "10.0.0.2:2"}
    message.metadata_context.filter_metadata["envoy.lb"].update(served)
    assert read_answer_head(message).served == "10.0.0.2:2"


def test_an_answer_at_once_is_the_gateways_own_error() -> None:
    error = build_error(RequestOutcome.BUSY, "later", request_id=b"r", retry_after_s=7, close=True)
    answer = proxy_messages.answer_at_once(error).immediate_response
    assert answer.status.code == 429
    assert {row.header.key: row.header.raw_value for row in answer.headers.set_headers} == {
        "content-type": b"application/json",
        "retry-after": b"7",
        "x-request-id": b"r",
    }
    assert json.loads(answer.body)["error"]["code"] == "busy"


def test_the_head_of_a_request() -> None:
    headers = [
        (":method", b"POST"),
        (":path", b"/v1/completions"),
        ("x-session-affinity", b"second"),
        ("x-session-id", b"first"),
        ("content-length", b"12"),
        ("x-request-id", b"bad id"),
        ("x-data-parallel-rank", b"7"),
        ("authorization", b"Bearer k"),
        ("accept", b"*/*"),
    ]
    request = read_head(headers, b"made", 3.0)
    assert (request.method, request.url, request.session) == (b"POST", b"/v1/completions", "first")
    assert (request.request_id, request.arrived_s, body_length(headers)) == (b"made", 3.0, 12)
    assert b"rank" not in request.headers
    left = request.headers.replace(b"authorization: Bearer k\r\n", b"")
    assert find_removed(headers, left, {"x-request-id"}) == {"authorization", "x-data-parallel-rank"}
    assert find_removed(headers, left, {"x-data-parallel-rank"}) == {"authorization"}


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://10.0.0.1", "10.0.0.1:80"),
        ("http://[FD00::1]:8000", "[fd00::1]:8000"),
        ("http://[fd00::1]", "[fd00::1]:80"),
    ],
)
def test_the_endpoint_of_an_engine(url: str, endpoint: str) -> None:
    assert endpoint_of(EngineAddress(name="e", url=url)) == endpoint


def test_an_engine_by_name_is_refused_for_proxies_take_addresses() -> None:
    document = {"listen": None, "admin": {"port": 1}, "engines": [{"name": "e", "url": "http://engine.example:8000"}]}
    with pytest.raises(InvalidInput, match=r"engines\[0\].url: proxies of the endpoint picker take IP addresses"):
        check_engines(parse_model(GatewayConfig, document))


async def test_messages_that_are_read_ahead_are_not_lost() -> None:
    goes_on = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        yield 2
        await goes_on.wait()

    messages = ReadAhead(source())
    assert await messages.take() == 1
    waiting: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(waiting.set_result, "done")
    assert await messages.unless_ended(waiting) == "done"
    assert await messages.take() == 2
    never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    goes_on.set()
    assert await messages.unless_ended(never) is None
    assert never.cancelled()
    assert await messages.take() is None


@pytest.mark.parametrize(
    ("ranks", "rank", "named"), [((4, 1), 3, 1), ((4, 1), 0, 2), ((4, 4), 3, 2), ((1, 1), 0, 2), ((1, 4), 0, 2)]
)
async def test_behind_an_engine_with_ranks_only_engines_that_have_the_picked_rank_are_named(
    ranks: tuple[int, int], rank: int, named: int
) -> None:
    parts = make_parts(ranks=ranks)
    request = read_head([(":method", b"POST"), (":path", b"/v1/completions")], b"made", 1.0)
    picked = PickedRequest(request, Route.COMPLETIONS, NO_BODY, NobodyReads(), parts.context, None)
    pick = picked.describe(Send(Target(ENGINES[0], rank), 0.0, SendReason.LEAST_PREDICTED), 1)
    assert pick is not None
    assert pick.rank == (rank if ranks[0] > 1 else None)
    assert pick.endpoints == ENGINES[:named]
    picked.end(200)

"""What a proxy's own errors and its choice of an engine say of the engines: no more than the proxy itself says."""

import asyncio
from typing import Any

import pytest
from moe_gateway.endpoint_picker import wire
from moe_gateway.endpoint_picker.answer_head import AnswerHead, ProxyFault, find_fault, read_answer_head
from moe_gateway.endpoint_picker.wire import HeaderValue, HttpHeaders, Message, ProcessingRequest

from tests.gateway.fronted import Front, two, until
from tests.gateway.messages import SSE_END, SSE_HEAD, Received, event, prompt
from tests.gateway.peers import PeerServer
from tests.gateway.picker_messages import (
    ENGINES,
    ONE_PIECE,
    QUESTION,
    answer_head,
    make_parts,
    parts_of,
    question_head,
    run,
)

REFUSED = "upstream_reset_before_response_started{remote_connection_failure|delayed_connect_error:_Connection_refused}"
OVERFLOW = "upstream_reset_before_response_started{overflow}"
CUT = "upstream_reset_before_response_started{connection_termination}"


@pytest.mark.parametrize("attributes", [True, False])
async def test_an_engine_that_dies_is_avoided(front: Front, make_engine: Any, attributes: bool) -> None:
    gone, works = await two(make_engine)
    fronted = await front(gone, works, envoy={"attributes": attributes})
    # Its agent still says that it takes requests.
    await PeerServer.stop(gone)
    statuses = [(await fronted.ask(prompt(f"question {number}")))[0] for number in range(12)]
    # The first meets it, and trials of whether it is back do, ever more rarely.
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 6
    assert fronted.gateway.dispatcher.ejections[gone.name] == statuses.count(503)
    await fronted.settled()


async def test_a_proxy_that_retries_goes_down_the_list_and_a_request_counts_where_it_was_answered(
    front: Front, make_engine: Any
) -> None:
    gone, works = await two(make_engine)
    ports = (gone.port, works.port)
    fronted = await front(gone, works, picker={"fallbacks": 1}, envoy={"endpoints": ports})
    # Its agent still says that it takes requests.
    await PeerServer.stop(gone)
    works.agent.say_rank(waiting=9, waiting_prefill_tokens=90_000, step=2)
    state = fronted.served.target_state(works.name)
    await until(lambda: state.signal is not None and state.signal.waiting_prefill_tokens == 90_000, "the signal")
    assert (await fronted.ask(prompt()))[0] == 200
    assert works.requests[-1].headers[b"x-gateway-destination-endpoint"] == b"127.0.0.1:%d,127.0.0.1:%d" % ports
    assert fronted.gateway.stats.retried == 1
    dispatcher = fronted.gateway.dispatcher
    assert dispatcher.engines[gone.name].errors == 1
    # Some such requests eject it.
    for number in range(12):
        assert (await fronted.ask(prompt(f"question {number}")))[0] == 200
    assert dispatcher.ejections[gone.name] >= 1
    assert dispatcher.ejections[works.name] == 0
    await fronted.settled()


@pytest.mark.parametrize("attributes", [True, False])
async def test_a_limit_of_the_proxy_ejects_no_engine(front: Front, make_engine: Any, attributes: bool) -> None:
    goes_on = asyncio.Event()

    async def slowly(_request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE_HEAD + event("one"))
        await goes_on.wait()
        writer.write(SSE_END)

    fronted = await front(await make_engine(slowly), envoy={"limited": True, "attributes": attributes})
    async with fronted.session.post(fronted.envoy.url + "/v1/completions", json=prompt(stream=True)) as answer:
        await answer.content.readuntil(b"\n\n")
        others = [asyncio.ensure_future(fronted.ask(prompt(f"question {number}"))) for number in range(6)]
        await until(lambda: any(asking.done() for asking in others), "a refusal")
        goes_on.set()
        await answer.read()
    assert 503 in [status for status, _ in await asyncio.gather(*others)]
    assert fronted.gateway.dispatcher.ejections == {}
    assert fronted.gateway.dispatcher.accepting
    await fronted.settled()


async def test_a_proxy_that_does_not_know_the_picked_engine_yet_says_nothing_of_it(
    front: Front, make_engine: Any
) -> None:
    unknown, known = await two(make_engine)
    fronted = await front(unknown, known, envoy={"endpoints": (known.port,)})
    for number in range(12):
        assert (await fronted.ask(prompt(f"question {number}")))[0] == 200
    assert fronted.got() == [0, 12]
    assert fronted.gateway.dispatcher.ejections == {}
    assert fronted.gateway.stats.retried == 0
    await fronted.settled()


def with_words(message: Message, **attributes: str | int) -> Message:
    """The message with attributes; a line stands for the dot."""
    copied = ProcessingRequest()
    copied.CopyFrom(message)
    copied.attributes["envoy.filters.http.ext_proc"].update(
        {name.replace("__", "."): value for name, value in attributes.items()}
    )
    return copied


def own_error(status: int = 503, *, text: bytes = b"", details: str = "", overloaded: bool = False) -> list[Message]:
    """An answer that a proxy has written itself."""
    head = answer_head(status, "text/plain")
    if overloaded:
        head.response_headers.headers.headers.append(HeaderValue(key="x-envoy-overloaded", raw_value=b"true"))
    return [with_words(head, response__code_details=details), *parts_of(text, [], of_answer=True)]


@pytest.mark.parametrize(
    ("answer", "ejections", "errors"),
    [
        (own_error(details=REFUSED), 1, 0),
        (own_error(502, details=REFUSED), 1, 0),
        (own_error(text=b"reset reason: remote connection failure"), 1, 0),
        (own_error(text=b"reset reason: connection timeout"), 1, 0),
        (own_error(details=OVERFLOW, overloaded=True), 0, 0),
        (own_error(text=b"reset reason: remote connection failure", overloaded=True), 0, 0),
        (own_error(text=b"reset reason: overflow"), 0, 0),
        (own_error(details="no_healthy_upstream"), 0, 0),
        (own_error(text=b"no healthy upstream"), 0, 0),
        (own_error(details=CUT), 0, 1),
        (own_error(504, details="response_timeout"), 0, 0),
        (own_error(), 0, 0),
    ],
)
@pytest.mark.parametrize("mode", [wire.FULL_DUPLEX, wire.BUFFERED])
async def test_a_proxys_own_error_ejects_an_engine_only_where_it_says_that_there_was_no_connection(
    answer: list[Message], ejections: int, errors: int, mode: int
) -> None:
    parts = make_parts()
    await run(parts, [question_head(mode), *parts_of(QUESTION, [], of_answer=False), *answer])
    dispatcher = parts.context.dispatcher
    assert sum(dispatcher.ejections.values()) == ejections
    assert sum(engine.errors for engine in dispatcher.engines.values()) == errors
    assert sum(parts.context.stats.requests.values()) == 1
    assert all(status >= 502 for _, status in parts.context.stats.requests)


async def test_requests_that_were_sent_before_an_ejection_do_not_prolong_it() -> None:
    parts = make_parts()
    # The proxy says for each that the first engine refused it, whichever was picked.
    refused = own_error(details=REFUSED)
    refused[0].attributes["envoy.filters.http.ext_proc"].update({"upstream.address": ENGINES[0]})
    for _ in range(5):
        await run(parts, [question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False), *refused])
    assert parts.context.dispatcher.ejections == {ENGINES[0]: 1}


@pytest.mark.parametrize(("attempts", "errors"), [(None, 0), (1, 0), (2, 1)])
async def test_the_picked_engine_has_an_error_only_where_the_proxy_has_tried_it(
    attempts: int | None, errors: int
) -> None:
    parts = make_parts()
    dispatcher = parts.context.dispatcher
    asked = [question_head(wire.FULL_DUPLEX), *parts_of(QUESTION, [], of_answer=False)]
    said = {} if attempts is None else {"upstream__request_attempt_count": attempts}
    dispatcher.set_ready(ENGINES[1], False, 0.0)
    served = with_words(answer_head(kind="application/json"), upstream__address=ENGINES[1], **said)
    await run(parts, [*asked, served, *parts_of(ONE_PIECE, [], of_answer=True)])
    assert sum(row.errors for row in dispatcher.engines.values()) == errors
    assert dispatcher.ejections == {}
    assert parts.context.stats.retried == errors


def test_the_head_of_an_answer() -> None:
    message = ProcessingRequest(response_headers=HttpHeaders())
    assert read_answer_head(message) == AnswerHead(status=0)
    message = with_words(answer_head(503, "text/plain"), response__code_details=CUT, upstream__request_attempt_count=3)
    head = read_answer_head(message)
    assert (head.status, head.attempts, head.fault, head.is_proxys_own) == (503, 3, ProxyFault.CUT_OFF, True)
    assert not AnswerHead(status=503, details="via_upstream").is_proxys_own
    assert not AnswerHead(status=503, content_type=b"application/json").is_proxys_own
    assert not AnswerHead(status=500, content_type=b"text/plain").is_proxys_own
    assert find_fault(b"") is ProxyFault.NOT_SAID

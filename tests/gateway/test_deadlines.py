"""`X-Request-Timeout`: a request whose answer comes too late costs nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.access.deadlines import read_deadline
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import BadBody
from moe_scheduling.engine.attempts import RequestAttempts

from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import answer_ok, never
from tests.gateway.waiting import until


def late(seconds: bytes, **fields) -> bytes:
    return post(prompt(**fields), extra=b"X-Request-Timeout: %b\r\n" % seconds)


def assert_late(answer) -> None:
    assert answer.status == 504
    assert answer.json["error"]["code"] == "deadline_exceeded"
    assert answer.json["error"]["message"] == "X-Request-Timeout passed before the answer began"


async def test_a_held_request_is_ended_at_its_deadline_and_never_sent(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    engine.agent.say(accepting=False)
    await served.takes()
    client = await served.connect()
    client.send(late(b"0.05"))
    assert_late(await client.answer())
    assert served.gateway.dispatcher.held == 0
    engine.agent.say(accepting=True)
    await served.takes(engine)
    client.send(post(prompt()))
    assert (await client.answer()).status == 200
    assert len(engine.requests) == 1


async def test_a_request_that_waits_at_an_engine_is_aborted_there(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine)
    assert_late(await served.ask(late(b"0.2")))
    await until(engine.requests[0].gone.is_set, "the abort at the engine")
    assert served.in_flight == 0


async def test_a_request_without_any_time_is_not_sent(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    assert_late(await served.ask(late(b"0")))
    assert engine.requests == []


async def test_a_request_that_is_late_is_not_tried_again(make_engine, serve):
    async def fail_late(_request, writer):
        await until(lambda: clock["now"] is not None)
        writer.close()

    clock = {"now": None}
    engines = [await make_engine(fail_late) for _ in range(2)]
    served = await serve(*engines)
    client = await served.connect()
    client.send(late(b"1000"))
    await until(lambda: sum(len(engine.requests) for engine in engines) == 1, "the first attempt")
    (connection,) = served.gateway._connections
    connection._exchange.attempts.deadline_s = 0.0
    clock["now"] = 1
    assert_late(await client.answer())
    assert sum(len(engine.requests) for engine in engines) == 1


async def test_a_stream_that_has_begun_goes_on(make_engine, serve):
    ends = {"now": False}

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await until(lambda: ends["now"])
        writer.write(event("b") + SSE_END)

    engine = await make_engine(stream)
    served = await serve(engine)
    client = await served.connect()
    client.send(late(b"1000", stream=True))
    await until(
        lambda: any(row._exchange.attempts.is_answering for row in served.gateway._connections if row._exchange)
    )
    (connection,) = served.gateway._connections
    connection._exchange.attempts.deadline_s = 0.0
    assert not connection._exchange.attempts.is_late(math.inf)
    ends["now"] = True
    assert b'"b"' in (await client.answer()).body


async def test_in_time_nothing_changes(make_engine, serve):
    engine = await make_engine(answer_ok)
    served = await serve(engine)
    assert (await served.ask(late(b"30"))).status == 200


@pytest.mark.parametrize(
    ("value", "seconds"), [(b".5", 0.5), (b"0.5", 0.5), (b"2.", 2.0), (b" 7\t", 7.0), (b"007", 7.0)]
)
def test_a_number_of_seconds_is_read_however_it_is_spelt(value, seconds):
    request = request_of(b"X-Request-Timeout:%b\r\n" % value)
    read_deadline(request)
    assert request.deadline_s == 100.0 + seconds


@pytest.mark.parametrize("value", [b"", b".", b"soon", b"-1", b"1e3", b"nan", b"inf", b"1,5", b"1 s", b"9" * 20])
async def test_what_is_no_number_of_seconds_is_refused(make_engine, serve, value):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(late(value))
    assert answer.status == 400
    assert answer.json["error"]["message"].startswith("X-Request-Timeout: a number of seconds is needed, got ")
    assert engine.requests == []


def request_of(headers: bytes) -> ClientRequest:
    return ClientRequest(b"POST", b"/", headers, b"", b"", None, True, False, 100.0)


names = st.from_regex(r"[0-9A-Za-z-]{1,20}", fullmatch=True).filter(lambda name: name.lower() != "x-request-timeout")
texts = st.text("abc x-request-timeout:59", max_size=30)


@given(st.lists(st.tuples(names, texts), max_size=4), st.integers(0, 10**6), st.integers(0, 4))
def test_only_the_header_of_that_name_is_read(rows, milliseconds, place):
    lines = [f"{name}: {text}\r\n".encode() for name, text in rows]
    request = request_of(b"".join(lines))
    read_deadline(request)
    assert request.deadline_s == math.inf
    line = b"x-Request-Timeout:%g\r\n" % (milliseconds / 1000) if milliseconds < 10**5 else b"X-REQUEST-TIMEOUT: 7\r\n"
    request = request_of(b"".join([*lines[:place], line, *lines[place:]]))
    read_deadline(request)
    assert request.deadline_s == pytest.approx(100 + (milliseconds / 1000 if milliseconds < 10**5 else 7), abs=0.01)


def test_a_folded_value_is_refused():
    with pytest.raises(BadBody):
        read_deadline(request_of(b"x-request-timeout: 1\r\nx-request-timeout2: 2\r\n".replace(b": 1", b": 1;q")))


def test_an_answer_that_has_begun_is_never_late():
    attempts = RequestAttempts(10.0, 0.0, 5.0)
    assert [attempts.is_late(now_s) for now_s in (4.9, 5.0, 6.0)] == [False, True, True]
    attempts.is_answering = True
    assert not attempts.is_late(6.0)

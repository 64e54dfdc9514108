"""The sparse stream of states: what is sent when, and how a reader takes it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st
from moe_contract import state_stream
from moe_contract.clients import PeerError, Refused, Unreachable, Unreadable
from moe_contract.input_errors import InvalidInput
from moe_contract.state_stream import (
    HEARTBEAT,
    LONGEST_LINE_BYTES,
    NDJSON,
    NotStreamed,
    Silent,
    SparseStream,
    parse_interval,
    read_states,
    stream_headers,
)

INTERVAL_S, HEARTBEAT_S = 15.0, 10.0


@pytest.mark.parametrize(
    ("steps", "sent"),
    [
        pytest.param([(0, "a", 1)], [b"a1"], id="the first state at once"),
        pytest.param([(0, "a", 1), (0.1, "b", 1)], [b"a1", b"b1"], id="what is notable at once"),
        pytest.param([(0, "a", 1), (0.1, "a", 2), (14.9, "a", 3)], [b"a1", b"", HEARTBEAT], id="numbers wait"),
        pytest.param([(0, "a", 1), (15, "a", 2), (16, "a", 3)], [b"a1", b"a2", b""], id="numbers each interval"),
        pytest.param([(0, "a", 1), (9.9, "a", 1), (10, "a", 1), (19, "a", 1)], [b"a1", b"", b"\n", b""], id="alive"),
        pytest.param(
            [(0, "a", 1), (1, "b", 2), (15.5, "b", 3)], [b"a1", b"b2", HEARTBEAT], id="from the last state on"
        ),
    ],
)
def test_changes_at_once_numbers_now_and_then(steps: list[tuple[float, str, int]], sent: list[bytes]) -> None:
    stream = SparseStream(INTERVAL_S, HEARTBEAT_S)
    lines = [
        stream.next_line(at, notable, lambda numbers=numbers: numbers, f"{notable}{numbers}".encode)
        for at, notable, numbers in steps
    ]
    assert lines == sent


def test_numbers_are_read_only_once_the_interval_has_passed_or_a_state_is_sent() -> None:
    read = []

    def numbers() -> int:
        read.append(now_s)
        return 0

    stream = SparseStream(INTERVAL_S, HEARTBEAT_S)
    for now_s in range(18):
        stream.next_line(float(now_s), now_s >= 2, numbers, lambda: b"state\n")
    assert read == [0, 2, 17]


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.sampled_from("ab"), st.integers(0, 2)), min_size=1, max_size=60))
def test_no_change_is_lost_and_no_silence_is_long(steps: list[tuple[float, str, int]]) -> None:
    stream = SparseStream(INTERVAL_S, HEARTBEAT_S)
    now_s, line_s, sent_s, sent = 0.0, 0.0, float("-inf"), ("", -1)
    for pause_s, notable, numbers in steps:
        now_s += pause_s
        line = stream.next_line(now_s, notable, lambda numbers=numbers: numbers, lambda: b"state\n")
        if line == b"state\n":
            assert notable != sent[0] or (numbers != sent[1] and now_s - sent_s >= INTERVAL_S)
            sent, sent_s = (notable, numbers), now_s
        assert sent[0] == notable
        assert sent[1] == numbers or now_s - sent_s < INTERVAL_S
        line_s = now_s if line else line_s
        assert now_s - line_s < HEARTBEAT_S


@pytest.mark.parametrize(("text", "seconds"), [("15", 15.0), ("0.5", 0.5), (None, None)])
def test_an_interval_is_a_number_of_seconds(text: str | None, seconds: float | None) -> None:
    assert parse_interval({} if text is None else {"interval": text}) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon"])
def test_another_interval_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(InvalidInput, match="interval: a number of seconds above 0 is needed"):
        parse_interval({"interval": text})


@asynccontextmanager
async def answering(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    app = web.Application()
    app.router.add_get("/v1/state", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield session, str(server.make_url("")).rstrip("/")


async def streamed(request: web.Request, *pieces: bytes) -> web.StreamResponse:
    stream = web.StreamResponse(headers=stream_headers(15.0))
    await stream.prepare(request)
    for piece in pieces:
        await stream.write(piece)
    return stream


async def read_all(session: aiohttp.ClientSession, url: str, silence_s: float = 10.0) -> list[bytes]:
    async with aclosing(read_states(session, url, 15.0, silence_s)) as states:
        return [state async for state in states]


async def test_a_reader_asks_for_its_interval_and_gets_states_and_heartbeats() -> None:
    asked = {}

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.update(request.query)
        return await streamed(request, b'{"phase', b'":"ready"}\n', HEARTBEAT, b"\n\n")

    async with answering(answer) as (session, url):
        lines = await read_all(session, url)
        assert [line for line in lines if line] == [b'{"phase":"ready"}']
    assert asked == {"watch": "1", "interval": "15"}


@pytest.mark.parametrize("piece", [HEARTBEAT, b"\n\n"])
async def test_a_heartbeat_is_an_empty_line(piece: bytes) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await streamed(request, piece)

    async with answering(answer) as (session, url):
        assert await read_all(session, url) == [b""]


async def test_of_states_that_come_together_the_newest_is_given() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await streamed(request, b"1\n2\n\n3\n")

    async with answering(answer) as (session, url):
        assert await read_all(session, url) == [b"3"]


async def test_a_peer_of_an_older_version_says_its_state_once() -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"held": 0})

    async with answering(answer) as (session, url):
        with pytest.raises(NotStreamed) as raised:
            await read_all(session, url)
    assert raised.value.state == b'{"held": 0}'


@pytest.mark.parametrize("pieces", [[b"1\n2\n"], [b"\n", b"1", b"\n", b"2\n"]], ids=str)
async def test_of_an_older_agent_that_streams_each_change_the_first_state_is_taken_and_no_more(
    pieces: list[bytes],
) -> None:
    left = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": NDJSON})
        await stream.prepare(request)
        try:
            for piece in pieces:
                await stream.write(piece)
                await asyncio.sleep(0.01)
            while True:
                await stream.write(b"3\n")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with answering(answer) as (session, url), asyncio.timeout(20.0):
        with pytest.raises(NotStreamed) as raised:
            await read_all(session, url)
        await left.wait()
    assert raised.value.state == b"1"


@pytest.mark.parametrize("head", [(503, "text/plain"), (200, "application/json"), (200, NDJSON)], ids=str)
@pytest.mark.parametrize(("piece", "limit_s"), [(b"x" * 1_000_000, 60.0), (b"x", 0.2)], ids=["large", "slow"])
async def test_an_answer_without_an_end_is_left(
    head: tuple[int, str], piece: bytes, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_stream, "READ_TIMEOUT_S", limit_s)
    status, content_type = head

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(status=status, headers={"Content-Type": content_type})
        await stream.prepare(request)
        with suppress(ConnectionError):
            while True:
                await stream.write(piece)
                await asyncio.sleep(0.01)
        return stream

    async with answering(answer) as (session, url), asyncio.timeout(30.0):
        with pytest.raises(Unreadable, match="answer"):
            await read_all(session, url)


async def test_a_refusal_a_line_without_an_end_and_silence_are_errors_of_the_peer() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async def flood(request: web.Request) -> web.StreamResponse:
        return await streamed(request, b"x" * (LONGEST_LINE_BYTES + 1))

    async def fall_silent(request: web.Request) -> web.StreamResponse:
        stream = await streamed(request, b"1\n")
        await asyncio.Event().wait()
        return stream

    expected: list[tuple[Callable[[web.Request], Awaitable[web.StreamResponse]], type[PeerError], str]] = [
        (refuse, Refused, "refused"),
        (flood, Unreadable, "without an end"),
        (fall_silent, Silent, "sent nothing within 0.2 s"),
    ]
    for answer, error, text in expected:
        async with answering(answer) as (session, url):
            with pytest.raises(error, match=text):
                await read_all(session, url, silence_s=0.2)


async def test_a_stranger_leads_on_to_no_other_peer() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if "right" in request.query:
            return await streamed(request, b"1\n")
        raise web.HTTPFound("/v1/state?right=1")

    async with answering(answer) as (session, url):
        with pytest.raises(Refused):
            await read_all(session, url)


async def test_a_peer_that_is_not_there_cannot_be_reached() -> None:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(Unreachable, match="cannot be reached"):
            await read_all(session, "http://127.0.0.1:1")

"""The load on a router: keep-alive connections that ask, read the whole answer, check it, and ask again.

Runs in the process of the benchmark, on uvloop; its work is not counted as a router's.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httptools
import orjson

from moe_lab.gateway.engine import ANSWER, MODEL

# Requests to one port before the next has its turn: long enough to be at work, short against any noise.
TURN_REQUESTS = 20
_QUESTION = (
    "You are asked what a token is. Answer in one sentence, in plain words, as if to a reader who knows what a word is "
    "but has never heard of a tokenizer."
)
_ANSWER_BODY = ANSWER[ANSWER.index(b"\r\n\r\n") + 4 :]
_EVENT_MARK = b"data: "
_LAST_EVENT = b"data: [DONE]\n\n"


class WrongAnswer(RuntimeError):
    """A router's answer is not what the engine wrote."""


def build_request(*, events: int | None = None) -> bytes:
    """A chat request: for a small JSON answer, or for a stream of `events` events."""
    document: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": _QUESTION}]}
    document |= {"max_tokens": 16, "temperature": 0} if events is None else {"max_tokens": events, "stream": True}
    return frame_request(orjson.dumps(document))


def frame_request(body: bytes) -> bytes:
    """A chat request with this body."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: bench\r\naccept: */*\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Asker(asyncio.Protocol):
    """One connection. `on_answer(asker)` is called at the end of each answer and may ask again."""

    def __init__(self, on_answer: Callable[["Asker"], None], on_failure: Callable[[Exception], None]) -> None:
        self._on_answer = on_answer
        self._on_failure = on_failure
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._asked_s = 0.0
        self.took_s = 0.0
        self.status = 0
        self.body = b""

    def ask(self, request: bytes) -> None:
        """Sends a request; there is at most one at a time."""
        assert self._transport is not None
        self._asked_s = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        """Closes the connection; no further request is sent."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._on_failure(WrongAnswer(f"the router closed a connection: {exc or 'no reason'}"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._on_failure(WrongAnswer(f"the router's answer is not HTTP: {error}"))

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self.took_s = time.perf_counter() - self._asked_s
        self.status = self._parser.get_status_code()
        self.body = b"".join(self._pieces)
        self._pieces.clear()
        self._on_answer(self)


@dataclass(slots=True)
class Answers:
    """What one run of the load saw."""

    count: int = 0
    took_s: list[float] = field(default_factory=list)


async def ask_repeatedly(
    port: int, *, connections: int, seconds: float, request: bytes | None = None, rate: float | None = None
) -> Answers:
    """Asks for small answers, one after the other on each connection, for so long; `request` is another one to ask.

    Args:
        port: of the router.
        connections: open at a time.
        seconds: length of the load.
        request: another one to ask.
        rate: requests/s of all connections together, as far as the answers come in time; None: as many as can be.

    Raises:
        WrongAnswer: an answer is not the engine's.
    """
    loop, began_s = asyncio.get_running_loop(), time.perf_counter()
    request, answers, until_s = request or build_request(), Answers(), began_s + seconds
    done: asyncio.Future[None] = loop.create_future()
    left, due_s = connections, began_s + 1.0 / (rate or math.inf)

    def on_answer(asker: Asker) -> None:
        nonlocal left, due_s
        if not _is_right(asker, done):
            return
        answers.count += 1
        answers.took_s.append(asker.took_s)
        now_s = time.perf_counter()
        if now_s < until_s and rate is None:
            asker.ask(request)
        elif rate is not None and max(now_s, due_s) < until_s:
            # The next free place of the schedule.
            loop.call_later(max(0.0, due_s - now_s), asker.ask, request)
            due_s += 1.0 / rate
        else:
            left -= 1
            if not left and not done.done():
                done.set_result(None)

    await _run(port, connections, on_answer, request, done, seconds)
    return answers


async def ask_in_turns(ports: Sequence[int], *, seconds: float) -> list[Answers]:
    """Asks each port over one connection, a few requests at a time in turn, so that no noise falls on one alone.

    Raises:
        WrongAnswer: an answer is not the engine's.
    """
    request, answers, until_s = build_request(), [Answers() for _ in ports], time.perf_counter() + seconds
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asked = 0

    def on_answer(asker: Asker) -> None:
        nonlocal asked
        if not _is_right(asker, done):
            return
        at = asked // TURN_REQUESTS % len(ports)
        answers[at].count += 1
        answers[at].took_s.append(asker.took_s)
        asked += 1
        if time.perf_counter() < until_s or asked < TURN_REQUESTS * len(ports):
            askers[asked // TURN_REQUESTS % len(ports)].ask(request)
        elif not done.done():
            done.set_result(None)

    askers = [await _connect(port, on_answer, done) for port in ports]
    askers[0].ask(request)
    await _wait(done, askers, seconds)
    return answers


async def stream_at_once(port: int, *, streams: int, events: int, seconds: float) -> Answers:
    """Asks for `streams` streams of `events` events each, all at once; `count` is that of the events that came back.

    Raises:
        WrongAnswer: a stream is not the engine's, whole.
    """
    answers = Answers()
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = streams

    def on_answer(asker: Asker) -> None:
        nonlocal left
        seen = asker.body.count(_EVENT_MARK) - 1
        if asker.status != 200 or seen != events or not asker.body.endswith(_LAST_EVENT):
            _fail(done, WrongAnswer(f"status {asker.status}, {seen} of {events} events: {asker.body[-200:]!r}"))
            return
        answers.count += seen
        answers.took_s.append(asker.took_s)
        left -= 1
        if not left and not done.done():
            done.set_result(None)

    await _run(port, streams, on_answer, build_request(events=events), done, seconds)
    return answers


async def _run(
    port: int,
    connections: int,
    on_answer: Callable[[Asker], None],
    request: bytes,
    done: "asyncio.Future[None]",
    seconds: float,
) -> None:
    askers = [await _connect(port, on_answer, done) for _ in range(connections)]
    for asker in askers:
        asker.ask(request)
    await _wait(done, askers, seconds)


async def _connect(port: int, on_answer: Callable[[Asker], None], done: "asyncio.Future[None]") -> Asker:
    loop = asyncio.get_running_loop()
    make = lambda: Asker(on_answer, lambda error: _fail(done, error))  # noqa: E731 - a factory
    return (await loop.create_connection(make, "127.0.0.1", port))[1]


async def _wait(done: "asyncio.Future[None]", askers: Sequence[Asker], seconds: float) -> None:
    try:
        # A run that is many times too long hangs.
        await asyncio.wait_for(done, 10 * seconds + 30)
    finally:
        for asker in askers:
            asker.close()


def _is_right(asker: Asker, done: "asyncio.Future[None]") -> bool:
    right = asker.status == 200 and asker.body == _ANSWER_BODY
    if not right:
        _fail(done, WrongAnswer(f"status {asker.status}: {asker.body[:200]!r}"))
    return right


def _fail(done: "asyncio.Future[None]", error: Exception) -> None:
    if not done.done():
        done.set_exception(error)

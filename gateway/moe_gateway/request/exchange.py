"""One request from its whole arrival to the end of its answer: choose, send, retry once, stream, settle.

Made by a client connection for each request that goes to an engine. The head of the answer is kept back until the first
byte of its body: until then another engine can take the request over, and the client sees nothing of it.

States: chosen (or held) -> sent -> streaming -> ended. `ended` is reached once, by whichever of these comes first: the
answer is whole, the engine fails, the client goes away, a timeout.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moe_contract.tenancy import sign_request_id
from moe_scheduling.engine.choice import Hold, Job, Refuse, RefuseReason, Send
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import Target

from moe_gateway.engines.dispatcher import Dispatcher, InFlightRequest
from moe_gateway.engines.engine_death import says_engine_is_dead
from moe_gateway.http.heads import (
    build_request_head,
    ends_between_chunks,
    read_tenant,
    skip_informational,
    stamp_response,
)
from moe_gateway.http.replies import Outcome, build_error, build_stream_error, frame_chunk
from moe_gateway.http.routes import Route
from moe_gateway.http.upstream import LONGEST_HEAD_BYTES, Pool, UpstreamConnection
from moe_gateway.request.parsing import Parsed

ATTEMPTS = 2
USAGE_WINDOW_BYTES = 64 * 1024
ENGINE_GONE = "the engine was taken away"
ENGINE_DEAD = "the engine has died"
GATEWAY_GONE = "the gateway was told to end at once"
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')


@dataclass(slots=True)
class ClientRequest:
    """A whole request of a client; `headers` are lines that each end with CRLF, hop-by-hop fields taken out."""

    method: bytes
    url: bytes
    headers: bytes
    body: bytes
    request_id: bytes
    session: str | None
    keep_alive: bool
    http10: bool
    arrived_s: float


class ClientSide(Protocol):
    """The connection that the answer goes to."""

    def write(self, data: bytes) -> None:
        """More of the answer."""

    def answered(self, exchange: "Exchange", *, keep_alive: bool) -> None:
        """The answer is over."""


@dataclass(slots=True, kw_only=True)
class ExchangeContext:
    """What an exchange works with; one for the gateway.

    Attributes:
        model: the name of the model that is served, where it is known without an engine.
        tenant_header: names the tenant of a request, in lower case; empty: nothing does.
    """

    dispatcher: Dispatcher
    pool_of: Callable[[str], Pool | None]
    clock: Callable[[], float]
    spawn: Callable[..., asyncio.Task[None]]
    on_end: Callable[["Exchange", int, str], None]
    model: str | None = None
    tenant_header: bytes = b""
    draining: bool = False


class Exchange:
    """See the module; it is a `Waiter` of the dispatcher and a `Receiver` of an upstream connection."""

    __slots__ = (
        "_attempts",
        "_buffer",
        "_chunked",
        "_client",
        "_connecting",
        "_ended",
        "_framed",
        "_fresh_try",
        "_is_fair",
        "_keys",
        "_last",
        "_paused",
        "_placed",
        "_sent",
        "_session",
        "_streaming",
        "_surroundings",
        "_upstream",
        "_without_s",
        "job",
        "last_s",
        "parsed",
        "request",
        "route",
        "tried",
        "ttft_s",
    )

    def __init__(
        self, request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, surroundings: ExchangeContext
    ) -> None:
        self.request = request
        self.route = route
        self.parsed = parsed
        self.tried: set[Target] = set()
        self.last_s = request.arrived_s
        self.ttft_s: float | None = None
        self._client = client
        self._surroundings = surroundings
        self._session = session = request.session or parsed.user
        self._attempts = 0
        self._buffer = self._last = b""
        self._chunked = False
        self._framed = True
        self._fresh_try = False
        self._streaming = False
        self._paused = False
        self._ended = False
        # Whether an engine has it, and since when none has, or had before one took it.
        self._sent = False
        self._without_s = request.arrived_s
        self._placed: InFlightRequest | None = None
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.job: Job
        self._keys: tuple[int, ...]
        self._is_fair = surroundings.dispatcher.request_settings.is_fair
        header = surroundings.tenant_header
        tenant = read_tenant(request.headers, header) if self._is_fair and header else ANONYMOUS_TENANT
        self.job, self._keys = surroundings.dispatcher.size(parsed, session, tenant)
        if self.computes:
            surroundings.dispatcher.stats.arrive(self.job.prompt_tokens, request.arrived_s)

    @property
    def target(self) -> Target | None:
        """Where it was sent last."""
        return None if self._placed is None else self._placed.target

    @property
    def computes(self) -> bool:
        """Whether an engine has to compute for it; a question, such as for the list of models, costs it nothing."""
        return self.route.has_job

    # 1. Choose.

    def begin(self) -> None:
        """Sends, holds or refuses."""
        dispatcher = self._surroundings.dispatcher
        now_s = self._surroundings.clock()
        if dispatcher.held and self.computes:
            # Who waits already goes first; when nobody of them can, neither can this one.
            dispatcher.pump(now_s)
            if dispatcher.held:
                self._hold()
                return
        decision = dispatcher.choose(self.job, now_s, self.tried, computes=self.computes)
        if type(decision) is Send:
            self.release(decision)
            return
        match decision:
            case Hold():
                self._hold()
            case Refuse(reason=RefuseReason.NO_ENGINE) if not dispatcher.engines and not dispatcher.discovers:
                self._refuse(
                    Outcome.NO_ENGINE,
                    "no engine is configured",
                    retry_after_s=dispatcher.retry_after_s(self._surroundings.clock()),
                )
            case Refuse():
                self._hold()

    def _hold(self) -> None:
        dispatcher = self._surroundings.dispatcher
        if not dispatcher.hold(self, self._surroundings.clock(), self._without_s):
            if dispatcher.accepting:
                outcome, message = Outcome.BUSY, "all engines are saturated and the queue is full"
            else:
                outcome, message = Outcome.NO_ENGINE, "no engine accepts requests and the queue is full"
            self._turn_away(outcome, message)

    def expire(self) -> None:
        """It was held for too long."""
        dispatcher = self._surroundings.dispatcher
        what = "every engine stayed saturated" if dispatcher.accepting else "no engine accepted requests"
        self._turn_away(Outcome.NO_ENGINE, f"{what} in time")

    # 2. Send.

    def release(self, decision: Send) -> None:
        """The dispatcher's choice."""
        surroundings = self._surroundings
        now_s = surroundings.clock()
        self._placed = surroundings.dispatcher.place(self.job, self._keys, self._session, decision, now_s)
        self._attempts += 1
        self._fresh_try = False
        self.last_s = now_s
        self._send()

    def _send(self) -> None:
        assert self._placed is not None
        pool = self._surroundings.pool_of(self._placed.target.server)
        if pool is None:
            self._fail(ENGINE_GONE)
            return
        connection = None if self.request.http10 or self._fresh_try else pool.take()
        if connection is not None:
            self._write_request(connection)
        else:
            self._connecting = self._surroundings.spawn(self._connect(pool))

    async def _connect(self, pool: Pool) -> None:
        try:
            connection = await pool.connect()
        except (OSError, ValueError) as error:
            self._connecting = None
            self._forgive_attempt()
            self._fail(f"no connection to the engine: {str(error) or type(error).__name__}")
            return
        self._connecting = None
        if self._ended:
            connection.abort()
        elif connection.transport is None:
            self._fail("the engine closed the connection")
        else:
            self._write_request(connection)

    def _forgive_attempt(self) -> None:
        """What has not seen the request has not failed it: it may try again for as long as requests are held."""
        surroundings = self._surroundings
        if surroundings.dispatcher.may_hold(self._without_s, surroundings.clock()):
            self._attempts -= 1

    def _write_request(self, connection: UpstreamConnection) -> None:
        assert self._placed is not None
        request, target = self.request, self._placed.target
        engine = self._surroundings.dispatcher.engines.get(target.server)
        if engine is None:
            connection.abort()
            self._fail(ENGINE_GONE)
            return
        self._upstream = connection
        self._buffer = b""
        head = build_request_head(
            request.method,
            request.url,
            request.headers,
            host=engine.host,
            body_bytes=len(request.body),
            request_id=sign_request_id(request.request_id, self.job.tenant) if self._is_fair else request.request_id,
            rank=target.rank if engine.address.ranks > 1 else None,
            http10=request.http10,
        )
        connection.request(self, head, request.body)
        self._sent = True
        if self._paused:
            self.pause()

    # 3. Stream.

    def received(self, data: bytes, connection: UpstreamConnection) -> None:
        """Bytes of the answer."""
        self.last_s = self._surroundings.clock()
        if self._streaming:
            self._last = data
            self._client.write(data)
            if connection.complete:
                self._finish(connection)
            return
        self._buffer = self._buffer + data if self._buffer else data
        if not connection.head_complete:
            if len(self._buffer) > LONGEST_HEAD_BYTES:
                self._drop_upstream()
                self._fail("the head of the engine's answer has no end")
            return
        if self._should_try_another(connection.status):
            self._drop_upstream()
            self._turned_away(connection.status)
            return
        self._start(connection)

    def _should_try_another(self, status: int) -> bool:
        """An engine that is full or going down answers 503, or 500 while it drains: that is no answer yet."""
        if status not in (500, 503) or self._attempts >= ATTEMPTS or self._placed is None:
            return False
        books = self._surroundings.dispatcher.target_states.get(self._placed.target)
        return status == 503 or books is None or not books.accepting

    def _start(self, connection: UpstreamConnection) -> None:
        self._buffer = buffer = skip_informational(self._buffer)
        head_end = buffer.index(b"\r\n\r\n") + 4
        if len(buffer) == head_end and not connection.complete:
            return
        if says_engine_is_dead(connection.status, buffer[head_end:]):
            self._drop_upstream()
            self._fail(ENGINE_DEAD, dead=True)
            return
        assert self._placed is not None
        surroundings = self._surroundings
        shows = connection.status == 200 and self.route.shows_first_token(stream=self.parsed.stream)
        surroundings.dispatcher.answered(self._placed, self.last_s, is_first_token=shows)
        self.ttft_s = self.last_s - self.request.arrived_s
        if self.computes:
            surroundings.dispatcher.stats.answer(self.ttft_s, self.last_s)
        head = buffer[:head_end].lower()
        self._chunked = b"\r\ntransfer-encoding:" in head
        self._framed = self._chunked or b"\r\ncontent-length:" in head
        self._streaming = True
        keep_alive = self._keeps_alive and self._framed
        self._last = buffer[head_end:]
        self._client.write(stamp_response(buffer, head, self.request.request_id, close=not keep_alive))
        if connection.complete:
            self._finish(connection)

    @property
    def _keeps_alive(self) -> bool:
        return self.request.keep_alive and not self._surroundings.draining

    def _finish(self, connection: UpstreamConnection) -> None:
        if self._surroundings.dispatcher.wants_lesson:
            self._learn()
        status = connection.status
        keep_alive = self._keeps_alive and self._framed and not connection.overrun
        self._upstream = None
        if self._paused and connection.transport is not None:
            connection.transport.resume_reading()
        connection.release()
        self._end(status, "")
        self._client.answered(self, keep_alive=keep_alive)

    def _learn(self) -> None:
        if self.parsed.stream or not self.route.has_job or len(self._buffer) > USAGE_WINDOW_BYTES:
            return
        found = _PROMPT_TOKENS.search(self._buffer)
        if found is not None and len(found[1]) < 12:
            self._surroundings.dispatcher.learn_tokens(self.parsed, int(found[1]))

    # 4. What can go wrong.

    def lost(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine ended the connection before the answer was whole."""
        self._upstream = None
        if self._streaming and not self._framed:
            # An answer without a length ends with the connection.
            self._end(connection.status, "")
            self._client.answered(self, keep_alive=False)
        elif connection.reused and not self._buffer and not self._fresh_try:
            # An idle connection was closed while the request was on its way: no failure of the engine.
            self._fresh_try = True
            self._send()
        else:
            self._fail(reason)

    def _fail(self, reason: str, *, dead: bool = False) -> None:
        """The engine failed this request: another one, once, as long as the client has seen nothing."""
        assert self._placed is not None
        surroundings = self._surroundings
        now_s = surroundings.clock()
        surroundings.dispatcher.failed(self._placed.target, now_s, dead=dead)
        if self._streaming:
            self._break_off(reason)
            return
        self._settle(now_s)
        if self._attempts < ATTEMPTS:
            self._begin_again(self._placed.target)
        else:
            self._refuse(Outcome.ENGINE_FAILED, reason)

    def _turned_away(self, status: int) -> None:
        """No fault of the engine, if it said so by a 503: it keeps its other work and its good name."""
        assert self._placed is not None
        if status != 503:
            self._fail(f"the engine answered {status}")
            return
        now_s = self._surroundings.clock()
        self._surroundings.dispatcher.turned_away(self._placed.target, now_s)
        self._settle(now_s)
        self._begin_again(self._placed.target)

    def _begin_again(self, without: Target) -> None:
        """At another engine, or at the same one later."""
        self.tried.add(without)
        if self._sent:
            self._sent, self._without_s = False, self._surroundings.clock()
        self._surroundings.dispatcher.stats.retried += 1
        self.begin()

    def _break_off(self, reason: str, outcome: Outcome = Outcome.ENGINE_FAILED) -> None:
        # What the engine wrote last may end inside a chunk: then nothing can be added that a client would understand.
        if self._chunked and self.parsed.stream and ends_between_chunks(self._last):
            self._client.write(frame_chunk(build_stream_error(outcome, reason)) + b"0\r\n\r\n")
        self._end(200, reason, broken=True)
        self._client.answered(self, keep_alive=False)

    def _turn_away(self, outcome: Outcome, message: str) -> None:
        """Refuses for now, and says when to come again."""
        surroundings = self._surroundings
        self._refuse(outcome, message, retry_after_s=surroundings.dispatcher.retry_after_s(surroundings.clock()))

    def _refuse(self, outcome: Outcome, message: str, *, retry_after_s: int | None = None) -> None:
        keep_alive = self._keeps_alive
        self._surroundings.dispatcher.stats.refusals[outcome.label] += 1
        self._client.write(
            build_error(
                outcome,
                message,
                request_id=self.request.request_id,
                close=not keep_alive,
                retry_after_s=retry_after_s,
            )
        )
        self._end(outcome.status, message)
        self._client.answered(self, keep_alive=keep_alive)

    def abandon(self) -> None:
        """The client is gone: the engine learns it at once."""
        if not self._ended:
            self._surroundings.dispatcher.stats.refusals[Outcome.CLIENT_GONE.label] += 1
            self._end(Outcome.CLIENT_GONE.status, "the client closed the connection")

    def cut(self) -> None:
        """The gateway ends at once."""
        if self._streaming:
            self._break_off(GATEWAY_GONE, Outcome.GATEWAY_ENDED)
        else:
            self._refuse(Outcome.GATEWAY_ENDED, GATEWAY_GONE, retry_after_s=1)

    def check(self, now_s: float, idle_timeout_s: float) -> None:
        """Called now and then: too long a silence, of the engine or of a client that does not read, ends it."""
        if self._ended or self._placed is None or now_s - self.last_s < idle_timeout_s:
            return
        if not self._upstream and self._connecting is None:
            return
        reason = f"nothing moved for {idle_timeout_s:g} s"
        self._drop_upstream()
        if self._streaming:
            self._break_off(reason)
        else:
            self._refuse(Outcome.ENGINE_SILENT, reason)

    # 5. The end, and the pace in between.

    def pause(self) -> None:
        """The client reads more slowly than the engine writes."""
        self._paused = True
        if self._upstream is not None and self._upstream.transport is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        self._paused = False
        if self._upstream is not None and self._upstream.transport is not None:
            self._upstream.transport.resume_reading()

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()

    def _settle(self, now_s: float) -> None:
        if self._placed is not None:
            self._surroundings.dispatcher.settled(self._placed, now_s)

    def _end(self, status: int, reason: str, *, broken: bool = False) -> None:
        self._ended = True
        dispatcher = self._surroundings.dispatcher
        dispatcher.unhold(self)
        if self._upstream is not None or self._connecting is not None:
            self._drop_upstream()
        self._settle(self._surroundings.clock())
        dispatcher.stats.finish(self.route.label, status, broken=broken)
        self._surroundings.on_end(self, status, reason)

"""One request from its whole arrival to the end of its answer: choose, send, retry, stream, settle.

Made by a client connection for each request that goes to an engine. The answer is kept back until the first byte of its
body, a stream until its first token: until then another engine can take the request over without the client seeing it.
Comments of a stream, which keep the connection alive, pass at once. `RequestAttempts` decides whether another engine
does, `Dispatcher.admit` whether the request is sent, held or rejected.

States: held or sent, perhaps open (comments have passed) -> streaming -> ended. `_end` is reached once, by whichever of
these comes first: the answer is whole, the engine fails for good, the client goes away, a timeout.
"""

import asyncio
import re

from moe_contract.tenancy import sign_request_id
from moe_scheduling.engine.attempts import Failure, NextStep, RequestAttempts
from moe_scheduling.engine.choice import Job, Send
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import Target

from moe_gateway.engines.engine_death import says_engine_is_dead
from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.engines.target_states import InFlightRequest
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
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.stream_events import (
    ERROR_MARK,
    LONGEST_BEGINNING_BYTES,
    AnswerPart,
    find_error,
    may_end_event,
    part_of_status,
    read_beginning,
    split_chunks,
)

USAGE_WINDOW_BYTES = 64 * 1024
ENGINE_GONE = "the engine was taken away"
ENGINE_DEAD = "the engine has died"
ENGINE_ERROR = "the engine answered with an error"
FORCED_STOP = "the gateway was stopped by force"
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d+)')

_REJECTIONS = {
    Rejection.NO_ENGINE_CONFIGURED: (Outcome.NO_ENGINE, "no engine is configured"),
    Rejection.QUEUE_FULL_NO_ENGINE: (Outcome.NO_ENGINE, "no engine accepts requests and the queue is full"),
    Rejection.QUEUE_FULL_SATURATED: (Outcome.BUSY, "all engines are saturated and the queue is full"),
    Rejection.TIMEOUT_NO_ENGINE: (Outcome.NO_ENGINE, "no engine accepted requests in time"),
    Rejection.TIMEOUT_SATURATED: (Outcome.NO_ENGINE, "every engine stayed saturated"),
}


class Exchange:
    """A request and its answer between a client's and an engine's connection.

    It is a `Waiter` of the dispatcher and a `Receiver` of an upstream connection.

    Attributes:
        job: what it asks of an engine.
        attempts: how often it was sent, and which targets failed it.
        last_s: when bytes of the answer came last, or it was sent.
        ttft_s: seconds from its arrival to the first token of its stream; None before, and for an answer without one.
    """

    __slots__ = (
        "_buffer",
        "_chunked",
        "_client",
        "_connecting",
        "_context",
        "_ended",
        "_framed",
        "_has_answer",
        "_has_error",
        "_held_events",
        "_in_flight",
        "_is_events",
        "_is_fair",
        "_is_open",
        "_keys",
        "_last",
        "_needs_new_connection",
        "_paused",
        "_session",
        "_upstream",
        "attempts",
        "job",
        "last_s",
        "parsed",
        "request",
        "route",
        "ttft_s",
    )

    def __init__(
        self, request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, context: ExchangeContext
    ) -> None:
        dispatcher = context.dispatcher
        self.request = request
        self.route = route
        self.parsed = parsed
        self.attempts = RequestAttempts(dispatcher.hold_timeout_s, request.arrived_s)
        self.last_s = request.arrived_s
        self.ttft_s: float | None = None
        self._client = client
        self._context = context
        self._session = session = request.session or parsed.user
        self._buffer = self._last = b""
        self._chunked = False
        self._framed = True
        # Events that are kept back in an answer of which comments have passed.
        self._held_events = b""
        self._is_events = self._is_open = self._has_answer = self._has_error = False
        self._needs_new_connection = False
        self._paused = False
        self._ended = False
        self._in_flight: InFlightRequest | None = None
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self.job: Job
        self._keys: tuple[int, ...]
        self._is_fair = dispatcher.request_settings.is_fair
        header = context.tenant_header
        tenant = read_tenant(request.headers, header) if self._is_fair and header else ANONYMOUS_TENANT
        self.job, self._keys = dispatcher.build_job(parsed, session, tenant)
        if self.computes:
            context.stats.arrive(self.job.prompt_tokens, request.arrived_s)

    @property
    def target(self) -> Target | None:
        """Where it was sent last; None before."""
        return None if self._in_flight is None else self._in_flight.target

    @property
    def computes(self) -> bool:
        """Whether an engine has to compute for it; a list of models costs an engine nothing."""
        return self.route.has_job

    # 1. Choose.

    def begin(self) -> None:
        """Sends, holds or rejects it."""
        admission = self._context.dispatcher.admit(self, self._context.clock())
        if type(admission) is Send:
            self.release(admission)
        elif isinstance(admission, Rejection):
            self.reject(admission)

    def reject(self, rejection: Rejection) -> None:
        """Answers with an error that says when to come again."""
        outcome, message = _REJECTIONS[rejection]
        context = self._context
        self._refuse(outcome, message, retry_after_s=context.dispatcher.retry_after_s(context.clock()))

    # 2. Send.

    def release(self, decision: Send) -> None:
        """Sends it to the chosen target."""
        context = self._context
        self.last_s = now_s = context.clock()
        self._in_flight = context.dispatcher.send(self.job, self._keys, self._session, decision, now_s)
        self.attempts.begin()
        self._needs_new_connection = False
        self._send()

    def _send(self) -> None:
        assert self._in_flight is not None
        pool = self._context.pool_of(self._in_flight.target.server)
        if pool is None:
            self._fail(ENGINE_GONE)
            return
        connection = None if self.request.http10 or self._needs_new_connection else pool.take()
        if connection is not None:
            self._write_request(connection)
        else:
            self._connecting = self._context.spawn(self._connect(pool))

    async def _connect(self, pool: Pool) -> None:
        try:
            connection = await pool.connect()
        except (OSError, ValueError) as error:
            self._connecting = None
            self._fail(f"no connection to the engine: {str(error) or type(error).__name__}", Failure.UNREACHABLE)
            return
        self._connecting = None
        if self._ended:
            connection.abort()
        elif connection.transport is None:
            self._fail("the engine closed the connection")
        else:
            self._write_request(connection)

    def _write_request(self, connection: UpstreamConnection) -> None:
        assert self._in_flight is not None
        request, target = self.request, self._in_flight.target
        engine = self._context.dispatcher.engines.get(target.server)
        if engine is None:
            connection.abort()
            self._fail(ENGINE_GONE)
            return
        self._upstream = connection
        self._buffer = self._held_events = b""
        self._is_events = False
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
        self.attempts.receive()
        if self._paused:
            self.pause()

    # 3. Stream.

    def received(self, data: bytes, connection: UpstreamConnection) -> None:
        """Bytes of the answer came."""
        self.last_s = self._context.clock()
        if self.attempts.is_answering:
            self._last = data
            if self._is_events and ERROR_MARK in data:
                self._note_error(data)
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
        if connection.status in (500, 503) and self._retry_by_status(connection.status):
            return
        if not self._is_events or connection.complete or may_end_event(data, len(self._buffer)):
            self._start(connection)

    def _retry_by_status(self, status: int) -> bool:
        """Retries where the status is a failure of the attempt; returns False where it is the client's answer."""
        assert self._in_flight is not None
        is_accepting = self._context.dispatcher.is_accepting(self._in_flight.target)
        failure = self.attempts.failure_of_status(status, is_accepting=is_accepting)
        if failure is None:
            return False
        self._drop_upstream()
        self._fail(f"the engine answered {status}", failure)
        return True

    def _start(self, connection: UpstreamConnection) -> None:
        """Begins the answer to the client, once the first byte of its body is there, of a stream its first token."""
        self._buffer = buffer = skip_informational(self._buffer)
        head_end = buffer.index(b"\r\n\r\n") + 4
        if len(buffer) == head_end and not connection.complete:
            return
        head = buffer[:head_end].lower()
        self._chunked = b"\r\ntransfer-encoding:" in head
        self._is_events = connection.status == 200 and self.computes and b"text/event-stream" in head
        part = self._read_events(head) if self._is_events else self._part_of_status(connection.status)
        if part is AnswerPart.PENDING:
            if not connection.complete:
                return
            # A stream without a token and without an end.
            part = AnswerPart.ENGINE_ERROR
        if part is AnswerPart.ENGINE_ERROR and self._retry_error(connection.status):
            return
        if self._is_open and not (self._is_events and self._chunked):
            self._close_open(connection, head_end)
            return
        self._count_answer(part)
        self._commit(head, connection)

    def _part_of_status(self, status: int) -> AnswerPart:
        return part_of_status(status) if self.computes else AnswerPart.REFUSAL

    def _read_events(self, head: bytes) -> AnswerPart:
        """Reads how far the stream has come. Comments pass to the client while nothing else counts yet."""
        raw = self._buffer[len(head) :]
        data, rest = split_chunks(raw) if self._chunked else (raw, b"")
        beginning = read_beginning(self._held_events + data)
        if beginning.part is AnswerPart.PENDING and len(raw) > LONGEST_BEGINNING_BYTES:
            return AnswerPart.WHOLE
        can_open = self._chunked and not self.request.http10
        if self._is_open or (beginning.comments and can_open and beginning.part is AnswerPart.PENDING):
            if not self._is_open:
                self._is_open = True
                close = not self._keeps_alive
                self._client.write(
                    stamp_response(self._buffer[: len(head)], head, self.request.request_id, close=close)
                )
            if beginning.comments:
                self._client.write(frame_chunk(beginning.comments))
            self._held_events, self._buffer = beginning.events, self._buffer[: len(head)] + rest
        return beginning.part

    def _retry_error(self, status: int) -> bool:
        """An engine's error came in place of an answer: retries at another engine; returns False where none can."""
        assert self._in_flight is not None
        dispatcher, attempts = self._context.dispatcher, self.attempts
        if (status == 500 or self._is_events) and says_engine_is_dead(self._held_events + self._buffer):
            self._drop_upstream()
            self._fail(ENGINE_DEAD, Failure.ENGINE_DEAD)
            return True
        if not attempts.may_repeat or not dispatcher.has_other(self._in_flight.target, attempts.failed_targets):
            return False
        self._drop_upstream()
        self._fail(ENGINE_ERROR, Failure.ENGINE_ERROR)
        return True

    def _commit(self, head: bytes, connection: UpstreamConnection) -> None:
        """Passes on what was kept back: from now on the client sees each byte as it comes."""
        self._framed = self._chunked or b"\r\ncontent-length:" in head
        self.attempts.is_answering = True
        self._last = self._buffer[len(head) :]
        if self._is_events and ERROR_MARK in self._buffer:
            self._note_error(self._held_events + self._last)
        if self._is_open:
            self._client.write((frame_chunk(self._held_events) if self._held_events else b"") + self._last)
        else:
            close = not (self._keeps_alive and self._framed)
            self._client.write(stamp_response(self._buffer, head, self.request.request_id, close=close))
        if connection.complete:
            self._finish(connection)

    def _close_open(self, connection: UpstreamConnection, head_end: int) -> None:
        """Ends a stream of which comments have passed with the error that another engine answered."""
        if not connection.complete:
            return
        raw = self._buffer[head_end:]
        error = b" ".join((split_chunks(raw)[0] if self._chunked else raw).split())
        self._count_answer(self._part_of_status(connection.status))
        self._client.write(frame_chunk(b"data: " + error + b"\n\n") + b"0\r\n\r\n")
        self._end(200, f"the engine answered {connection.status}", broken=True)
        self._client.answered(keep_alive=False)

    def _count_answer(self, part: AnswerPart) -> None:
        """Reports what the answer shows of the engine. An error of the client shows nothing."""
        assert self._in_flight is not None
        context, now_s = self._context, self.last_s
        self._has_answer = part in (AnswerPart.TOKEN, AnswerPart.WHOLE)
        if part is AnswerPart.TOKEN:
            context.dispatcher.answer(self._in_flight, now_s, is_first_token=True)
            self.ttft_s = now_s - self.request.arrived_s
            context.stats.answer(self.ttft_s, now_s)
        elif part is AnswerPart.ENGINE_ERROR:
            self._has_error = self._is_events
            context.dispatcher.count_error(self._in_flight.target, now_s)
        elif part is AnswerPart.WHOLE:
            context.dispatcher.answer(self._in_flight, now_s, is_first_token=self.route.only_reads)

    def _note_error(self, data: bytes) -> None:
        """An error may be among these bytes of a stream that has begun."""
        if not self._has_error and find_error(data) is AnswerPart.ENGINE_ERROR:
            self._count_answer(AnswerPart.ENGINE_ERROR)

    @property
    def _keeps_alive(self) -> bool:
        return self.request.keep_alive and not self._context.draining

    def _finish(self, connection: UpstreamConnection) -> None:
        """The answer is whole: the engine's connection is free, and the client's for its next request."""
        if self._context.dispatcher.samples_tokenisation:
            self._sample_tokenisation()
        status = connection.status
        keep_alive = self._keeps_alive and self._framed and not connection.overrun
        self._upstream = None
        if self._paused and connection.transport is not None:
            connection.transport.resume_reading()
        connection.release()
        if self._has_answer and self._in_flight is not None:
            self._context.dispatcher.complete(self._in_flight, self.last_s)
        self._end(status, ENGINE_ERROR if self._has_error else "", broken=self._has_error)
        self._client.answered(keep_alive=keep_alive)

    def _sample_tokenisation(self) -> None:
        """Reads how many tokens the prompt had, where the answer came in one short piece."""
        if self.parsed.stream or not self.route.has_job or len(self._buffer) > USAGE_WINDOW_BYTES:
            return
        found = _PROMPT_TOKENS.search(self._buffer)
        if found is not None and len(found[1]) < 12:
            self._context.dispatcher.learn_tokens(self.parsed, int(found[1]))

    # 4. Failures.

    def lost(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine ended the connection before the answer was whole."""
        self._upstream = None
        if self.attempts.is_answering and not self._framed:
            # An answer without a length ends with the connection.
            self._end(connection.status)
            self._client.answered(keep_alive=False)
        elif connection.reused and not self._buffer and not self._needs_new_connection:
            # An idle connection was closed while the request was on its way: no failure of the engine.
            self._needs_new_connection = True
            self._send()
        else:
            self._fail(reason)

    def _fail(self, reason: str, failure: Failure = Failure.BROKEN) -> None:
        """The attempt failed: reports the engine, then retries, refuses, or breaks off the answer that has begun."""
        assert self._in_flight is not None
        context, target = self._context, self._in_flight.target
        now_s = context.clock()
        step = self.attempts.after_failure(target, failure, now_s)
        if failure is Failure.ENGINE_FULL:
            context.dispatcher.pause_full(target, now_s)
        elif failure is Failure.ENGINE_ERROR:
            context.dispatcher.count_error(target, now_s)
        else:
            context.dispatcher.fail(target, now_s, dead=failure is Failure.ENGINE_DEAD)
        if step is NextStep.BREAK_OFF:
            self._break_off(reason)
            return
        context.dispatcher.settle(self._in_flight, now_s)
        if step is NextStep.RETRY:
            context.stats.retry()
            self.begin()
        else:
            self._refuse(Outcome.ENGINE_FAILED, reason)

    def _break_off(self, reason: str, outcome: Outcome = Outcome.ENGINE_FAILED) -> None:
        # The last bytes of the engine may end inside a chunk: then nothing can be added that a client would understand.
        is_stream = self._is_open or (self._chunked and self.parsed.stream)
        if is_stream and ends_between_chunks(self._last):
            self._client.write(frame_chunk(build_stream_error(outcome, reason)) + b"0\r\n\r\n")
        self._end(200, reason, broken=True)
        self._client.answered(keep_alive=False)

    def _refuse(self, outcome: Outcome, message: str, *, retry_after_s: int | None = None) -> None:
        if self._is_open:
            self._break_off(message, outcome)
            return
        keep_alive = self._keeps_alive
        answer = build_error(
            outcome, message, request_id=self.request.request_id, close=not keep_alive, retry_after_s=retry_after_s
        )
        self._client.write(answer)
        self._end(outcome.status, message, refusal=outcome.label)
        self._client.answered(keep_alive=keep_alive)

    def abandon(self) -> None:
        """The client is gone: the engine's connection is closed at once."""
        if not self._ended:
            outcome = Outcome.CLIENT_GONE
            self._end(outcome.status, "the client closed the connection", refusal=outcome.label)

    def force_stop(self) -> None:
        """The gateway stops at once: a stream ends with an error event, an unanswered request with status 503."""
        if self.attempts.is_answering:
            self._break_off(FORCED_STOP, Outcome.GATEWAY_ENDED)
        else:
            self._refuse(Outcome.GATEWAY_ENDED, FORCED_STOP, retry_after_s=1)

    def check(self, now_s: float, idle_timeout_s: float) -> None:
        """Ends it when neither the engine nor the client has moved anything for `idle_timeout_s`."""
        if self._ended or self._in_flight is None or now_s - self.last_s < idle_timeout_s:
            return
        if not self._upstream and self._connecting is None:
            return
        reason = f"nothing moved for {idle_timeout_s:g} s"
        self._drop_upstream()
        if self.attempts.is_answering:
            self._break_off(reason)
        else:
            self._refuse(Outcome.ENGINE_SILENT, reason)

    # 5. Back-pressure, and the end.

    def pause(self) -> None:
        """The client reads more slowly than the engine writes: the engine's connection is not read."""
        self._paused = True
        if self._upstream is not None and self._upstream.transport is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up: the engine's connection is read again."""
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

    def _end(self, status: int, reason: str = "", *, refusal: str = "", broken: bool = False) -> None:
        self._ended = True
        context = self._context
        context.dispatcher.unhold(self)
        if self._upstream is not None or self._connecting is not None:
            self._drop_upstream()
        if self._in_flight is not None:
            context.dispatcher.settle(self._in_flight, context.clock())
        context.stats.finish(self.route.label, status, refusal=refusal, broken=broken)
        context.on_end(self, status, reason)

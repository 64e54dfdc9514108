"""One request from its whole arrival to the end of its answer: choose, send, retry, stream, settle.

Made by a client connection for each request that goes to an engine. The answer is kept back until the first byte of its
body, a stream until its first token: until then another engine can take the request over without the client seeing it.
Comments of a stream, which keep the connection alive, pass at once. `RequestAttempts` decides whether another engine
does, `Dispatcher.admit` whether the request is sent, held or rejected.

States: held or sent, perhaps open (comments have passed) -> streaming -> ended. `_end` is reached once, by whichever of
these comes first: the answer is whole, the engine fails for good, the client goes away, a timeout.
"""

import asyncio

from moe_contract.gateway_config import Limits
from moe_scheduling.engine.attempts import BUSY, NOT_FOUND, REPEATED_STATUSES, AttemptFailure, NextStep, RequestAttempts
from moe_scheduling.engine.choice import Send
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import Target

from moe_gateway.access.priorities import build_engine_id
from moe_gateway.engines.failed_attempts import report_failure
from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.engines.served_models import may_be_unloaded
from moe_gateway.engines.target_states import STALL_S, InFlightRequest
from moe_gateway.http.bodies import Body
from moe_gateway.http.heads import build_request_head
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.http.upstream import LONGEST_HEAD_BYTES, Pool, UpstreamConnection
from moe_gateway.request.answer_account import AnswerAccount
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.beginning_failure import read_failure
from moe_gateway.request.client_answer import ClientAnswer
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext, find_tenant
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.rejections import REJECTIONS
from moe_gateway.request.stream_events import AnswerPart, part_of_status

ENGINE_GONE = "the engine was taken away"
ENGINE_DEAD = "the engine has died"
ENGINE_STALLED = "the engine makes no steps"
ENGINE_ERROR = "the engine answered with an error"
FORCED_STOP = "the gateway was stopped by force"
_PENDING, _ENGINE_ERROR = AnswerPart.PENDING, AnswerPart.ENGINE_ERROR


class Exchange:
    """A request and its answer between a client's and an engine's connection.

    It is a `Waiter` of the dispatcher and a `Receiver` of an upstream connection.

    Attributes:
        job: what it asks of an engine.
        attempts: how often it was sent, and which targets failed it.
        last_s: when bytes of the answer came last, or it was sent.
    """

    __slots__ = (
        "_account",
        "_answer",
        "_beginning",
        "_connecting",
        "_context",
        "_ended",
        "_in_flight",
        "_is_fair",
        "_keys",
        "_paused",
        "_session",
        "_upstream",
        "_user",
        "attempts",
        "job",
        "last_s",
        "parsed",
        "request",
        "route",
    )

    def __init__(
        self, request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, context: ExchangeContext
    ) -> None:
        dispatcher = context.dispatcher
        self.request = request
        self.route = route
        self.parsed = parsed
        self.attempts = RequestAttempts(dispatcher.hold_timeout_s, request.arrived_s, request.deadline_s)
        self.last_s = request.arrived_s
        self._answer = ClientAnswer(request, route, client, context)
        self._account = AnswerAccount(route, request, context)
        self._context = context
        self._session = session = request.session
        self._user = parsed.user if session is None else None
        if self._user is not None and context.open_users.enter(self._user):
            self._session = session = self._user
        self._beginning = AnswerBeginning()
        self._paused = False
        self._ended = False
        self._in_flight: InFlightRequest | None = None
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_fair = dispatcher.request_settings.is_fair
        tenant = find_tenant(request, context.tenant_header) if self._is_fair else ANONYMOUS_TENANT
        self.job, self._keys = dispatcher.build_job(parsed, session, tenant)
        if self.computes:
            context.stats.arrive(self.job.prompt_tokens, request.arrived_s)

    @property
    def target(self) -> Target | None:
        """Where it was sent last; None before."""
        return None if self._in_flight is None else self._in_flight.target

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to the first token of its stream; None before, and for an answer without one."""
        return self._account.ttft_s

    @property
    def continued(self) -> str:
        """How its stream, which had begun, goes on at its target; empty for one that began there."""
        return ""

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
        outcome, message = REJECTIONS[rejection]
        context = self._context
        self._refuse(outcome, message, retry_after_s=context.dispatcher.retry_after_s(context.clock()))

    # 2. Send.

    def release(self, decision: Send) -> None:
        """Sends it to the chosen target."""
        context = self._context
        self.last_s = now_s = context.clock()
        context.recent.attempt(self, decision, context.dispatcher, now_s)
        self._in_flight = context.dispatcher.send(self.job, self._keys, self._session, decision, now_s)
        self.attempts.begin()
        self._send()

    def _send(self) -> None:
        assert self._in_flight is not None
        pool = self._context.pool_of(self._in_flight.target.server)
        if pool is None:
            self._fail(ENGINE_GONE, AttemptFailure.UNREACHABLE)
            return
        # An idle connection may be about to close, which costs an attempt: the last one gets a connection of its own.
        is_new = self.request.http10 or not self.attempts.may_repeat
        connection = None if is_new else pool.take()
        if connection is not None:
            self._write_request(connection)
        else:
            self._connecting = self._context.spawn(self._connect(pool))

    async def _connect(self, pool: Pool) -> None:
        try:
            connection = await pool.connect()
        except (OSError, ValueError) as error:
            self._connecting = None
            self._fail(f"no connection to the engine: {str(error) or type(error).__name__}", AttemptFailure.UNREACHABLE)
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
            self._fail(ENGINE_GONE, AttemptFailure.UNREACHABLE)
            return
        self._upstream = connection
        url, body = self._begin_attempt()
        head = build_request_head(
            request.method,
            url,
            request.headers,
            host=engine.host,
            body_bytes=len(body),
            request_id=build_engine_id(request, self.job.tenant, self.job.priority, is_fair=self._is_fair),
            rank=target.rank if engine.address.ranks > 1 else None,
            http10=request.http10,
        )
        connection.request(self, head, body)
        self.attempts.receive()
        if self._paused:
            self.pause()

    def _begin_attempt(self) -> tuple[bytes, Body]:
        """An attempt begins: returns the target and the body of its request."""
        self._beginning = AnswerBeginning()
        return self.request.url, self.request.body

    # 3. Stream.

    def received(self, data: bytes, connection: UpstreamConnection) -> None:
        """Bytes of the answer came."""
        self.last_s = self._context.clock()
        if self.attempts.is_answering:
            self._account.watch(data, self._in_flight, self.last_s)
            self._answer.pass_on(data)
            if connection.complete:
                self._finish(connection)
            return
        beginning = self._beginning
        beginning.received += data
        if not connection.head_complete:
            if len(beginning.received) > LONGEST_HEAD_BYTES:
                self._drop_upstream()
                self._fail("the head of the engine's answer has no end")
            return
        if connection.status in REPEATED_STATUSES and self._retry_by_status(connection.status):
            return
        part = beginning.read(data, connection.status, computes=self.computes, complete=connection.complete)
        if part is not _PENDING:
            self._start(part, connection)
        elif beginning.comments and beginning.is_chunked and not self.request.http10:
            self._answer.pass_comments(beginning, self.last_s)

    def _retry_by_status(self, status: int) -> bool:
        """Retries where the status is a failure of the attempt; returns False where it is the client's answer."""
        assert self._in_flight is not None
        dispatcher, target = self._context.dispatcher, self._in_flight.target
        is_name = status == NOT_FOUND and self.computes and may_be_unloaded(self.job.model, dispatcher.engines.values())
        has_other = (is_name or status == BUSY) and dispatcher.has_other(self.job, target, self.attempts.failed_targets)
        is_accepting = dispatcher.is_accepting(target)
        failure = self.attempts.failure_of_status(status, is_accepting=is_accepting, has_other=has_other)
        if failure is None:
            return False
        self._drop_upstream()
        self._fail(f"the engine answered {status}", failure)
        return True

    def _start(self, part: AnswerPart, connection: UpstreamConnection) -> None:
        """Begins the answer to the client, once it shows what it is: it was kept back until then."""
        beginning = self._beginning
        if part is _ENGINE_ERROR and self._retry_error():
            return
        answer = self._answer
        if answer.is_open and not beginning.is_events:
            if connection.complete:
                self._close_open(part)
            return
        assert self._in_flight is not None
        self._account.count(part, beginning, self._in_flight, self.last_s)
        self.attempts.is_answering = True
        if beginning.is_events:
            self._account.begin(beginning, self._in_flight, self.last_s)
        answer.begin(beginning)
        if connection.complete:
            self._finish(connection)

    def _retry_error(self) -> bool:
        """An engine's error came in place of an answer: retries at another engine; returns False where none can."""
        assert self._in_flight is not None
        dispatcher, attempts = self._context.dispatcher, self.attempts
        failure = read_failure(self._beginning)
        if failure is AttemptFailure.ENGINE_DEAD:
            self._drop_upstream()
            self._fail(ENGINE_DEAD, failure)
            return True
        if failure is AttemptFailure.ENGINE_FULL and self._retry_by_status(503):
            return True
        target = self._in_flight.target
        if not attempts.may_repeat or not dispatcher.has_other(self.job, target, attempts.failed_targets):
            return False
        self._drop_upstream()
        self._fail(ENGINE_ERROR, AttemptFailure.ENGINE_ERROR)
        return True

    def _close_open(self, part: AnswerPart) -> None:
        """Ends a stream of which comments have passed with the error that another engine answered."""
        assert self._in_flight is not None
        self._account.count(part, self._beginning, self._in_flight, self.last_s)
        status = self._beginning.error_status or self._beginning.status
        self._answer.end_with_engine_error(self._beginning.error, status)
        self._end(status, f"the engine answered {status}", broken=True)
        self._answer.finish(keep_alive=False)

    def _finish(self, connection: UpstreamConnection) -> None:
        """The answer is whole: the engine's connection is free, and the client's for its next request."""
        self._account.sample_tokenisation(self.parsed, self._beginning)
        status = connection.status
        keep_alive = self._answer.keeps_alive and self._beginning.is_framed and not connection.overrun
        self._upstream = None
        if self._paused and connection.transport is not None:
            connection.transport.resume_reading()
        connection.release()
        self._end_whole(status)
        self._answer.end()
        self._answer.finish(keep_alive=keep_alive)

    def _end_whole(self, status: int) -> None:
        """Ends it with this status, or that of the error with which its stream ended."""
        if self._account.has_answer and self._in_flight is not None:
            self._context.dispatcher.complete(self._in_flight, self.last_s)
        error_status = self._account.error_status
        self._end(error_status or status, ENGINE_ERROR if error_status >= 500 else "")

    # 4. Failures.

    def lost(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine ended the connection before the answer was whole."""
        self._upstream = None
        if self.attempts.is_answering and not self._beginning.is_framed:
            # An answer without a length ends with the connection.
            self._end_whole(connection.status)
            self._answer.end()
            self._answer.finish(keep_alive=False)
        elif self._answer.is_open and self._beginning.is_unframed_piece:
            self._close_open(part_of_status(connection.status))
        elif connection.reused and not self._beginning.received and self.attempts.may_repeat:
            self._send_anew()
        else:
            self._fail(reason)

    def _send_anew(self) -> None:
        """Sends it again where an idle connection ended, to another engine if possible: this one may begin to fail."""
        assert self._in_flight is not None
        dispatcher, attempts, target = self._context.dispatcher, self.attempts, self._in_flight.target
        # The engine may have read the request, so this was an attempt, but it is no failure of the engine.
        if not dispatcher.has_other(self.job, target, attempts.failed_targets):
            attempts.begin()
            self._send()
            return
        attempts.after_failure(target, AttemptFailure.BROKEN, self._context.clock())
        dispatcher.settle(self._in_flight, self._context.clock())
        self._context.stats.retry()
        self.begin()

    def _fail(self, reason: str, failure: AttemptFailure = AttemptFailure.BROKEN) -> None:
        """The attempt failed: reports the engine, then retries, refuses, or breaks off the answer that has begun."""
        assert self._in_flight is not None
        context, target = self._context, self._in_flight.target
        now_s = context.clock()
        is_answering = self.attempts.is_answering
        step = self.attempts.after_failure(target, failure, now_s, can_go_on=self._can_go_on)
        report_failure(context.dispatcher, target, failure, now_s, is_answering=is_answering)
        if step is NextStep.BREAK_OFF:
            self._break_off(reason)
            return
        context.dispatcher.settle(self._in_flight, now_s)
        if step is NextStep.RETRY:
            self._retry()
        else:
            self._refuse(RequestOutcome.ENGINE_FAILED, reason)

    @property
    def _can_go_on(self) -> bool:
        """Whether an answer that has begun can go on at another engine."""
        return False

    def _retry(self) -> None:
        self._context.stats.retry()
        self._beginning = AnswerBeginning()
        self.begin()

    def _break_off(self, reason: str, outcome: RequestOutcome = RequestOutcome.ENGINE_FAILED) -> None:
        self._answer.break_off(outcome, reason, is_stream=self._beginning.is_chunked and self.parsed.stream)
        self._end(outcome.status, reason, refusal=outcome.label, broken=True)
        self._answer.finish(keep_alive=False)

    def _refuse(self, outcome: RequestOutcome, message: str, *, retry_after_s: int | None = None) -> None:
        if self._answer.is_open or self.attempts.is_answering:
            self._break_off(message, outcome)
            return
        keep_alive = self._answer.keeps_alive
        self._answer.refuse(outcome, message, close=not keep_alive, retry_after_s=retry_after_s)
        self._end(outcome.status, message, refusal=outcome.label)
        self._answer.finish(keep_alive=keep_alive)

    def abandon(self) -> None:
        """The client is gone: the engine's connection is closed at once. One that has the last event got its answer."""
        if self._ended:
            return
        if self._account.has_last_event:
            self._end_whole(self._beginning.status)
        else:
            outcome = RequestOutcome.CLIENT_GONE
            self._end(outcome.status, "the client closed the connection", refusal=outcome.label)

    def force_stop(self) -> None:
        """The gateway stops at once: a stream ends with an error event, an unanswered request with status 503."""
        if self.attempts.is_answering:
            self._break_off(FORCED_STOP, RequestOutcome.GATEWAY_ENDED)
        else:
            self._refuse(RequestOutcome.GATEWAY_ENDED, FORCED_STOP, retry_after_s=1)

    @property
    def _may_open(self) -> bool:
        """Whether the answer is a stream that has not begun, so that its head may go before."""
        cannot_open = self.attempts.is_answering or self.request.http10
        return self.parsed.stream and self.route.may_stream and not cannot_open

    def check(self, now_s: float, limits: Limits) -> None:
        """Ends it when neither the engine nor the client has moved anything for `idle_timeout_s`.

        An engine that makes steps moves. Before its answer has begun, a stream gets its head and comments, and a
        request goes to another engine where its own makes no steps.
        """
        if self._ended:
            return
        if self.attempts.is_late(now_s):
            self.reject(Rejection.DEADLINE)
            return
        if self._may_open:
            self._answer.keep_alive(self._beginning, limits.stream_head_after_s, now_s)
        if self._in_flight is None:
            return
        dispatcher, target = self._context.dispatcher, self._in_flight.target
        if self.attempts.is_answering:
            dispatcher.note_progress(target, self.last_s)
        elif self._upstream and self._retry_stalled(target, now_s):
            return
        if now_s - self.last_s >= limits.idle_timeout_s and (self._upstream or self._connecting is not None):
            self._end_silent(target, now_s, limits.idle_timeout_s)

    def _end_silent(self, target: Target, now_s: float, idle_timeout_s: float) -> None:
        """Ends it after a silence, unless its engine works and its client reads."""
        dispatcher = self._context.dispatcher
        if self._upstream and not self._paused and dispatcher.is_working(target, now_s, idle_timeout_s):
            return
        reason = f"nothing moved for {idle_timeout_s:g} s"
        self._drop_upstream()
        if self.attempts.is_answering:
            self._break_off(reason)
        else:
            if target in dispatcher.stalled:
                dispatcher.count_error(target, now_s)
            self._refuse(RequestOutcome.ENGINE_SILENT, reason)

    def _retry_stalled(self, target: Target, now_s: float) -> bool:
        """Sends it to another engine where its own makes no steps; returns False where it stays."""
        assert self._in_flight is not None
        dispatcher, attempts = self._context.dispatcher, self.attempts
        is_due = now_s - self._in_flight.sent_s > STALL_S and attempts.may_repeat
        if not is_due or not dispatcher.is_abandoned(target, stream=self.parsed.stream):
            return False
        if not dispatcher.has_other(self.job, target, attempts.failed_targets):
            return False
        self._drop_upstream()
        self._fail(ENGINE_STALLED, AttemptFailure.ENGINE_ERROR)
        return True

    # 5. Back-pressure, and the end.

    def pause(self) -> None:
        """The client reads more slowly than the engine writes: the engine's connection is not read."""
        self._paused = True
        if self._upstream is not None and self._upstream.transport is not None:
            self._upstream.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up: the engine's connection is read again."""
        self._paused = False
        self._answer.forget_gap()
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
        if self._user is not None:
            context.open_users.leave(self._user)
        context.dispatcher.unhold(self)
        if self._upstream is not None or self._connecting is not None:
            self._drop_upstream()
        if self._in_flight is not None:
            context.dispatcher.settle(self._in_flight, context.clock())
        context.stats.finish(self.route.label, status, refusal=refusal, broken=broken)
        context.on_end(self, status, reason)

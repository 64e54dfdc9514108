"""An exchange whose stream goes on at another engine when its own fails or drains.

It differs from any other exchange in one thing: what its engines send goes through a `Continuation`, which says what
the client gets, when an engine has failed, and how another one can go on. Such a stream has the budgets of any request
(`RequestAttempts`): an engine that fails while it computes the stream counts as an attempt. It goes on only at engines
that serve the same model as its first one did (`same_model.py`), which another one of that name need not be.
"""

import logging

import orjson
from moe_contract.gateway_config import Limits
from moe_scheduling.engine.attempts import MAX_ATTEMPTS, AttemptFailure
from moe_scheduling.engine.choice import Send
from moe_scheduling.signals import Target

from moe_gateway.continuation.resend import is_limited
from moe_gateway.continuation.stream import Continuation, StreamFailure
from moe_gateway.continuation.ways import Way, shows_parser
from moe_gateway.engines.failed_attempts import report_failure
from moe_gateway.engines.same_model import SameModel, identify_model
from moe_gateway.engines.target_states import STALL_S
from moe_gateway.http.bodies import Body
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.http.upstream import UpstreamConnection
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.exchange import ENGINE_STALLED
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.split_exchange import SplitExchange

# The label of streams that could go on and did not.
NOT_CONTINUED = "none"

log = logging.getLogger("moeserving.gateway")


class ContinuedExchange(SplitExchange):
    """See `Exchange`; the stream is that of `continuation`, which begins at one engine or at two."""

    __slots__ = ("_continuation", "_limited", "_same", "_way")

    def __init__(
        self,
        request: ClientRequest,
        route: Route,
        parsed: Parsed,
        client: ClientSide,
        context: ExchangeContext,
        continuation: Continuation,
    ) -> None:
        super().__init__(request, route, parsed, client, context)
        self._continuation = continuation
        self._way = ""
        self._answer.extra = continuation.header
        self._same: SameModel | None = None
        self._limited: bool | None = None

    @property
    def continued(self) -> str:
        """The way on, once its first engine has failed."""
        return self._way

    def _begin_attempt(self) -> tuple[bytes, Body]:
        url, body = self._continuation.start()
        if not self.attempts.is_answering:
            self._beginning = AnswerBeginning()
            assert self._in_flight is not None
            self._same = self._find_same(self._in_flight.target)
            self._answer.extra = b"" if self._same is None else self._continuation.header
        return url, self._body_of_phase(body)

    def _find_same(self, target: Target) -> SameModel | None:
        """The engines that serve the same as this one; None where it does not say what that is."""
        dispatcher, model = self._context.dispatcher, self.job.model
        identity = identify_model(dispatcher.engines.get(target.server), model)
        return None if identity is None else SameModel(lambda: dispatcher.engines, identity, model)

    # What the engine sends.

    def received(self, data: bytes, connection: UpstreamConnection) -> None:
        """Bytes of an engine's answer came."""
        if self._prefilling is not None:
            super().received(data, connection)
            return
        continuation, has_begun = self._continuation, self.attempts.is_answering
        was_resuming = continuation.is_resuming
        data = continuation.read(data, has_begun=has_begun, is_complete=connection.complete)
        if continuation.way is Way.PREFIX and self.route is Route.CHAT and shows_parser(data):
            # Its engine takes something out of the text, so that tokens and text do not correspond.
            continuation.way = Way.REPLAY
        if not has_begun:
            super().received(data, connection)
            if self._upstream is connection and continuation.failure is not None:
                self._leave(continuation.failure, connection)
            return
        self.last_s = self._context.clock()
        if was_resuming and not continuation.is_resuming and self._in_flight is not None:
            self._context.dispatcher.answer(self._in_flight, self.last_s, is_first_token=False)
            if continuation.response_id:
                self._account.note_response(continuation.response_id, self._in_flight)
        if data:
            self._account.watch(data, self._in_flight, self.last_s)
            self._answer.pass_on(data)
        if continuation.failure is not None:
            self._leave(continuation.failure, connection)
        elif connection.complete:
            self._finish(connection)

    def _finish(self, connection: UpstreamConnection) -> None:
        if (failure := self._continuation.failure) is not None:
            self._leave(failure, connection)
        else:
            super()._finish(connection)

    def _leave(self, failure: StreamFailure, connection: UpstreamConnection) -> None:
        """The engine's answer goes no further: another engine takes over, or the stream ends with an error."""
        self._drop_upstream()
        kind = failure.kind
        if kind is None and connection.status >= 500:
            kind = AttemptFailure.ENGINE_FULL if connection.status == 503 else AttemptFailure.ENGINE_ERROR
        if kind is None:
            self._break_off(failure.reason)
        else:
            self._fail(failure.reason, kind)

    # The way on.

    def _fail(self, reason: str, failure: AttemptFailure = AttemptFailure.BROKEN) -> None:
        ending = self._continuation.build_ending() if self.attempts.is_answering else None
        if ending is None:
            super()._fail(reason, failure)
            return
        # The engine failed after the last token, of which only the end of the stream was missing.
        assert self._in_flight is not None
        context = self._context
        report_failure(context.dispatcher, self._in_flight.target, failure, context.clock(), is_answering=True)
        self._answer.pass_on(ending)
        self._end(self._account.error_status or self._beginning.status)
        self._answer.finish(keep_alive=self._answer.keeps_alive)

    @property
    def _can_go_on(self) -> bool:
        return self.attempts.is_answering and self._same is not None and self._continuation.can_go_on

    def _retry(self) -> None:
        if not self.attempts.is_answering:
            super()._retry()
            return
        if not self._continuation.is_resuming:
            # Else the engine that failed now has sent nothing yet.
            self._prepare("its engine failed")
        self.begin()

    def _prepare(self, reason: str) -> None:
        """Chooses the way on, and records it."""
        continuation, same = self._continuation, self._same
        self._way = way = continuation.prepare(None if same is None else same.max_model_len).value
        # From now on only engines that serve the same model may get it.
        self.job = self.job._replace(prompt_tokens=continuation.context_tokens or self.job.prompt_tokens, servers=same)
        self._context.stats.continuations[way] += 1
        target = self.target
        log.info(
            "a stream goes on at another engine",
            extra={
                "request_id": self.request.request_id.decode(),
                "reason": reason,
                "way": way,
                "engine": None if target is None else target.server,
            },
        )

    @property
    def _goes_by_prefix(self) -> bool:
        """Whether another engine could go on from the tokens so far, so that nothing is computed anew."""
        if not self._can_go_on or not self._continuation.may_move:
            return False
        if self._limited is None:
            body = self.request.body
            self._limited = isinstance(body, bytes) and is_limited(self.route, orjson.loads(body))
        return self._limited or (self._same is not None and self._same.max_model_len is not None)

    def _break_off(self, reason: str, outcome: RequestOutcome = RequestOutcome.ENGINE_FAILED) -> None:
        if self.attempts.is_answering and outcome is not RequestOutcome.GATEWAY_ENDED:
            self._context.stats.continuations[NOT_CONTINUED] += 1
        super()._break_off(reason, outcome)

    # Time.

    def check(self, now_s: float, limits: Limits) -> None:
        """As for any exchange; a stream that has begun also leaves an engine that drains or makes no steps."""
        if not self._ended and self.attempts.is_answering and self._in_flight is not None:
            target = self._in_flight.target
            if self._continuation.is_resuming:
                self._answer.fill_pause(now_s)
                if self._upstream is not None and self._leave_hung(target, now_s):
                    return
            elif self._upstream is not None and self._move_on(target, now_s):
                return
        super().check(now_s, limits)

    def _leave_hung(self, target: Target, now_s: float) -> bool:
        """As for a request before its first token: leaves an engine that has sent nothing yet and makes no steps."""
        assert self._in_flight is not None
        if now_s - self._in_flight.sent_s <= STALL_S or not self._may_fail_over(target):
            return False
        self._drop_upstream()
        self._fail(ENGINE_STALLED, AttemptFailure.ENGINE_ERROR)
        return True

    def _move_on(self, target: Target, now_s: float) -> bool:
        """Sends the stream to another engine where that is better; returns False where it stays."""
        dispatcher = self._context.dispatcher
        engine = dispatcher.engines.get(target.server)
        if engine is not None and engine.is_draining:
            return self._move(target, now_s)
        if not self._may_fail_over(target) or not self._goes_by_prefix:
            return False
        self._drop_upstream()
        self._fail(ENGINE_STALLED, AttemptFailure.ENGINE_ERROR)
        return True

    def _may_fail_over(self, target: Target) -> bool:
        """Whether the stream may leave an engine that makes no steps for one that takes it at once."""
        dispatcher, attempts = self._context.dispatcher, self.attempts
        if not dispatcher.is_abandoned(target, stream=True) or attempts.count >= MAX_ATTEMPTS or not self._can_go_on:
            return False
        return dispatcher.has_other(self.job._replace(servers=self._same), target, attempts.failed_targets)

    def _move(self, target: Target, now_s: float) -> bool:
        """Moves the stream from an engine that drains to one that takes it at once."""
        context, dispatcher, continuation = self._context, self._context.dispatcher, self._continuation
        if not context.moves_left or dispatcher.held or not self._goes_by_prefix:
            return False
        choice = dispatcher.choose(self.job._replace(servers=self._same), now_s, {target})
        if type(choice) is not Send:
            return False
        assert self._in_flight is not None
        self._drop_upstream()
        context.moves_left -= 1
        continuation.moves += 1
        self.attempts.move(now_s)
        dispatcher.settle(self._in_flight, now_s)
        self._prepare("its engine drains")
        self.release(choice)
        return True

    def _end_silent(self, target: Target, now_s: float, idle_timeout_s: float) -> None:
        is_working = self._context.dispatcher.is_working(target, now_s, idle_timeout_s)
        if not self.attempts.is_answering or self._paused or is_working or not self._can_go_on:
            super()._end_silent(target, now_s, idle_timeout_s)
            return
        self._drop_upstream()
        self._fail(f"nothing moved for {idle_timeout_s:g} s", AttemptFailure.ENGINE_ERROR)

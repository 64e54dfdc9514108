"""One request of a proxy, from its whole arrival to the end of its answer, as the dispatcher sees it.

Made by a `Stream`, which reports what passes. It counts as in flight at its engine from the pick to `end`, which is
reached once. What its answer shows of the engine is read as for the gateway's own clients.
"""

import asyncio
from dataclasses import dataclass

from moe_contract import engine_death
from moe_contract.gateway_config import EngineAddress
from moe_scheduling.engine.attempts import RequestAttempts
from moe_scheduling.engine.choice import Job, Send, SendReason, explain
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.signals import Target

from moe_gateway.access.priorities import build_engine_id
from moe_gateway.endpoint_picker.answer_head import AnswerHead, ProxyFault, find_fault
from moe_gateway.engines.engine_death import says_engine_is_dead
from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.request.answer_account import AnswerAccount
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext, find_tenant
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.stream_events import AnswerPart, part_of_status

CLIENT_LEFT = "the client or the proxy ended the request"
NO_CONNECTION = "the proxy got no answer from the engine"
ENGINE_ERROR = "the engine answered with an error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Where a request goes.

    Attributes:
        endpoints: `IP:PORT`, the first choice first.
        rank: data-parallel rank at the first choice; None where it has but one.
        request_id: for the engine.
        engine: the first choice.
    """

    endpoints: tuple[str, ...]
    rank: int | None
    request_id: bytes
    engine: EngineAddress


class NobodyReads:
    """A `ClientSide` for answers that a proxy passes on by itself."""

    def write(self, data: bytes) -> None:
        """Drops more of the answer."""

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is over, which nobody here waits for."""


class PickedRequest:
    """A request that a proxy sends to the picked engine; it is a `Waiter` of the dispatcher.

    Args:
        request: with its whole body.
        route: of the request.
        parsed: its body.
        client: counts what passes of the answer.
        context: the gateway's parts.
        servers: names of the engines that may be picked; None: all.

    Attributes:
        decided: the choice, or why there is none.
        is_silent: it was ended by the idle timeout.
    """

    def __init__(
        self,
        request: ClientRequest,
        route: Route,
        parsed: Parsed,
        client: ClientSide,
        context: ExchangeContext,
        servers: frozenset[str] | None,
    ) -> None:
        dispatcher = context.dispatcher
        self.request = request
        self.route = route
        self.parsed = parsed
        self.attempts = RequestAttempts(dispatcher.hold_timeout_s, request.arrived_s, request.deadline_s)
        self.decided: asyncio.Future[Send | Rejection] = asyncio.get_running_loop().create_future()
        self._client = client
        self._context = context
        self._session = session = request.session
        self._user = parsed.user if session is None else None
        if self._user is not None and context.open_users.enter(self._user):
            self._session = session = self._user
        self._is_fair = dispatcher.request_settings.is_fair
        tenant = find_tenant(request, context.tenant_header) if self._is_fair else ANONYMOUS_TENANT
        job, self._keys = dispatcher.build_job(parsed, session, tenant)
        self.job: Job = job if servers is None else job._replace(servers=servers)
        self._account = AnswerAccount(route, request, context)
        # The proxy says which part of an answer is the last.
        self._beginning = AnswerBeginning(shows_end=True)
        self._last_s = request.arrived_s
        self._in_flight: InFlightRequest | None = None
        # Status of an answer whose body does not pass here: it is over when the proxy ends the request.
        self._shown_status = 0
        self.is_silent = False
        # An answer of the proxy's own whose text is awaited.
        self._proxys_own: AnswerHead | None = None
        self._ended = False
        if self.computes:
            context.stats.arrive(self.job.prompt_tokens, request.arrived_s)

    @property
    def computes(self) -> bool:
        """Whether an engine has to compute for it; a list of models costs an engine nothing."""
        return self.route.has_job

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
        """Empty: the proxy sends a request that has begun to no other engine."""
        return ""

    # 1. Choose.

    def begin(self) -> None:
        """Picks an engine, holds the request, or rejects it; `decided` says which."""
        admission = self._context.dispatcher.admit(self, self._context.clock())
        if type(admission) is Send:
            self.release(admission)
        elif isinstance(admission, Rejection):
            self.reject(admission)

    def release(self, decision: Send) -> None:
        """It goes to this target, and counts as in flight there from now on."""
        now_s = self._context.clock()
        self._context.recent.attempt(self, decision, self._context.dispatcher, now_s)
        self._send(decision, now_s)
        self.decided.set_result(decision)

    def _send(self, decision: Send, now_s: float) -> None:
        self._in_flight = self._context.dispatcher.send(self.job, self._keys, self._session, decision, now_s)
        self.attempts.begin()
        self.attempts.receive()

    def reject(self, rejection: Rejection) -> None:
        """No engine takes it; the stream answers with an error."""
        if not self.decided.done():
            self.decided.set_result(rejection)

    def describe(self, decision: Send, fallbacks: int) -> Pick | None:
        """The pick for the proxy; None where its engine has gone.

        Args:
            decision: the choice.
            fallbacks: further engines that are named at most, those with the least predicted time first.
        """
        engines, target = self._context.dispatcher.engines, decision.target
        if (engine := engines.get(target.server)) is None:
            return None
        others = self._find_others(target, fallbacks) if fallbacks else ()
        servers = [target.server, *others]
        return Pick(
            endpoints=tuple(endpoint_of(engines[server].address) for server in servers if server in engines),
            rank=target.rank if engine.address.ranks > 1 else None,
            request_id=build_engine_id(self.request, self.job.tenant, self.job.priority, is_fair=self._is_fair),
            engine=engine.address,
        )

    def _find_others(self, target: Target, most: int) -> list[str]:
        dispatcher = self._context.dispatcher
        engines = dispatcher.engines
        # The header with the rank goes to whichever answers.
        ranks = target.rank + 1 if engines[target.server].address.ranks > 1 else 1
        takers = [state for state in dispatcher.takers(self.job) if state.target.server != target.server]
        states = [state for state in takers if engines[state.target.server].address.ranks >= ranks]
        if not states:
            return []
        rows = explain(self.job, states, dispatcher.settings, now_s=self._context.clock())
        rows.sort(key=lambda row: row.predicted_s)
        return list(dict.fromkeys(row.target.server for row in rows))[:most]

    # 2. The answer.

    def answer_begins(self, head: AnswerHead, *, shows_body: bool) -> None:
        """The head of the answer passes.

        Args:
            head: of the answer.
            shows_body: the body of the answer will pass too.
        """
        self._last_s = self._context.clock()
        status = head.status
        lines = (status, head.content_type, engine_death.NAME, head.engine)
        encoding = b"content-encoding: %b\r\n" % head.content_encoding if head.content_encoding else b""
        self._beginning.received = b"HTTP/1.1 %d \r\ncontent-type: %b\r\n%b: %b\r\n%b\r\n" % (*lines, encoding)
        self._beginning.status = status
        if self._in_flight is None:
            return
        if head.served:
            self._follow(head)
        if head.is_proxys_own:
            self._proxys_own = head
            self._shown_status = status
            if head.details or head.is_overloaded or not shows_body:
                self._end_by_proxy(head, head.fault)
        elif not shows_body:
            self._account.count(part_of_status(status), self._beginning, self._in_flight, self._last_s)
            self._shown_status = status

    def _follow(self, head: AnswerHead) -> None:
        """Counts it at the engine that has answered, where the proxy has taken another one than the first."""
        assert self._in_flight is not None
        dispatcher, first = self._context.dispatcher, self._in_flight.target
        engines = dispatcher.engines.values()
        server = next((row.address.name for row in engines if endpoint_of(row.address) == head.served), None)
        if server is None or server == first.server:
            return
        if head.attempts > 1:
            # Otherwise the proxy has not tried the first one: it may not know it yet.
            dispatcher.count_error(first, self._last_s)
            self._context.stats.retry()
        dispatcher.settle(self._in_flight, self._last_s)
        target = Target(server, min(first.rank, dispatcher.engines[server].address.ranks - 1))
        self._send(Send(target, self._in_flight.predicted_s, SendReason.LEAST_PREDICTED), self._last_s)

    def _end_by_proxy(self, head: AnswerHead, fault: ProxyFault) -> None:
        """The answer is the proxy's own. It says something of the engine only where it names the fault."""
        assert self._in_flight is not None
        dispatcher, target = self._context.dispatcher, self._in_flight.target
        if head.status == 504:
            if target in dispatcher.stalled:
                dispatcher.count_error(target, self._last_s)
        elif fault is ProxyFault.NOT_CONNECTED:
            engine = dispatcher.engines.get(target.server)
            # Requests that were sent before an ejection do not prolong it.
            if engine is not None and self._in_flight.sent_s >= engine.ejected_until_s:
                dispatcher.fail(target, self._last_s)
        elif fault is ProxyFault.CUT_OFF:
            dispatcher.count_error(target, self._last_s)
        self.end(head.status, NO_CONNECTION)

    def answer_passes(self, data: bytes, *, complete: bool) -> None:
        """A part of the answer's body passes; `complete`: it is the last one."""
        if self._ended or self._in_flight is None or not self._beginning.received:
            return
        self._last_s = self._context.clock()
        if self._proxys_own is not None:
            self._end_by_proxy(self._proxys_own, find_fault(data))
            return
        self._client.write(data)
        if self.attempts.is_answering:
            self._account.watch(data, self._in_flight, self._last_s)
        else:
            self._read_beginning(data, complete=complete)
        if complete:
            self._finish()

    def _read_beginning(self, data: bytes, *, complete: bool) -> None:
        assert self._in_flight is not None
        beginning, dispatcher = self._beginning, self._context.dispatcher
        beginning.received += data
        part = beginning.read(data, beginning.status, computes=self.computes, complete=complete)
        if part is AnswerPart.PENDING:
            return
        self.attempts.is_answering = True
        target = self._in_flight.target
        is_death = beginning.status == 500 or (beginning.is_events and part is AnswerPart.ENGINE_ERROR)
        if beginning.status == 503:
            dispatcher.pause_full(target, self._last_s)
        elif is_death and says_engine_is_dead(beginning.head + beginning.body):
            dispatcher.fail(target, self._last_s, dead=True)
        elif beginning.status == 500 and not dispatcher.is_accepting(target):
            dispatcher.fail(target, self._last_s)
        else:
            self._account.count(part, beginning, self._in_flight, self._last_s)
        if beginning.is_events:
            self._account.begin(beginning, self._in_flight, self._last_s)

    def _finish(self) -> None:
        """The last part of the answer has passed."""
        assert self._in_flight is not None
        self._account.sample_tokenisation(self.parsed, self._beginning)
        if self._account.has_answer:
            self._context.dispatcher.complete(self._in_flight, self._last_s)
        error_status = self._account.error_status
        self.end(error_status or self._beginning.status, ENGINE_ERROR if error_status >= 500 else "")

    # 3. The end.

    def leave(self) -> None:
        """The proxy has ended the stream: unless the last event of the answer had passed, the client has left."""
        if self._shown_status:
            self.end(self._shown_status)
        if not self._ended and self._account.has_last_event:
            self._finish()
        if not self._ended:
            outcome = RequestOutcome.CLIENT_GONE
            self.end(outcome.status, CLIENT_LEFT, refusal=outcome.label)

    def check(self, now_s: float, idle_timeout_s: float) -> bool:
        """Rejects a held request that is late, and ends one that is silent; returns whether it has just become so."""
        if not self.decided.done() and self.attempts.is_late(now_s):
            self._context.dispatcher.unhold(self)
            self.reject(Rejection.DEADLINE)
        if self._ended or self._in_flight is None:
            return False
        dispatcher, target = self._context.dispatcher, self._in_flight.target
        if self.attempts.is_answering:
            dispatcher.note_progress(target, self._last_s)
        # Of an answer whose body does not pass here nobody knows whether it moves.
        since_s = max(self._last_s, self._in_flight.sent_s)
        if self._shown_status or now_s - since_s < idle_timeout_s:
            return False
        if dispatcher.is_working(target, now_s, idle_timeout_s):
            return False
        if not self.attempts.is_answering and target in dispatcher.stalled:
            dispatcher.count_error(target, now_s)
        self.is_silent = True
        outcome = RequestOutcome.ENGINE_SILENT
        self.end(outcome.status, f"nothing moved for {idle_timeout_s:g} s", refusal=outcome.label)
        return True

    def end(self, status: int, reason: str = "", *, refusal: str = "") -> None:
        """It is over; a second call changes nothing.

        Args:
            status: of the answer.
            reason: what went wrong; empty: nothing.
            refusal: label of the outcome where no engine has answered.
        """
        if self._ended:
            return
        self._ended = True
        context = self._context
        if self._user is not None:
            context.open_users.leave(self._user)
        context.dispatcher.unhold(self)
        self.decided.cancel()
        if self._in_flight is not None:
            context.dispatcher.settle(self._in_flight, context.clock())
        context.stats.finish(self.route.label, status, refusal=refusal)
        context.on_end(self, status, reason)


def endpoint_of(address: EngineAddress) -> str:
    """The address of an engine as `IP:PORT`, an IPv6 address in brackets; port 80 where it names none."""
    authority = address.url.partition("://")[2].rstrip("/").lower()
    return authority if authority.rpartition("]")[2].count(":") else f"{authority}:80"

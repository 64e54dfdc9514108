"""One connection of a client: requests in, in their order, one answered at a time.

`RequestReader` makes requests of its bytes; this class answers them, or has an `Exchange` answer them, and ends what
takes too long. A bad message is answered with an OpenAI-shaped error, and the connection ends.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

from moe_contract.gateway_config import Limits

from moe_gateway.access.deadlines import read_deadline
from moe_gateway.access.denials import ANTHROPIC_PATH, Denial, build_denial
from moe_gateway.access.priorities import read_priority
from moe_gateway.engines.served_models import find_model, list_models, model_row
from moe_gateway.http.bodies import BodyRefused
from moe_gateway.http.cors import insert_lines, is_preflight
from moe_gateway.http.early_refusal import look_at_head
from moe_gateway.http.replies import RequestOutcome, build_error, build_health, build_models, build_preflight
from moe_gateway.http.request_reader import RequestReader
from moe_gateway.http.routes import Route, find_route, read_model_name, strip_authority
from moe_gateway.http.unread import has_unread
from moe_gateway.request.body_reader import needs_reader
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.exchange import Exchange
from moe_gateway.request.exchanges import make_exchange
from moe_gateway.request.parsing import BadBody, Parsed
from moe_gateway.request.pending_body import PendingBody
from moe_gateway.request.pending_request import is_unknown, needs_search, read_pending
from moe_gateway.request.reading import read_request
from moe_gateway.request.rejections import explain_lost_response, explain_unknown_model

# After a refusal the rest of what the client sends is read and thrown away for this long: closing at once would reset
# the connection, and the client might lose the answer that says why.
LINGER_S = 2.0
# When the gateway drains, an idle connection stays for this long: a request that is on its way there is still answered,
# with the notice that the connection ends.
NOTICE_S = 1.0
# The metric label of requests whose route is not known.
OTHER = "other"

_NEVER = math.inf

log = logging.getLogger("moeserving.gateway")

# A look-up of a member in its enum costs a fifth of a microsecond in Python 3.11.
_HEALTH, _MODEL, _MODELS = Route.HEALTH, Route.MODEL, Route.MODELS


class ClientConnection(asyncio.Protocol):
    """The protocol of one client's connection; it is the `ReaderOwner` of its reader and an exchange's `ClientSide`.

    Args:
        context: the gateway's parts.
        limits: of sizes and times.
        new_request_id: names a request that has no usable id of its own.
        on_open: called once the connection is open, with TLS after its handshake.
        on_close: called once the connection has ended.
    """

    __slots__ = (
        "_context",
        "_deadline_s",
        "_drops_body",
        "_exchange",
        "_is_lingering",
        "_is_reading_paused",
        "_is_writing_paused",
        "_limits",
        "_linger_end_s",
        "_new_request_id",
        "_on_close",
        "_on_open",
        "_reader",
        "transport",
    )

    def __init__(
        self,
        context: ExchangeContext,
        limits: Limits,
        new_request_id: Callable[[], bytes],
        on_open: Callable[["ClientConnection"], None],
        on_close: Callable[["ClientConnection"], None],
    ) -> None:
        self._context = context
        self._limits = limits
        self._on_open = on_open
        self._on_close = on_close
        self._new_request_id = new_request_id
        self.transport: Any = None
        self._reader = RequestReader(self, limits, new_request_id, context.clock, context.rare_headers)
        self._exchange: Exchange | PendingBody | None = None
        self._is_lingering = False
        self._drops_body = False
        self._linger_end_s = math.inf
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._deadline_s = _NEVER

    @property
    def idle(self) -> bool:
        """Whether no request is under way, not even a part of one."""
        return self._exchange is None and not self._reader.requests and not self._reader.is_within_message

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._on_open(self)
        self.expect_within(self._limits.header_timeout_s)
        if self._context.draining:
            self.drain()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if self._is_lingering or reader.refusal is not None:
            self._prolong_linger()
            return
        reader.feed(data)
        if self._exchange is None:
            self._serve_next()
        if reader.requests or (self._is_writing_paused and self._exchange is None):
            # Pipelined requests wait unread; otherwise reading goes on, since an unread connection hides its end.
            self._is_reading_paused = True
            self.transport.pause_reading()

    def _prolong_linger(self) -> None:
        """Bytes thrown away after a refusal give the client more time to see the answer, but not without end."""
        if self._linger_end_s < math.inf:
            self._deadline_s = min(self._linger_end_s, self._context.clock() + LINGER_S)

    def eof_received(self) -> bool:
        """The client sends no more: within a request that is an error, otherwise it is gone."""
        reader = self._reader
        if self._exchange is None and not reader.requests and not self._is_lingering and reader.is_within_message:
            reader.refuse(RequestOutcome.BAD_REQUEST, "the request ended before it was whole")
            self._refuse_connection()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._reader.requests.clear()
        if exchange is not None:
            exchange.abandon()
        self._on_close(self)

    def pause_writing(self) -> None:
        self._is_writing_paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._is_reading_paused and not self._reader.requests:
            self._resume_reading()

    # What the reader calls.

    def expect_within(self, seconds: float) -> None:
        self._deadline_s = self._context.clock() + seconds

    def expect_nothing(self) -> None:
        self._deadline_s = _NEVER

    # One request after the other.

    def _serve_next(self) -> None:
        reader = self._reader
        while self._exchange is None and reader.requests and not self._is_lingering:
            self._serve(reader.requests.popleft())
        if reader.requests or self._is_lingering:
            return
        if self._exchange is not None:
            if self._is_reading_paused:
                self._resume_reading()
        elif reader.refusal is not None:
            self._refuse_connection()
        elif not reader.has_open_head or self._pass_head(*reader.take_head()):
            if self.idle:
                self.expect_within(NOTICE_S if self._context.draining else self._limits.idle_timeout_s)
            if self._is_reading_paused and not self._is_writing_paused:
                self._resume_reading()

    def _resume_reading(self) -> None:
        self._is_reading_paused = False
        self.transport.resume_reading()

    def _pass_head(self, request: ClientRequest, expects: bool) -> bool:
        """Lets a request's body come; returns False where its head is refused, and its body will be thrown away."""
        request.keep_alive, self._drops_body = False, True
        route = self._find_route(request)
        if route is None:
            return False
        if (denial := look_at_head(request, route, self._context.gate)) is not None:
            self._deny(request, route, denial)
            return False
        self._drops_body = False
        if expects:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _find_route(self, request: ClientRequest) -> Route | None:
        """The route of a request whose caller may ask for it; None: it has got its answer."""
        if request.url[:1] != b"/":
            request.url = strip_authority(request.url)
        route = find_route(request.url)
        if route is None:
            self._reply_error(request, None, RequestOutcome.NOT_FOUND, "no such path here")
        elif request.method != route.method and not (route is _HEALTH and request.method == b"HEAD"):
            self._serve_other_method(request, route)
        elif route is _HEALTH or (gate := self._context.gate) is None or (denial := gate.identify(request)) is None:
            return route
        else:
            self._deny(request, route, denial)
        return None

    def _serve(self, request: ClientRequest) -> None:
        route = self._find_route(request)
        if route is None:
            return
        if route is _HEALTH:
            self._serve_health(request)
        elif route is _MODEL:
            self._serve_model(request)
        elif route is _MODELS and (models := self._list_models()) is not None:
            close = not self._keeps(request)
            self._reply(request, route, 200, build_models(models, request.request_id, close=close))
        else:
            self._dispatch(request, route)

    def _serve_other_method(self, request: ClientRequest, route: Route) -> None:
        if is_preflight(request.method, request.headers):
            self._serve_preflight(request, route)
        else:
            message = f"this path takes {route.method.decode()} alone"
            self._reply_error(request, route, RequestOutcome.METHOD_NOT_ALLOWED, message)

    def _serve_preflight(self, request: ClientRequest, route: Route) -> None:
        if lines := self._context.cors.preflight_lines(request.headers):
            answer = build_preflight(request.request_id, lines, close=not self._keeps(request))
            self._reply(request, route, 200, answer)
        else:
            self._reply_error(request, route, RequestOutcome.BAD_REQUEST, "this origin is not allowed")

    def _deny(self, request: ClientRequest, route: Route, denial: Denial) -> None:
        answer = build_denial(request, denial, close=not self._keeps(request))
        self._reply(request, route, denial.outcome.status, answer, denial.outcome.label)

    def _list_models(self) -> object | None:
        """The list of models where no engine alone has it: while none is there, or where they serve different names."""
        dispatcher, model = self._context.dispatcher, self._context.model
        engines, is_away = dispatcher.engines.values(), not dispatcher.accepting
        if dispatcher.partial_models or (is_away and any(engine.models for engine in engines)):
            return list_models(engines)
        return {"object": "list", "data": [model_row(model)]} if is_away and model else None

    def _serve_model(self, request: ClientRequest) -> None:
        name, dispatcher = read_model_name(request.url), self._context.dispatcher
        row = find_model(name, dispatcher.engines.values(), dispatcher.models)
        if row is None:
            self._reply_unknown_model(request, Route.MODEL, name)
        else:
            self._reply(
                request, Route.MODEL, 200, build_models(row, request.request_id, close=not self._keeps(request))
            )

    def _reply_unknown_model(self, request: ClientRequest, route: Route, name: str) -> None:
        message = explain_unknown_model(name, self._context.dispatcher.models)
        self._reply_error(request, route, RequestOutcome.MODEL_NOT_FOUND, message, param="model")

    def _serve_health(self, request: ClientRequest) -> None:
        if self._context.dispatcher.accepting and not self._context.draining:
            head_only = request.method == b"HEAD"
            answer = build_health(request.request_id, close=not self._keeps(request), head_only=head_only)
            self._reply(request, Route.HEALTH, 200, answer)
        else:
            self._reply_error(
                request, Route.HEALTH, RequestOutcome.NO_ENGINE, "no engine accepts requests", retry_after_s=1
            )

    def _dispatch(self, request: ClientRequest, route: Route) -> None:
        try:
            if not request.is_plain:
                read_deadline(request)
            parsed = None if route.method == b"POST" and needs_reader(request) else read_request(route, request)
        except BadBody as error:
            self._reply_error(request, route, RequestOutcome.BAD_REQUEST, str(error), param=error.param)
            return
        if parsed is None or (parsed.previous_response is not None and needs_search(self._context, request, parsed)):
            self._begin_reading(request, route, parsed)
        else:
            self._dispatch_parsed(request, route, parsed)

    def _begin_reading(self, request: ClientRequest, route: Route, parsed: Parsed | None) -> None:
        if (gate := self._context.gate) is not None and (denial := gate.reserve(request)) is not None:
            self._deny(request, route, denial)
            return
        self._exchange = pending = PendingBody(
            lambda outcome, message: self._refuse_pending(request, route, outcome, message), request.deadline_s, parsed
        )
        reading = self._context.spawn(self._read_body(pending, request, route))
        if request.place is not None:
            reading.add_done_callback(request.place.free)

    async def _read_body(self, pending: PendingBody, request: ClientRequest, route: Route) -> None:
        """Reads what takes a while, then goes on as for every other request; a failure ends its wait."""
        try:
            await self._read_and_dispatch(pending, request, route)
        except Exception:
            log.exception("a body was not read", extra={"request_id": request.request_id.decode()})
            request.keep_alive = False
            if self._exchange is pending:
                pending.fail()
            elif not pending.is_over:
                self.transport.abort()

    async def _read_and_dispatch(self, pending: PendingBody, request: ClientRequest, route: Route) -> None:
        refused: BadBody | BodyRefused | None = None
        try:
            parsed = await read_pending(pending, request, route, self._context, self._limits.max_body_bytes)
        except (BadBody, BodyRefused) as error:
            refused = error
        if pending.is_over:
            return
        self._exchange = None
        if isinstance(refused, BodyRefused):
            self._reply_error(request, route, refused.outcome, str(refused), retry_after_s=refused.retry_after_s)
        elif refused is not None:
            self._reply_error(request, route, RequestOutcome.BAD_REQUEST, str(refused), param=refused.param)
        else:
            self._dispatch_parsed(request, route, parsed, may_ask=False)
        self._serve_next()

    def _refuse_pending(self, request: ClientRequest, route: Route, outcome: RequestOutcome, message: str) -> None:
        self._exchange = None
        retry_after_s = 1 if outcome is RequestOutcome.GATEWAY_ENDED else None
        self._reply_error(request, route, outcome, message, retry_after_s=retry_after_s)
        if outcome is not RequestOutcome.GATEWAY_ENDED:
            self._serve_next()

    def _dispatch_parsed(self, request: ClientRequest, route: Route, parsed: Parsed, *, may_ask: bool = True) -> None:
        if not request.is_plain:
            parsed = read_priority(request, route, parsed)
        if parsed.model is not None and is_unknown(self._context, parsed):
            if may_ask and (names := self._context.names) is not None and names.may_help:
                self._begin_reading(request, route, parsed)
            else:
                self._reply_unknown_model(request, route, parsed.model)
            return
        gate, previous = self._context.gate, parsed.previous_response
        owner = None if request.caller is None else request.caller.name
        if previous is not None and self._context.dispatcher.is_lost(previous, owner):
            message = explain_lost_response(previous)
            param = "response_id" if route.names_response else "previous_response_id"
            self._reply_error(request, route, RequestOutcome.RESPONSE_NOT_FOUND, message, param=param)
            return
        client: ClientSide = self
        if gate is not None and route is not _MODELS:
            tokens = self._context.dispatcher.count_tokens(parsed)
            admitted = gate.admit(request, route, parsed, self, tokens)
            if isinstance(admitted, Denial):
                self._deny(request, route, admitted)
                return
            parsed, client = admitted
        if self._context.tracer is not None:
            self._context.tracer.begin(request, route, self._context.clock())
        self._exchange = exchange = make_exchange(request, route, parsed, client, self._context)
        if self._is_writing_paused:
            exchange.pause()
        exchange.begin()

    # What an exchange calls.

    def write(self, data: bytes) -> None:
        """Writes more of the answer."""
        self.transport.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is over: the next request, or the end of the connection."""
        self._exchange = None
        if not keep_alive:
            self._close()
            return
        if self._deadline_s < _NEVER:
            # The next request had begun to arrive behind this one; its time begins now.
            limits = self._limits
            self.expect_within(limits.header_timeout_s if self._reader.in_head else limits.body_timeout_s)
        self._serve_next()

    # The gateway's own answers.

    def _keeps(self, request: ClientRequest) -> bool:
        return request.keep_alive and not self._context.draining

    def _reply(self, request: ClientRequest, route: Route, status: int, answer: bytes, refusal: str = "") -> None:
        if not is_preflight(request.method, request.headers):
            answer = insert_lines(answer, self._context.cors.answer_lines(request.headers))
        self.transport.write(answer)
        self._context.stats.finish(route.label, status, refusal=refusal)
        if not self._keeps(request):
            self._close()

    def _reply_error(
        self,
        request: ClientRequest,
        route: Route | None,
        outcome: RequestOutcome,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        answer = build_error(
            outcome,
            message,
            request_id=request.request_id,
            param=param,
            close=not self._keeps(request),
            retry_after_s=retry_after_s,
            head_only=request.method == b"HEAD",
            allow=route.method if outcome is RequestOutcome.METHOD_NOT_ALLOWED and route is not None else None,
            is_anthropic=request.url.startswith(ANTHROPIC_PATH),
        )
        self.transport.write(insert_lines(answer, self._context.cors.answer_lines(request.headers)))
        self._context.stats.finish(OTHER if route is None else route.label, outcome.status, refusal=outcome.label)
        if not self._keeps(request):
            self._close()

    def _refuse_connection(self) -> None:
        """Answers bytes that are no request, and ends the connection once the client has had time to read it."""
        assert self._reader.refusal is not None
        outcome, message = self._reader.refusal
        is_anthropic = self._reader.url.startswith(ANTHROPIC_PATH)
        if not self.transport.is_closing():
            request_id, lines = self._new_request_id(), self._context.cors.answer_lines(self._reader.headers)
            answer = build_error(outcome, message, request_id=request_id, close=True, is_anthropic=is_anthropic)
            self.transport.write(insert_lines(answer, lines))
            self._context.stats.finish(OTHER, outcome.status, refusal=outcome.label)
        self._linger()

    def _linger(self) -> None:
        """Ends the connection once the client has had time to read its answer; what it sends is thrown away."""
        self._is_lingering = True
        now_s = self._context.clock()
        self._deadline_s, self._linger_end_s = now_s + LINGER_S, now_s + self._limits.body_timeout_s
        self._reader.drop_message()
        if self.transport.is_closing():
            return
        if self._is_reading_paused:
            self._resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _close(self) -> None:
        if self._drops_body and not self._is_lingering:
            self._linger()
            return
        # A client that does not read the rest of its answer is waited for as long as one that reads no stream.
        self._is_lingering = True
        self.expect_within(self._limits.idle_timeout_s)
        self._reader.requests.clear()
        self.transport.close()

    # What the gateway calls.

    def check(self, now_s: float) -> None:
        """Ends what took too long; called several times a second."""
        if self._exchange is not None:
            self._exchange.check(now_s, self._limits)
        elif now_s >= self._deadline_s:
            if self._is_lingering:
                self.transport.abort()
            elif self.idle:
                if self._is_reading_paused or not has_unread(self.transport):
                    self._close()
            else:
                what = "head" if self._reader.in_head else "body"
                self._reader.refuse(RequestOutcome.REQUEST_TIMEOUT, f"the {what} of the request did not arrive in time")
                self._refuse_connection()

    def drain(self) -> None:
        """The gateway stops: idle connections end in a moment, the others after their answer."""
        if self.idle:
            self._deadline_s = min(self._deadline_s, self._context.clock() + NOTICE_S)

    def force_stop(self) -> None:
        """The gateway stops at once: an unfinished answer ends with an error where that is still possible."""
        if self._exchange is not None:
            self._exchange.force_stop()
        if self.transport is not None:
            self._close()

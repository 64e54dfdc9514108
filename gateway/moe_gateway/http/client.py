"""One connection of a client: requests in, in their order, one answered at a time.

Parsing is httptools' (llhttp), which refuses what smuggling lives on. What is bad is answered with an OpenAI-shaped
error and the connection ends, because after a bad message nothing on it can be believed.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
from moe_contract.gateway_config import Limits

from moe_gateway.http.heads import HOP_BY_HOP
from moe_gateway.http.replies import Outcome, build_error, build_health, build_models
from moe_gateway.http.routes import Route, find_route
from moe_gateway.http.shortcut import LONGEST_HEAD_BYTES, REQUEST_ID, read_usual_request
from moe_gateway.request.exchange import ClientRequest, Exchange, ExchangeContext
from moe_gateway.request.parsing import BadBody, Parsed, parse_body

# After a refusal the rest of what the client sends is read and thrown away for so long: closing at once would reset the
# connection, and the client might lose the answer that says why.
LINGER_S = 2.0
# When the gateway drains, an idle connection stays for so long: a request that is on its way there is still answered,
# and its client told to open another connection.
NOTICE_S = 1.0


class ClientConnection(asyncio.Protocol):
    """See the module."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_chunk_bytes",
        "_connection_tokens",
        "_deadline",
        "_deaf",
        "_exchange",
        "_expects",
        "_head_bytes",
        "_headers",
        "_held_back",
        "_hop_by_hop",
        "_in_head",
        "_limits",
        "_linger_end",
        "_lingering",
        "_new_request_id",
        "_on_close",
        "_parser",
        "_refusal",
        "_request_id",
        "_requests",
        "_session",
        "_surroundings",
        "_url",
        "_write_paused",
        "transport",
    )

    def __init__(
        self,
        surroundings: ExchangeContext,
        limits: Limits,
        new_request_id: Callable[[], bytes],
        on_close: Callable[["ClientConnection"], None],
    ) -> None:
        self._surroundings = surroundings
        self._limits = limits
        self._on_close = on_close
        self._new_request_id = new_request_id
        self.transport: Any = None
        self._parser = httptools.HttpRequestParser(self)
        self._requests: deque[ClientRequest] = deque()
        self._exchange: Exchange | None = None
        self._refusal: tuple[Outcome, str] | None = None
        self._lingering = False
        self._linger_end = math.inf
        self._deaf = False
        self._held_back = False
        self._write_paused = False
        self._deadline = math.inf
        self._chunk_bytes = 0
        self._start_message()
        self._in_head = False

    def _start_message(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._hop_by_hop: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._in_head = True
        self._expects = False
        self._connection_tokens = b""
        self._request_id = b""
        self._session: str | None = None

    @property
    def idle(self) -> bool:
        """No request is under way, not even in part."""
        return self._exchange is None and not self._requests and not self._in_head and not self._body and not self._url

    # What the event loop does.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._deadline = self._surroundings.clock() + self._limits.header_timeout_s
        if self._surroundings.draining:
            self.drain()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._hear_nothing()
            return
        if not (self._url or self._in_head or self._requests or self._write_paused) and self._exchange is None:
            usual = read_usual_request(data)
            if usual is not None and len(data) <= self._limits.max_body_bytes:
                self._take_usual(*usual)
                return
        self._chunk_bytes = len(data)
        self._head_bytes += len(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(Outcome.BAD_REQUEST, f"not a valid HTTP request: {error}")
        if self._head_bytes > LONGEST_HEAD_BYTES:
            self._refuse(*_HEAD_TOO_LARGE)
        if self._exchange is None:
            self._next()
        if self._requests or (self._write_paused and self._exchange is None):
            # Only what is pipelined waits unread: on a connection that is not read, nobody sees the client go away.
            self._held_back = True
            self.transport.pause_reading()

    def _take_usual(self, url: bytes, headers: bytes, body: bytes, request_id: bytes, session: str | None) -> None:
        self._deadline = math.inf
        request_id = request_id or self._new_request_id()
        now_s = self._surroundings.clock()
        self._serve(ClientRequest(b"POST", url, headers, body, request_id, session, True, False, now_s))
        if self._exchange is None:
            self._next()

    def _hear_nothing(self) -> None:
        """What is thrown away after a refusal gives the client more time to see the answer, but not without end."""
        if self._linger_end < math.inf:
            self._deadline = min(self._linger_end, self._surroundings.clock() + LINGER_S)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Ignores the offer of another protocol, which the parser takes for a change of it: it gets the head again.

        Java's HTTP client makes that offer with its first request on each connection.
        """
        offered = self._requests.pop() if self._requests else None
        if self._refusal is not None or offered is None or offered.method == b"CONNECT":
            self._refuse(Outcome.BAD_REQUEST, "the gateway speaks HTTP/1.1 alone")
            return
        fields = [*self._headers, *(field for field in self._hop_by_hop if field[0] not in _OFFER)]
        lines = [b"%b %b HTTP/1.%d" % (offered.method, offered.url, not offered.http10)]
        lines += [b"%b: %b" % field for field in fields]
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def eof_received(self) -> bool:
        """The client will say no more. In the midst of a request that is an error; else it is gone."""
        if self._exchange is None and not self._requests and not self._lingering and (self._url or self._in_head):
            self._refuse(Outcome.BAD_REQUEST, "the request ended before it was whole")
            self._refuse_connection()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._requests.clear()
        if exchange is not None:
            exchange.abandon()
        self._on_close(self)

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif not self._requests:
            self._read_on()

    # What the parser does.

    def on_message_begin(self) -> None:
        self._start_message()
        self._deadline = self._surroundings.clock() + self._limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            # A trailer: nothing that the engines need, and no header.
            return
        name = name.lower()
        if name not in HOP_BY_HOP:
            if name == b"x-session-id":
                self._session = value.decode("latin-1")
            self._headers.append((name, value))
            return
        self._hop_by_hop.append((name, value))
        if name == b"content-length":
            if len(value) > 15 or int(value) > self._limits.max_body_bytes:
                self._refuse_body()
        elif name == b"expect":
            self._expects = value.lower() == b"100-continue"
        elif name == b"connection":
            self._connection_tokens += value.lower() + b","
        elif name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            self._request_id = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._deadline = self._surroundings.clock() + self._limits.body_timeout_s
        if self._head_bytes + self._chunk_bytes > LONGEST_HEAD_BYTES and self._exact_head_bytes() > LONGEST_HEAD_BYTES:
            self._refuse(*_HEAD_TOO_LARGE)
        if self._connection_tokens:
            named = {token.strip() for token in self._connection_tokens.split(b",")} - {b"keep-alive", b"close", b""}
            if named:
                self._headers = [header for header in self._headers if header[0] not in named]
        if self._expects and self._refusal is None and self._exchange is None and not self._requests:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        # What is no body is limited like a head: the frames of chunks and the trailer.
        self._head_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
        elif self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refusal is None:
            self._requests.append(self._take_request())

    def _exact_head_bytes(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _refuse_body(self) -> None:
        self._body.clear()
        self._refuse(Outcome.BODY_TOO_LARGE, f"the body is larger than {self._limits.max_body_bytes} bytes")

    def _refuse(self, outcome: Outcome, message: str) -> None:
        """Nothing that follows is heard; the first reason is the one that the client is told."""
        self._deaf = True
        self._refusal = self._refusal or (outcome, message)

    def _take_request(self) -> ClientRequest:
        parser = self._parser
        request = ClientRequest(
            method=parser.get_method(),
            url=self._url,
            headers=b"".join([b"%b: %b\r\n" % header for header in self._headers]),
            body=b"".join(self._body),
            request_id=self._request_id or self._new_request_id(),
            session=self._session,
            keep_alive=parser.should_keep_alive(),
            http10=parser.get_http_version() == "1.0",
            arrived_s=self._surroundings.clock(),
        )
        self._url, self._body = b"", []
        self._deadline = math.inf
        return request

    # One request after the other.

    def _next(self) -> None:
        while self._exchange is None and self._requests and not self._lingering:
            self._serve(self._requests.popleft())
        if self._requests or self._lingering:
            return
        if self._exchange is not None:
            self._read_on()
        elif self._refusal is not None:
            self._refuse_connection()
        else:
            if self.idle:
                self._deadline = self._surroundings.clock() + self._limits.idle_timeout_s
            if not self._write_paused:
                self._read_on()

    def _read_on(self) -> None:
        if self._held_back:
            self._held_back = False
            self.transport.resume_reading()

    def _serve(self, request: ClientRequest) -> None:
        route = find_route(request.url)
        if route is None:
            self._reply_error(request, None, Outcome.NOT_FOUND, "no such path here")
        elif request.method != route.method and not (route is Route.HEALTH and request.method == b"HEAD"):
            message = f"this path takes {route.method.decode()} alone"
            self._reply_error(request, route, Outcome.METHOD_NOT_ALLOWED, message)
        elif route is Route.HEALTH:
            self._serve_health(request)
        elif route is Route.MODELS and not self._surroundings.dispatcher.accepting and self._surroundings.model:
            close = not self._keeps(request)
            self._reply(request, route, 200, build_models(self._surroundings.model, request.request_id, close=close))
        else:
            self._dispatch(request, route)

    def _serve_health(self, request: ClientRequest) -> None:
        if self._surroundings.dispatcher.accepting and not self._surroundings.draining:
            head_only = request.method == b"HEAD"
            answer = build_health(request.request_id, close=not self._keeps(request), head_only=head_only)
            self._reply(request, Route.HEALTH, 200, answer)
        else:
            self._reply_error(request, Route.HEALTH, Outcome.NO_ENGINE, "no engine accepts requests", retry_after_s=1)

    def _dispatch(self, request: ClientRequest, route: Route) -> None:
        dispatcher = self._surroundings.dispatcher
        try:
            parsed = parse_body(route, request.body) if route.method == b"POST" else _NO_BODY
        except BadBody as error:
            self._reply_error(request, route, Outcome.BAD_REQUEST, str(error), param=error.param)
            return
        models = dispatcher.models
        if parsed.model is not None and models and parsed.model not in models:
            message = f"the model {parsed.model[:200]!r} does not exist; known: {', '.join(sorted(models))}"
            self._reply_error(request, route, Outcome.MODEL_NOT_FOUND, message, param="model")
            return
        self._exchange = exchange = Exchange(request, route, parsed, self, self._surroundings)
        if self._write_paused:
            exchange.pause()
        exchange.begin()

    def write(self, data: bytes) -> None:
        """More of the answer."""
        self.transport.write(data)

    def answered(self, exchange: Exchange, *, keep_alive: bool) -> None:
        """The answer is over."""
        self._exchange = None
        if keep_alive:
            if self._deadline < math.inf:
                # The next request had begun to arrive behind this one; its time begins now.
                limits = self._limits
                wait_s = limits.header_timeout_s if self._in_head else limits.body_timeout_s
                self._deadline = self._surroundings.clock() + wait_s
            self._next()
        else:
            self._close()

    def _keeps(self, request: ClientRequest) -> bool:
        return request.keep_alive and not self._surroundings.draining

    def _reply(self, request: ClientRequest, route: Route, status: int, answer: bytes) -> None:
        self.transport.write(answer)
        self._surroundings.dispatcher.stats.finish(route.label, status)
        if not self._keeps(request):
            self._close()

    def _reply_error(
        self,
        request: ClientRequest,
        route: Route | None,
        outcome: Outcome,
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
            allow=route.method if outcome is Outcome.METHOD_NOT_ALLOWED and route is not None else None,
        )
        self.transport.write(answer)
        self._count_refusal(outcome, "other" if route is None else route.label)
        if not self._keeps(request):
            self._close()

    def _count_refusal(self, outcome: Outcome, route: str) -> None:
        stats = self._surroundings.dispatcher.stats
        stats.refusals[outcome.label] += 1
        stats.finish(route, outcome.status)

    def _refuse_connection(self) -> None:
        """Answers what was not a request at all, and ends the connection once the client has had time to read it."""
        assert self._refusal is not None
        outcome, message = self._refusal
        self._lingering = self._deaf = True
        now_s = self._surroundings.clock()
        self._deadline, self._linger_end = now_s + LINGER_S, now_s + self._limits.body_timeout_s
        self._body, self._url = [], b""
        if self.transport.is_closing():
            return
        self.transport.write(build_error(outcome, message, request_id=self._new_request_id(), close=True))
        self._count_refusal(outcome, "other")
        self._read_on()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _close(self) -> None:
        # A client that does not read what is left of its answer is waited for as long as one that reads no stream.
        self._lingering = self._deaf = True
        self._deadline = self._surroundings.clock() + self._limits.idle_timeout_s
        self._requests.clear()
        self.transport.close()

    # What the server does now and then.

    def check(self, now_s: float) -> None:
        """Ends what took too long."""
        if self._exchange is not None:
            self._exchange.check(now_s, self._limits.idle_timeout_s)
        elif now_s >= self._deadline:
            if self._lingering:
                self.transport.abort()
            elif self.idle:
                self._close()
            else:
                what = "head" if self._in_head else "body"
                self._refuse(Outcome.REQUEST_TIMEOUT, f"the {what} of the request did not arrive in time")
                self._refuse_connection()

    def drain(self) -> None:
        """The gateway stops: idle connections end in a moment, the others after their answer."""
        if self.idle:
            self._deadline = min(self._deadline, self._surroundings.clock() + NOTICE_S)

    def cut(self) -> None:
        """The gateway ends at once: whose request runs is told so, as far as it still can be."""
        if self._exchange is not None:
            self._exchange.cut()
        if self.transport is not None:
            self._close()


_HEAD_TOO_LARGE = (Outcome.HEAD_TOO_LARGE, f"the head of the request is larger than {LONGEST_HEAD_BYTES} bytes")
_OFFER = frozenset({b"connection", b"upgrade", b"expect"})
_NO_BODY = Parsed(model=None, stream=False, priority=0, user=None, prompt=b"", prompt_tokens=0)

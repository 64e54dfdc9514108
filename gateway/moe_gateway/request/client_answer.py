"""The answer of one request as its client gets it: head, comments, body, and an error where it cannot go on.

Owned by an exchange, which decides what passes and when. Everything here writes to the client's connection at once.
"""

from moe_gateway.bounded_latencies import LatencyWindow
from moe_gateway.http.cors import insert_lines
from moe_gateway.http.heads import ends_between_chunks, stamp_response
from moe_gateway.http.replies import (
    LAST_CHUNK,
    RequestOutcome,
    as_error_document,
    build_error,
    build_stream_error,
    build_stream_head,
    frame_chunk,
    frame_error,
    frame_last_chunk,
)
from moe_gateway.http.routes import Route
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext

# An open stream gets a comment this often until its first token; proxies end connections that are silent for longer.
KEEP_ALIVE_S = 10.0
KEEP_ALIVE = frame_chunk(b": keep-alive\n\n")


class ClientAnswer:
    """One answer to one client.

    Attributes:
        is_open: whether the head of a stream has passed, and perhaps comments, but no event.
        extra: further lines of the head of a stream, each ended by CRLF.
    """

    __slots__ = (
        "_client",
        "_context",
        "_gaps",
        "_is_anthropic",
        "_is_framing",
        "_last",
        "_piece_s",
        "_request",
        "_said_close",
        "_wrote_s",
        "extra",
        "is_open",
    )

    def __init__(self, request: ClientRequest, route: Route, client: ClientSide, context: ExchangeContext) -> None:
        self._request = request
        self._is_anthropic = route.is_anthropic
        self._client = client
        self._context = context
        # The newest piece of the answer.
        self._last = b""
        # Whether the head has promised chunks and the engine sends none.
        self._is_framing = False
        # What the head said about the connection; None before it.
        self._said_close: bool | None = None
        # Times between two pieces of a stream are measured where they have a bound.
        self._gaps: LatencyWindow | None = None
        self._piece_s = 0.0
        self.is_open = False
        self.extra = b""
        self._wrote_s = request.arrived_s

    @property
    def keeps_alive(self) -> bool:
        """Whether the client's connection stays open after a whole answer.

        A head that has passed holds, also when the gateway has begun to drain since: the client may send its next
        request at once.
        """
        closes = self._context.draining if self._said_close is None else self._said_close
        return self._request.keep_alive and not closes

    def begin(self, beginning: AnswerBeginning) -> None:
        """Passes on the bytes that were kept back."""
        if beginning.is_events and (gaps := self._context.stats.bounded.inter_token) is not None:
            self._gaps, self._piece_s = gaps, self._context.clock()
        self._last = beginning.body
        if self.is_open:
            self._is_framing = not beginning.is_chunked
            if self._is_framing and self._last:
                self._last = frame_chunk(self._last)
            self._client.write(self._last)
        else:
            close = self._said_close = not (self.keeps_alive and beginning.is_framed)
            self._client.write(self._stamp(beginning.received, beginning, close=close))

    def _stamp(self, answer: bytes, beginning: AnswerBeginning, *, close: bool) -> bytes:
        request = self._request
        lines = self.extra if beginning.is_events and beginning.is_chunked else b""
        if not request.is_plain:
            lines = self._context.cors.answer_lines(request.headers) + lines
        return stamp_response(answer, beginning.head, request.request_id, close=close, extra=lines)

    def _insert_cors(self, answer: bytes) -> bytes:
        return insert_lines(answer, self._context.cors.answer_lines(self._request.headers))

    def pass_on(self, data: bytes) -> None:
        """Passes on the next bytes."""
        if self._is_framing:
            data = frame_chunk(data)
        if self._gaps is not None:
            self._measure_gap(self._gaps)
        self._last = data
        self._client.write(data)

    def _measure_gap(self, gaps: LatencyWindow) -> None:
        before_s, self._piece_s = self._piece_s, self._context.clock()
        if before_s:
            gaps.observe(self._piece_s - before_s, self._piece_s)

    def forget_gap(self) -> None:
        """The client did not read for a while: the time until the next piece is no latency of an engine."""
        self._piece_s = 0.0

    def keep_alive(self, beginning: AnswerBeginning, head_after_s: float, now_s: float) -> None:
        """Called a few times a second before the first token of a stream: sends its head in time, then comments."""
        if now_s - self._wrote_s < (KEEP_ALIVE_S if self.is_open else head_after_s):
            return
        self._wrote_s = now_s
        if self.is_open:
            self._client.write(KEEP_ALIVE)
        else:
            self._open(beginning)

    def fill_pause(self, now_s: float) -> None:
        """Called a few times a second while a stream waits to go on at another engine: sends comments."""
        if now_s - self._wrote_s >= KEEP_ALIVE_S:
            self._wrote_s = now_s
            self._client.write(KEEP_ALIVE)

    def _open(self, beginning: AnswerBeginning) -> None:
        """Sends the head of a stream, which commits to no engine: the engine's own where it has come."""
        if self.is_open or not beginning.may_open:
            return
        self.is_open = True
        close = self._said_close = not self.keeps_alive
        if beginning.head:
            head = self._stamp(beginning.own_head, beginning, close=close)
        else:
            head = build_stream_head(self._request.request_id, close=close)
            head = insert_lines(self._insert_cors(head), self.extra)
        self._client.write(head)

    def pass_comments(self, beginning: AnswerBeginning, now_s: float) -> None:
        """Passes on comments, which keep the client's connection alive and commit to no engine."""
        self._wrote_s = now_s
        self._open(beginning)
        self._client.write(beginning.take_comments())

    def end(self) -> None:
        """All bytes of the engine's answer have passed."""
        if self._is_framing:
            self._client.write(LAST_CHUNK)

    def end_with_engine_error(self, error: bytes, status: int) -> None:
        """Ends an open stream with the error that an engine answered.

        Args:
            error: the body of its answer in one line. Where it is no JSON object of an error, one is made.
            status: its HTTP status.
        """
        error = as_error_document(error, status, is_anthropic=self._is_anthropic)
        self._client.write(frame_last_chunk(frame_error(error, is_anthropic=self._is_anthropic)))

    def break_off(self, outcome: RequestOutcome, reason: str, *, is_stream: bool) -> None:
        """Ends a stream with an error event where a client would understand one; any other answer just ends."""
        # The last bytes of the engine may end inside a chunk: then nothing can be added that a client would understand.
        if (is_stream or self.is_open) and ends_between_chunks(self._last):
            event = build_stream_error(outcome, reason, is_anthropic=self._is_anthropic)
            self._client.write(frame_last_chunk(event))

    def refuse(self, outcome: RequestOutcome, message: str, *, close: bool, retry_after_s: int | None = None) -> None:
        """Answers with an error of the gateway; nothing has passed before."""
        answer = build_error(
            outcome,
            message,
            request_id=self._request.request_id,
            close=close,
            retry_after_s=retry_after_s,
            is_anthropic=self._is_anthropic,
        )
        self._client.write(self._insert_cors(answer))

    def finish(self, *, keep_alive: bool) -> None:
        """The answer is over; the client's connection stays open or is closed."""
        self._client.answered(keep_alive=keep_alive)

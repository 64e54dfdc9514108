"""One stream that can go on at another engine: reads what its engines send, and says what the client gets.

Made by an exchange for a request whose fields allow it. The exchange passes it the bytes of each engine's answer and
passes on what `read` returns. Where the engine fails, `failure` says so, `prepare` chooses the way on, and `start`
gives the request for the next engine. Until the first failure a stream costs the parsing of its chunks.
"""

from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from moe_contract.gateway_config import ContinuedStreams
from moe_scheduling.engine.attempts import AttemptFailure

from moe_gateway.continuation import resend
from moe_gateway.continuation.chunks import (
    DONE,
    Chunk,
    adopt,
    build_usage,
    load_chunk,
    read_chunk,
    read_data,
    read_head,
    replace_new,
    strip_tokens,
    write_chunk,
)
from moe_gateway.continuation.events import EventReader
from moe_gateway.continuation.transcript import MOST_TOKENS, Cut, Expected, Mismatch, Transcript
from moe_gateway.continuation.ways import ROUTES, Way, find_way, read_stops
from moe_gateway.engines.engine_death import is_death_mark, says_engine_is_dead
from moe_gateway.http.bodies import Body
from moe_gateway.http.replies import LAST_CHUNK, frame_chunk
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.stream_events import ERROR_MARK, AnswerPart, find_error, part_of_status

# A comment, which every client of server-sent events skips.
NOTICE = b": continued by another engine\n\n"
# A stream is moved from engines that drain this often at most.
MOST_MOVES = 8


class StreamFailure(NamedTuple):
    """Why an engine's answer goes no further; `kind` is None where no other engine could do better."""

    reason: str
    kind: AttemptFailure | None = None


DIFFERS = StreamFailure("another engine computed something else than the engine before")


class Continuation:
    """The state of one stream.

    Attributes:
        header: line for the head of the answer.
        way: how the stream goes on, as far as the fields of its request say.
        failure: why the present engine's answer goes no further; None while it does.
        is_whole: whether the last event has passed.
        is_resuming: whether the stream was begun by another engine and the present one has not answered yet.
        moves: how often it was moved from an engine that drains.
    """

    __slots__ = (
        "_body",
        "_death_mark",
        "_document",
        "_end_passed",
        "_expected",
        "_first_body",
        "_has_token",
        "_has_usage",
        "_head",
        "_head_passed",
        "_is_finished",
        "_is_off",
        "_is_resumed",
        "_owes_notice",
        "_prompt",
        "_reader",
        "_request",
        "_resent_tokens",
        "_route",
        "_shows_tokens",
        "_transcript",
        "_url",
        "failure",
        "header",
        "is_resuming",
        "is_whole",
        "moves",
        "way",
    )

    def __init__(self, request: ClientRequest, route: Route, document: Mapping[str, Any], way: Way) -> None:
        assert isinstance(request.body, bytes)
        self.header = b"x-moeserving-continuation: %b\r\n" % way.value.encode()
        self.way = way
        self.moves = 0
        self._request = request
        self._route = route
        self._document = {name: value for name, value in document.items() if name not in ("prompt", "messages")}
        self._shows_tokens = bool(document.get("return_token_ids"))
        self._url = request.url
        self._body = resend.ask_for_tokens(request.body) if way is Way.PREFIX else request.body
        self._first_body = self._body
        self._is_resumed = self.is_resuming = self._owes_notice = False
        self._expected: Expected | None = None
        self._resent_tokens = 0
        self._begin()

    def _begin(self) -> None:
        """Forgets all of an answer that the client has nothing of."""
        stops = read_stops(self._document)
        self._transcript = Transcript(stops, includes_stop=bool(self._document.get("include_stop_str_in_output")))
        self._prompt = array("I")
        self._head: dict[str, Any] = {}
        self._has_token = self._is_finished = self._has_usage = self._is_off = self.is_whole = False
        self._new_reader()

    def _new_reader(self) -> None:
        self._reader = EventReader()
        # Belongs to the event behind it, an error.
        self._death_mark = b""
        self._head_passed = self._end_passed = False
        self.failure: StreamFailure | None = None

    def start(self) -> tuple[bytes, Body]:
        """An attempt begins: the target and the body of its request."""
        if self._is_resumed:
            self._new_reader()
        else:
            self._begin()
        return self._url, self._body

    # What an engine sends.

    def read(self, data: bytes, *, has_begun: bool, is_complete: bool = False) -> bytes:
        """Takes bytes of an engine's answer and returns those for the client, in whole chunks.

        Args:
            data: as they came.
            has_begun: whether the client has got a part of the stream.
            is_complete: whether these are the last bytes of the answer.
        """
        if self._is_off:
            return data
        reader = self._reader
        events = reader.read(data)
        if not reader.is_stream:
            return self._take_other() if reader.head or reader.is_too_long else b""
        parts = []
        if not self._head_passed:
            self._head_passed = True
            if not self._is_resumed:
                parts.append(reader.head)
        self._has_token = self._has_token or has_begun
        passed = [taken for event in events if not self.failure and (taken := self._take(event))]
        if passed:
            if self._owes_notice:
                self._owes_notice = False
                passed.insert(0, NOTICE)
            parts.append(frame_chunk(b"".join(passed)))
        if not self.failure and not self._end_passed:
            parts.append(self._take_end(is_complete=is_complete))
        return b"".join(parts)

    def _take_other(self) -> bytes:
        """An answer that is no stream, or whose head has no end, passes as it is; no stream goes on with it."""
        if self._is_resumed:
            self.failure = StreamFailure("another engine answered with something else than a stream")
            return b""
        self._is_off = True
        self._transcript.forget()
        return self._reader.take_rest()

    def _take_end(self, *, is_complete: bool) -> bytes:
        """Returns the end of the body, once it has come."""
        reader = self._reader
        if reader.is_too_long:
            self.failure = StreamFailure("an event of the engine has no end", AttemptFailure.ENGINE_ERROR)
        elif reader.has_ended and (self.is_whole or not self._has_token):
            self._end_passed = True
            return LAST_CHUNK
        elif reader.has_ended:
            self.failure = StreamFailure("the stream ended before its last event", AttemptFailure.BROKEN)
        elif is_complete:
            self.failure = StreamFailure("the chunks of the engine's answer cannot be read", AttemptFailure.BROKEN)
        return b""

    def _take(self, event: bytes) -> bytes:
        """Takes an event and returns what the client gets in its place."""
        data = read_data(event)
        if not data:
            if is_death_mark(event):
                self._death_mark = event
                return b""
            if not event.startswith(b":"):
                self._transcript.forget()
            return event
        if data == b"[DONE]":
            if self._expected is not None and not self._expected.is_past:
                self.failure = DIFFERS
                return b""
            self.is_whole = True
            return event
        if ERROR_MARK in data and (status := find_error(event)):
            return self._take_error(event, status)
        return self._take_document(event, load_chunk(data))

    def _take_document(self, event: bytes, document: dict[str, Any] | None) -> bytes:
        if document is not None and self._is_resumed:
            adopt(document, self._head, self._route, len(self._prompt), self._resent_tokens)
        chunk = None if document is None else read_chunk(document)
        if chunk is None:
            self._transcript.forget()
            return event if not self._is_resumed else self._differ()
        if chunk.finish_reason == "abort" and self._has_token:
            self.failure = StreamFailure("the engine aborted the request", AttemptFailure.ENGINE_ERROR)
            return b""
        return self._take_again(chunk) if self._is_resumed else self._take_first(chunk, event)

    def _take_error(self, event: bytes, status: int) -> bytes:
        event = self._death_mark + event
        if not self._has_token or part_of_status(status) is not AnswerPart.ENGINE_ERROR:
            self.is_whole, self._expected = True, None
            self._transcript.forget()
            return event
        is_dead = says_engine_is_dead(event)
        kind = AttemptFailure.ENGINE_DEAD if is_dead else AttemptFailure.ENGINE_ERROR
        self.failure = StreamFailure("the engine has died" if is_dead else "the engine answered with an error", kind)
        return b""

    def _take_first(self, chunk: Chunk, event: bytes) -> bytes:
        """A chunk of the first engine."""
        self._head = self._head or read_head(chunk.document)
        if chunk.prompt and not self._prompt and len(chunk.prompt) <= MOST_TOKENS:
            self._prompt = chunk.prompt
        self._note(chunk, is_single=len(chunk.tokens) == 1)
        if self._shows_tokens or not (chunk.tokens or chunk.prompt):
            return event
        strip_tokens(chunk)
        return write_chunk(chunk.document)

    def _take_again(self, chunk: Chunk) -> bytes:
        """A chunk of another engine, of which the client may have a part."""
        if self._is_finished and chunk.choice is not None:
            # Only the usage is missing.
            self._expected = None
            return b""
        pieces, tokens = chunk.pieces, chunk.tokens
        has_text = bool(tokens) or any(piece.text for piece in pieces)
        if has_text:
            self.is_resuming = False
        if (expected := self._expected) is not None:
            try:
                new, tokens = expected.subtract(pieces, tokens)
            except Mismatch:
                return self._differ()
            if expected.is_past:
                self._expected = None
            elif chunk.finish_reason is not None:
                return self._differ()
            pieces = tuple(new)
        is_new = bool(tokens) or any(piece.text for piece in pieces)
        if not is_new and chunk.finish_reason is None and chunk.choice is not None:
            return b""
        replace_new(chunk, pieces, tokens)
        self._note(chunk._replace(pieces=pieces, tokens=tokens), is_single=len(chunk.tokens) == 1)
        # The client has the ids of the prompt; those of this engine's prompt may include its answer.
        strip_tokens(chunk, keeps_answer=self._shows_tokens)
        return write_chunk(chunk.document)

    def _note(self, chunk: Chunk, *, is_single: bool) -> None:
        """Remembers a chunk that goes to the client; `is_single`: its engine sent one token in it."""
        if not chunk.is_traceable:
            self._transcript.forget()
        elif not self._transcript.is_lost:
            self._transcript.add(chunk.pieces, chunk.tokens, is_single=is_single)
        self._has_token = self._has_token or bool(chunk.tokens) or any(piece.text for piece in chunk.pieces)
        self._is_finished = self._is_finished or chunk.finish_reason is not None
        self._has_usage = self._has_usage or chunk.has_usage

    def _differ(self) -> bytes:
        self.failure = DIFFERS
        return b""

    # The way on.

    @property
    def can_go_on(self) -> bool:
        """Whether another engine can take the stream over."""
        return not self._transcript.is_lost and not self._is_off and bool(self._head)

    def prepare(self, max_model_len: int | None) -> Way:
        """Chooses the way on at another engine, for a stream that can go on.

        Args:
            max_model_len: longest sequence of the model, in tokens; None where it is not known.
        """
        if self._prepare_prefix(max_model_len):
            return Way.PREFIX
        self._url, self._body = self._request.url, self._first_body
        self._go_on(None)
        return Way.REPLAY

    def _prepare_prefix(self, max_model_len: int | None) -> bool:
        cut = self._find_cut()
        if cut is None:
            return False
        tokens = self._transcript.tokens[: cut.tokens]
        body = resend.build_prefix_body(self._route, self._document, self._prompt, tokens, max_model_len)
        if body is None:
            return False
        self._url, self._body = resend.URL, body
        self._go_on(cut)
        return True

    def _find_cut(self) -> Cut | None:
        if self.way is not Way.PREFIX or not self._prompt or self._is_finished or self._transcript.is_lost:
            return None
        return self._transcript.find_cut()

    def _go_on(self, cut: Cut | None) -> None:
        self._expected = self._transcript.expect(cut)
        self._resent_tokens = 0 if cut is None else cut.tokens
        self._is_resumed = self.is_resuming = self._owes_notice = True
        self._new_reader()

    @property
    def context_tokens(self) -> int:
        """Tokens of the prompt for the next engine where the prefix is resent; 0 otherwise."""
        return len(self._prompt) + self._resent_tokens if self._resent_tokens else 0

    @property
    def may_move(self) -> bool:
        """Whether it may be moved from an engine that drains: without computing anew what the client has."""
        return not self.is_resuming and self.moves < MOST_MOVES and self._find_cut() is not None

    def build_ending(self) -> bytes | None:
        """The chunks that are missing of a stream whose last token has passed; None where an engine is needed."""
        if self._end_passed:
            return b""
        if self.is_whole:
            return LAST_CHUNK
        if not self._is_finished:
            return None
        usage = b""
        if self._wants_usage and not self._has_usage:
            if not self._prompt or self._transcript.is_lost:
                return None
            usage = build_usage(self._head, len(self._prompt), len(self._transcript.tokens))
        return frame_chunk(usage + DONE) + LAST_CHUNK

    @property
    def _wants_usage(self) -> bool:
        options = self._document.get("stream_options")
        return type(options) is dict and bool(options.get("include_usage"))


def find_continuation(
    request: ClientRequest, route: Route, parsed: Parsed, settings: ContinuedStreams
) -> Continuation | None:
    """The state of a stream that can go on at another engine; None for any other request.

    Args:
        request: of the client.
        route: of the request.
        parsed: its fields.
        settings: of the gateway.
    """
    body = request.body
    if not parsed.stream or route not in ROUTES or request.http10 or type(body) is not bytes:
        return None
    if b'"temperature"' not in body and b'"seed"' not in body:
        return None
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    by_prefix = settings.chats_by_prefix if route is Route.CHAT else settings.completions_by_prefix
    way = find_way(route, document, has_media=bool(parsed.media), by_prefix=by_prefix)
    return None if way is None else Continuation(request, route, document, way)

"""A stream of completions or chats that can go on at another engine: chunks of one choice, perhaps with token ids."""

from array import array
from collections.abc import Mapping
from typing import Any

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
from moe_gateway.continuation.probabilities import KnownTokens, drop_first
from moe_gateway.continuation.stream import ABORTED, Continuation
from moe_gateway.continuation.transcript import MOST_TOKENS, Cut, Mismatch, Transcript
from moe_gateway.continuation.ways import Way, read_stops
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest

# A stream is moved from engines that drain this often at most.
MOST_MOVES = 8


class ChunkStream(Continuation):
    """See `Continuation`; a stream that goes on by its prefix asks its engines for the ids of its tokens."""

    __slots__ = (
        "_document",
        "_first_body",
        "_has_usage",
        "_head",
        "_is_finished",
        "_prompt",
        "_resent_tokens",
        "_scored",
        "_shows_tokens",
    )

    def __init__(self, request: ClientRequest, route: Route, document: Mapping[str, Any], way: Way) -> None:
        assert isinstance(request.body, bytes)
        self._document = {name: value for name, value in document.items() if name not in ("prompt", "messages")}
        self._shows_tokens = bool(document.get("return_token_ids"))
        self._first_body = resend.ask_for_tokens(request.body) if way is Way.PREFIX else request.body
        self._resent_tokens = 0
        super().__init__(request, route, way, self._first_body)

    def _begin(self) -> None:
        super()._begin()
        self._prompt = array("I")
        self._scored = KnownTokens()
        self._head: dict[str, Any] = {}
        self._is_finished = self._has_usage = False

    def _new_transcript(self) -> Transcript:
        stops = read_stops(self._document)
        return Transcript(stops, includes_stop=bool(self._document.get("include_stop_str_in_output")))

    # What an engine sends.

    def _read_data(self, event: bytes) -> bytes:
        return read_data(event)

    def _take_data(self, event: bytes, data: bytes) -> bytes:
        if data != b"[DONE]":
            return self._take_document(event, load_chunk(data))
        if self._is_behind and not self.is_whole:
            return self._differ()
        self.is_whole = True
        return event

    def _take_document(self, event: bytes, document: dict[str, Any] | None) -> bytes:
        if document is not None and self._is_resumed:
            adopt(document, self._head, self._route, len(self._prompt), self._resent_tokens)
        chunk = None if document is None else read_chunk(document)
        if chunk is None:
            self._transcript.forget()
            return event if not self._is_resumed else self._differ()
        if chunk.finish_reason == "abort" and self._has_token:
            self.failure = ABORTED
            return b""
        if not self._is_resumed:
            return self._take_first(chunk, event)
        return self._take_again(chunk) if chunk.is_traceable else self._take_unknown(chunk)

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
            self._scored.forget()
            return b""
        pieces, tokens = chunk.pieces, chunk.tokens
        if tokens or any(piece.text for piece in pieces):
            self.is_resuming = False
        known = self._scored.count_again(chunk.scored)
        if known is None:
            return self._differ()
        if (expected := self._expected) is not None:
            try:
                new, tokens = expected.subtract(pieces, tokens)
            except Mismatch:
                return self._differ()
            if expected.is_past:
                self._expected = None
            pieces = tuple(new)
        has_text = bool(tokens) or any(piece.text for piece in pieces)
        if self._is_behind and (chunk.finish_reason is not None or (has_text and not self._scored.is_past)):
            return self._differ()
        scored = chunk.scored[known:]
        if not (has_text or scored) and chunk.finish_reason is None and chunk.choice is not None:
            return b""
        replace_new(chunk, pieces, tokens)
        if known and chunk.choice is not None:
            drop_first(chunk.choice, known)
        new_chunk = chunk._replace(pieces=pieces, tokens=tokens, scored=scored)
        self._note(new_chunk, is_single=len(chunk.tokens) == 1)
        # The client has the ids of the prompt; those of this engine's prompt may include its answer.
        strip_tokens(chunk, keeps_answer=self._shows_tokens)
        return write_chunk(chunk.document)

    def _take_unknown(self, chunk: Chunk) -> bytes:
        """A chunk of another engine with something that cannot be compared; it passes where the client has the rest."""
        if self._is_finished:
            return b""
        if self._is_behind:
            return self._differ()
        self.is_resuming, self._expected = False, None
        self._note(chunk, is_single=False)
        strip_tokens(chunk, keeps_answer=self._shows_tokens)
        return write_chunk(chunk.document)

    @property
    def _is_behind(self) -> bool:
        """Whether the present engine has yet to compute a part of what the client has."""
        expected = self._expected
        return (expected is not None and not expected.is_past) or not self._scored.is_past

    def _note(self, chunk: Chunk, *, is_single: bool) -> None:
        """Remembers a chunk that goes to the client; `is_single`: its engine sent one token in it."""
        if not chunk.is_traceable:
            self._transcript.forget()
        elif not self._transcript.is_lost:
            self._transcript.add(chunk.pieces, chunk.tokens, is_single=is_single)
            self._scored.add(chunk.scored)
            if self._scored.is_too_long:
                self._transcript.forget()
        if self._transcript.is_lost:
            self._scored.forget()
        self._has_token = self._has_token or bool(chunk.tokens) or any(piece.text for piece in chunk.pieces)
        self._is_finished = self._is_finished or chunk.finish_reason is not None
        self._has_usage = self._has_usage or chunk.has_usage

    # The way on.

    @property
    def _has_begun(self) -> bool:
        return bool(self._head)

    def prepare(self, max_model_len: int | None) -> Way:
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
        self._resent_tokens = 0 if cut is None else cut.tokens
        self._scored.begin_again()
        super()._go_on(cut)

    @property
    def context_tokens(self) -> int:
        return len(self._prompt) + self._resent_tokens if self._resent_tokens else 0

    @property
    def may_move(self) -> bool:
        return not self.is_resuming and self.moves < MOST_MOVES and self._find_cut() is not None

    def _build_last_events(self) -> bytes | None:
        if not self._is_finished:
            return None
        usage = b""
        if self._wants_usage and not self._has_usage:
            if not self._prompt or self._transcript.is_lost:
                return None
            usage = build_usage(self._head, len(self._prompt), len(self._transcript.tokens))
        return usage + DONE

    @property
    def _wants_usage(self) -> bool:
        options = self._document.get("stream_options")
        return type(options) is dict and bool(options.get("include_usage"))

"""A stream of `/v1/messages` or `/v1/responses` that can go on at another engine.

Their engines show no token ids, so another engine computes the whole answer anew. The client's part is compared event
by event and left out; where text is spread over events otherwise, the event at the seam is cut. Ids, which are
drawn at random, and numbers of events go on as the client knows them (`message_events.py`, `response_events.py`).
"""

from array import array
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from moe_gateway.continuation import resend
from moe_gateway.continuation.chunks import load_chunk
from moe_gateway.continuation.message_events import MessageEvents
from moe_gateway.continuation.response_events import ResponseEvents
from moe_gateway.continuation.stream import ABORTED, Continuation
from moe_gateway.continuation.transcript import MARK, Mismatch, Piece
from moe_gateway.continuation.ways import Way
from moe_gateway.http.replies import frame_chunk
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest

_NONE = array("I")
# vLLM ends a block with two events; what goes beyond is none of its own.
MOST_HELD = 8


class Dialect(Protocol):
    """The events of one API, and the state of one stream of them.

    Attributes:
        response_id: id of the response that an engine may keep; empty where none is kept, and before it is known.
        has_begun: whether the event has passed with which a stream begins.
        last_events: the missing events where its engine fails now; None where only an engine knows them.
    """

    response_id: str
    has_begun: bool
    last_events: bytes | None

    def read(self, document: Mapping[str, Any]) -> Piece | None:
        """The text of an event, or with the field `MARK` what it is; None where engines cannot be compared by it."""

    def closes(self, document: Mapping[str, Any]) -> bool:
        """Whether an event ends a part of the answer that the event behind it may show to be cut off."""

    def is_cut_off(self, document: Mapping[str, Any]) -> bool:
        """Whether an event says that the engine has aborted the request."""

    def is_last(self, document: Mapping[str, Any]) -> bool:
        """Whether an event is the last one of its stream."""

    def begin_again(self) -> None:
        """Another engine computes the answer anew."""

    def match(self, document: Mapping[str, Any]) -> None:
        """An event of another engine is one that the client has."""

    def adopt(self, document: dict[str, Any], text: str | None) -> None:
        """Makes an event of another engine the next one of the stream, with the text that is new; None: it has none."""

    def note(self, document: Mapping[str, Any]) -> None:
        """An event goes to the client."""


class EventStream(Continuation):
    """See `Continuation`; such a stream is computed anew, so it stays at an engine that drains."""

    __slots__ = ("_dialect", "_first_body", "_held", "_names_itself")

    def __init__(self, request: ClientRequest, route: Route, document: Mapping[str, Any]) -> None:
        assert isinstance(request.body, bytes)
        self._names_itself = "request_id" in document
        self._first_body = request.body
        super().__init__(request, route, Way.REPLAY, request.body)

    def _begin(self) -> None:
        self._dialect: Dialect = MessageEvents() if self._route is Route.MESSAGES else ResponseEvents()
        super()._begin()

    def _new_reader(self) -> None:
        super()._new_reader()
        # Events that end a part of the answer, until the next event shows whether it was cut off.
        self._held: list[tuple[bytes, dict[str, Any]]] = []

    # What an engine sends.

    def _read_data(self, event: bytes) -> bytes:
        lines = event.rstrip(b"\r\n").splitlines()
        data = [line[5:] for line in lines if line.startswith(b"data:")]
        return data[0].strip() if len(data) == 1 else b""

    def _take_data(self, event: bytes, data: bytes) -> bytes:
        document = load_chunk(data)
        if document is None:
            taken = self._take_unknown(event, data)
            return self._release() + taken if taken else b""
        dialect = self._dialect
        if dialect.closes(document) and len(self._held) < MOST_HELD:
            self._held.append((event, document))
            return b""
        if self._has_token and dialect.is_cut_off(document):
            self.failure = ABORTED
            return b""
        return self._release() + self._take_document(event, document)

    def _release(self) -> bytes:
        """What the client gets of the events that were held."""
        held, self._held = self._held, []
        return b"".join([self._take_document(*row) for row in held])

    def _take_error(self, event: bytes, status: int) -> bytes:
        taken = super()._take_error(event, status)
        return self._release() + taken if taken else b""

    def _take_end(self, *, is_complete: bool) -> bytes:
        end = super()._take_end(is_complete=is_complete)
        held = self._release() if end else b""
        return frame_chunk(held) + end if held else end

    def _take_document(self, event: bytes, document: dict[str, Any]) -> bytes:
        if self.failure is not None:
            return b""
        piece = self._dialect.read(document)
        if piece is None:
            return self._take_unknown(event, b"")
        if self._is_resumed:
            return self._take_again(document, piece)
        self._note(document, piece)
        return event

    def _take_unknown(self, event: bytes, data: bytes) -> bytes:
        """An event that engines cannot be compared by; some servers end all streams alike."""
        if data == b"[DONE]":
            return event if self.is_whole or self._is_only_passed_on else b""
        self._transcript.forget()
        return self._differ() if self._is_resumed else event

    def _take_again(self, document: dict[str, Any], piece: Piece) -> bytes:
        """An event of another engine, of which the client may have a part."""
        if piece.field != MARK and piece.text:
            self.is_resuming = False
        if (expected := self._expected) is not None:
            try:
                [piece], _ = expected.subtract([piece], _NONE)
            except Mismatch:
                return self._differ()
            if expected.is_past:
                self._expected = None
            if not piece.text:
                self._dialect.match(document)
                return b""
        self._dialect.adopt(document, None if piece.field == MARK else piece.text)
        self._note(document, piece)
        return b"event: %b\ndata: %b\n\n" % (document["type"].encode(), orjson.dumps(document))

    def _note(self, document: dict[str, Any], piece: Piece) -> None:
        """Remembers an event that goes to the client."""
        if not self._transcript.is_lost:
            self._transcript.add([piece], _NONE)
        self._has_token = self._has_token or (piece.field != MARK and bool(piece.text))
        self._dialect.note(document)
        self.is_whole = self.is_whole or self._dialect.is_last(document)

    # The way on.

    @property
    def _has_begun(self) -> bool:
        return self._dialect.has_begun

    def prepare(self, max_model_len: int | None) -> Way:
        response_id = self._dialect.response_id
        if response_id and not self._names_itself:
            self._body = resend.name_response(self._first_body, response_id)
        self._dialect.begin_again()
        self._go_on(None)
        return Way.REPLAY

    @property
    def response_id(self) -> str:
        return self._dialect.response_id

    def _build_last_events(self) -> bytes | None:
        return self._dialect.last_events

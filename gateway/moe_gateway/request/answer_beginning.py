"""The beginning of an answer, kept back by an exchange until it shows what it is.

An exchange feeds it the bytes of one attempt's answer. It says what they show so far, which comments may pass already,
and what has to be passed on once the answer begins.
"""

from moe_gateway.http.heads import skip_informational
from moe_gateway.http.replies import frame_chunk
from moe_gateway.request.stream_events import (
    LONGEST_BEGINNING_BYTES,
    MOST_PENDING_EVENTS,
    AnswerPart,
    begins_error,
    may_end_event,
    part_of_status,
    read_beginning,
    read_error_body,
    split_chunks,
)

# A look-up of a member in its enum costs a fifth of a microsecond in Python 3.11.
_PENDING, _REFUSAL = AnswerPart.PENDING, AnswerPart.REFUSAL
_WHOLE, _ENGINE_ERROR = AnswerPart.WHOLE, AnswerPart.ENGINE_ERROR
# A longer answer in one piece is no error, however it begins.
LONGEST_ERROR_BYTES = 64 * 1024


class AnswerBeginning:
    """Bytes of an answer that are kept back.

    Args:
        shows_end: whether the end of its body shows whatever its head says.

    Attributes:
        received: all bytes so far that have not passed, its head included.
        head: its head in lower case; empty before it is whole.
        status: its HTTP status, once the head is there.
        is_chunked: whether its body comes in chunks.
        is_framed: whether the end of its body shows, so that the connection may outlive it.
        is_events: whether it is a stream of events that a model computes.
        comments: comments that may pass now.
        error_status: HTTP status that an error stands for which came in one piece with status 200; 0 without one.
    """

    __slots__ = (
        "_events",
        "comments",
        "error_status",
        "head",
        "is_chunked",
        "is_events",
        "is_framed",
        "received",
        "status",
    )

    def __init__(self, *, shows_end: bool = False) -> None:
        self.received = self.head = self.comments = self._events = b""
        self.status = self.error_status = 0
        self.is_framed = shows_end
        self.is_chunked = self.is_events = False

    def read(self, data: bytes, status: int, *, computes: bool, complete: bool) -> AnswerPart:
        """Takes more bytes of an answer whose head is whole, and returns what it shows so far.

        Args:
            data: the newest bytes, which are in `received` already.
            status: the HTTP status.
            computes: whether the request has a job.
            complete: whether the answer is whole.
        """
        if not self.head:
            self._read_head(status, computes=computes)
        if len(self.received) == len(self.head) and not complete:
            return _PENDING
        if not self.is_events:
            return self._read_piece(status, computes=computes, complete=complete)
        if not complete and not may_end_event(data, len(self.received)):
            return _PENDING
        part = self._read_events()
        # A stream without a token and without an end is none.
        return _ENGINE_ERROR if complete and part is _PENDING else part

    def _read_piece(self, status: int, *, computes: bool, complete: bool) -> AnswerPart:
        """What an answer in one piece shows; an error of the engine is one on every route, and with status 200 too."""
        part = part_of_status(status)
        if not computes:
            return part if part is _ENGINE_ERROR else _REFUSAL
        if part is not _WHOLE or len(self.received) > LONGEST_ERROR_BYTES:
            return part
        if not begins_error(self.received, len(self.head)):
            return part
        if self.is_framed and not complete:
            return _PENDING
        self.error_status = read_error_body(self.error)
        return part_of_status(self.error_status)

    def _read_head(self, status: int, *, computes: bool) -> None:
        self.received = received = skip_informational(self.received)
        self.head = head = received[: received.index(b"\r\n\r\n") + 4].lower()
        self.status = status
        self.is_chunked = b"\r\ntransfer-encoding:" in head
        self.is_framed |= self.is_chunked or b"\r\ncontent-length:" in head
        self.is_events = status == 200 and computes and b"text/event-stream" in head
        if self.is_events and b"\r\ncontent-encoding:" in head:
            # A proxy that was not asked for it has compressed it: it cannot be read.
            self.is_events = False

    def _read_events(self) -> AnswerPart:
        raw = self.received[len(self.head) :]
        data, _ = split_chunks(raw) if self.is_chunked else (raw, b"")
        part, self.comments, events = read_beginning(self._events + data)
        is_long = len(events) > LONGEST_BEGINNING_BYTES or events.count(b"data:") > MOST_PENDING_EVENTS
        if part is _PENDING and is_long:
            return _WHOLE
        return part

    def take_comments(self) -> bytes:
        """Takes the comments out, as a chunk of their own; the events between them stay."""
        data, rest = split_chunks(self.received[len(self.head) :])
        _, comments, self._events = read_beginning(self._events + data)
        self.received = self.received[: len(self.head)] + rest
        self.comments = b""
        return frame_chunk(comments)

    @property
    def own_head(self) -> bytes:
        """Its head as the engine sent it."""
        return self.received[: len(self.head)]

    @property
    def may_open(self) -> bool:
        """Whether the head of a stream may pass before its first token: no other answer has begun to come."""
        return not self.head or (self.is_events and self.is_chunked)

    @property
    def is_unframed_piece(self) -> bool:
        """Whether it is an answer in one piece, whole when its connection ends."""
        return len(self.received) > len(self.head) > 0 and not self.is_framed and not self.is_events

    @property
    def body(self) -> bytes:
        """The part of its body that has come and not passed, framed as the answer is."""
        body = self.received[len(self.head) :]
        return frame_chunk(self._events) + body if self._events else body

    @property
    def data(self) -> bytes:
        """The same without the frames of chunks."""
        return split_chunks(self.body)[0] if self.is_chunked else self.body

    @property
    def error(self) -> bytes:
        """Its body as one line, without the frames of chunks."""
        return b" ".join(self.data.split())

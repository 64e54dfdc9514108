"""One stream that can go on at another engine: reads what its engines send, and says what the client gets.

Made by an exchange for a request whose fields allow it. The exchange passes it the bytes of each engine's answer and
passes on what `read` returns. Where the engine fails, `failure` says so, `prepare` chooses the way on, and `start`
gives the request for the next engine. Until the first failure a stream costs the parsing of its events.

What the events of a stream mean is left to subclasses: chunks of completions and chats (`chunk_stream.py`), and the
typed events of `/v1/messages` and `/v1/responses` (`event_stream.py`).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from moe_scheduling.engine.attempts import AttemptFailure

from moe_gateway.continuation.events import EventReader
from moe_gateway.continuation.transcript import Cut, Expected, Transcript
from moe_gateway.continuation.ways import Way
from moe_gateway.engines.engine_death import is_death_mark, says_engine_is_dead
from moe_gateway.http.bodies import Body
from moe_gateway.http.replies import LAST_CHUNK, frame_chunk
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.stream_events import ERROR_MARK, AnswerPart, find_error, part_of_status

# A comment, which every client of server-sent events skips.
NOTICE = b": continued by another engine\n\n"


class StreamFailure(NamedTuple):
    """Why an engine's answer goes no further; `kind` is None where no other engine could do better."""

    reason: str
    kind: AttemptFailure | None = None


DIFFERS = StreamFailure("another engine computed something else than the engine before")
ABORTED = StreamFailure("the engine aborted the request", AttemptFailure.ENGINE_ERROR)


class Continuation(ABC):
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
        "_end_passed",
        "_expected",
        "_has_token",
        "_head_passed",
        "_is_off",
        "_is_resumed",
        "_owes_notice",
        "_reader",
        "_request",
        "_route",
        "_transcript",
        "_url",
        "failure",
        "header",
        "is_resuming",
        "is_whole",
        "moves",
        "way",
    )

    def __init__(self, request: ClientRequest, route: Route, way: Way, body: bytes) -> None:
        self.header = b"x-moeserving-continuation: %b\r\n" % way.value.encode()
        self.way = way
        self.moves = 0
        self._request = request
        self._route = route
        self._url = request.url
        self._body = body
        self._is_resumed = self.is_resuming = self._owes_notice = False
        self._expected: Expected | None = None
        self._begin()

    def _begin(self) -> None:
        """Forgets all of an answer that the client has nothing of."""
        self._transcript = self._new_transcript()
        self._has_token = self._is_off = self.is_whole = False
        self._new_reader()

    def _new_transcript(self) -> Transcript:
        return Transcript()

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
        elif reader.has_ended and (self.is_whole or not self._has_token or self._is_only_passed_on):
            self._end_passed = True
            return LAST_CHUNK
        elif reader.has_ended:
            self.failure = StreamFailure("the stream ended before its last event", AttemptFailure.BROKEN)
        elif is_complete:
            self.failure = StreamFailure("the chunks of the engine's answer cannot be read", AttemptFailure.BROKEN)
        return b""

    @property
    def _is_only_passed_on(self) -> bool:
        """Whether the stream has shown something by which engines cannot be compared, so that its end is not known."""
        return self._transcript.is_lost and self._expected is None

    def _take(self, event: bytes) -> bytes:
        """Takes an event and returns what the client gets in its place."""
        data = self._read_data(event)
        if not data:
            if is_death_mark(event):
                self._death_mark = event
                return b""
            if not event.startswith(b":"):
                self._transcript.forget()
            return event
        if ERROR_MARK in data and (status := find_error(event)):
            return self._take_error(event, status)
        return self._take_data(event, data)

    @abstractmethod
    def _read_data(self, event: bytes) -> bytes:
        """The data of an event; empty for a comment and for an event that cannot be read."""

    @abstractmethod
    def _take_data(self, event: bytes, data: bytes) -> bytes:
        """Takes an event with these data and returns what the client gets in its place."""

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

    def _differ(self) -> bytes:
        self.failure = DIFFERS
        return b""

    # The way on.

    @property
    def can_go_on(self) -> bool:
        """Whether another engine can take the stream over."""
        return not self._transcript.is_lost and not self._is_off and self._has_begun

    @property
    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether what all events of the stream have in common is known."""

    @abstractmethod
    def prepare(self, max_model_len: int | None) -> Way:
        """Chooses the way on at another engine, for a stream that can go on.

        Args:
            max_model_len: longest sequence of the model, in tokens; None where it is not known.
        """

    def _go_on(self, cut: Cut | None) -> None:
        self._expected = self._transcript.expect(cut)
        self._is_resumed = self.is_resuming = self._owes_notice = True
        self._new_reader()

    @property
    def context_tokens(self) -> int:
        """Tokens of the prompt for the next engine where the prefix is resent; 0 otherwise."""
        return 0

    @property
    def may_move(self) -> bool:
        """Whether it may be moved from an engine that drains: without computing anew what the client has."""
        return False

    @property
    def response_id(self) -> str:
        """Id of the response that its engine may keep; empty where none is kept."""
        return ""

    def build_ending(self) -> bytes | None:
        """The chunks that are missing of a stream whose last token has passed; None where an engine is needed."""
        if self._end_passed:
            return b""
        if self.is_whole:
            return LAST_CHUNK
        events = self._build_last_events()
        return None if events is None else frame_chunk(events) + LAST_CHUNK

    @abstractmethod
    def _build_last_events(self) -> bytes | None:
        """The events that are missing after the last token; None where only an engine knows them."""

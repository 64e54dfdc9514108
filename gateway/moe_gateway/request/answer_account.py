"""What the answer of one request shows of its engine, reported to the dispatcher and the counts of the gateway.

Owned by an exchange. An error of the client shows nothing of the engine.
"""

from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.http.routes import Route
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.answer_fields import find_prompt_tokens, find_response_id
from moe_gateway.request.context import ClientRequest, ExchangeContext
from moe_gateway.request.event_pieces import EventPieces
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.stream_events import AnswerPart, ends_stream, find_error, may_have_error, part_of_status

USAGE_WINDOW_BYTES = 64 * 1024
# A look-up of a member in its enum costs a fifth of a microsecond in Python 3.11.
_TOKEN, _WHOLE, _ENGINE_ERROR = AnswerPart.TOKEN, AnswerPart.WHOLE, AnswerPart.ENGINE_ERROR
_RESPONSES = Route.RESPONSES


class AnswerAccount:
    """What one answer has shown so far.

    Attributes:
        ttft_s: seconds from its arrival to the first token of its stream; None before, and for an answer without one.
        has_answer: whether the engine answered what it was asked.
        error_status: HTTP status that an error in place of its answer or among its events stands for; 0 without one.
    """

    __slots__ = ("_context", "_pieces", "_request", "_route", "error_status", "has_answer", "ttft_s")

    def __init__(self, route: Route, request: ClientRequest, context: ExchangeContext) -> None:
        self._route = route
        self._request = request
        self._context = context
        self._pieces: EventPieces | None = None
        self.ttft_s: float | None = None
        self.has_answer = False
        self.error_status = 0

    def count(self, part: AnswerPart, beginning: AnswerBeginning, sent: InFlightRequest, now_s: float) -> None:
        """Reports the part of an answer with which it begins."""
        dispatcher = self._context.dispatcher
        self.has_answer = part is _TOKEN or part is _WHOLE
        self.error_status = beginning.error_status
        keeps = self.has_answer and self._route is _RESPONSES
        if keeps and (response_id := find_response_id(beginning.body)) is not None:
            self.note_response(response_id, sent)
        if part is _TOKEN:
            dispatcher.answer(sent, now_s, is_first_token=True)
            self.ttft_s = now_s - self._request.arrived_s
            self._context.stats.answer(self.ttft_s, now_s)
        elif part is _ENGINE_ERROR:
            if beginning.is_events:
                self.error_status = find_error(beginning.data) or 500
            dispatcher.count_error(sent.target, now_s)
        elif part is _WHOLE:
            dispatcher.answer(sent, now_s, is_first_token=self._route.only_reads)

    def note_response(self, response_id: str, sent: InFlightRequest) -> None:
        """The engine may keep a response under this id."""
        caller = self._request.caller
        owner = None if caller is None else caller.name
        self._context.dispatcher.record_response(response_id, sent.target, owner)

    def begin(self, beginning: AnswerBeginning, sent: InFlightRequest | None, now_s: float) -> None:
        """A stream begins to pass: looks for an error in its beginning."""
        self._pieces = EventPieces(is_chunked=beginning.is_chunked)
        self.watch(beginning.body, sent, now_s)

    def watch(self, data: bytes, sent: InFlightRequest | None, now_s: float) -> None:
        """Looks at the next bytes of a stream that has begun, for an error among its events."""
        if self._pieces is None:
            return
        events = self._pieces.add(data)
        # Few events have the word, and asking by a call costs more than the look.
        if b"error" in events and may_have_error(events) and sent is not None and not self.error_status:
            self._note_error(events, sent, now_s)

    @property
    def has_last_event(self) -> bool:
        """Whether the last event of a stream has come."""
        return self._pieces is not None and ends_stream(self._pieces.end)

    def _note_error(self, data: bytes, sent: InFlightRequest, now_s: float) -> None:
        self.error_status = status = find_error(data)
        if status and part_of_status(status) is AnswerPart.ENGINE_ERROR:
            self.has_answer = False
            self._context.dispatcher.count_error(sent.target, now_s)

    def sample_tokenisation(self, parsed: Parsed, beginning: AnswerBeginning) -> None:
        """Reads how many tokens the prompt had, where the answer came in one short piece."""
        dispatcher = self._context.dispatcher
        if not dispatcher.samples_tokenisation or parsed.stream or not self._route.has_job:
            return
        if len(beginning.received) > USAGE_WINDOW_BYTES:
            return
        if (tokens := find_prompt_tokens(beginning.received)) is not None:
            dispatcher.learn_tokens(parsed, tokens)

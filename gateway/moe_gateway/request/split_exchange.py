"""An exchange that may compute the prompt at one engine and the answer at another.

It differs from any other exchange until its answer begins. Where the dispatcher chooses a pair, the request first goes
to the one engine for its prompt (`split_bodies.py`); that answer is read here and never passed on. Then it goes to the
other engine, and all is as for any exchange. Whatever goes wrong with the pair before the answer begins, the request
goes whole to one engine, once; a request that ends engines still ends two at most.

Invariants: the parameters of a transfer are sent once, because the first engine frees the blocks when they are fetched;
and never later than its lease less a margin. The request counts at both engines from the choice on, and at neither
after its end.
"""

from dataclasses import dataclass

from moe_contract.gateway_config import Limits
from moe_scheduling.engine.attempts import AttemptFailure
from moe_scheduling.engine.choice import Send
from moe_scheduling.signals import Target

from moe_gateway.engines.engine_death import says_engine_is_dead
from moe_gateway.engines.placements import Placements
from moe_gateway.engines.served_models import find_model
from moe_gateway.engines.target_states import InFlightRequest
from moe_gateway.http.bodies import Body
from moe_gateway.http.routes import Route
from moe_gateway.http.upstream import UpstreamConnection
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.beginning_failure import read_failure
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.exchange import Exchange
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.split_bodies import (
    LONGEST_ANSWER_BYTES,
    ROUTES,
    build_decode_body,
    build_prefill_body,
    can_split,
    read_transfer_params,
)
from moe_gateway.request.stream_events import AnswerPart, split_chunks

# Why a pair was left where neither engine failed; labels of a metric. Others are the phase and the `AttemptFailure`.
REFUSED = "prefill_refused"
NO_PARAMS = "prefill_no_params"
LEASE_OVER = "lease_over"
DECODE_GONE = "decode_gone"
DECODE_ERROR = "decode_error"
CONNECTION_CLOSED = "connection_closed"
_NOT_IMPLEMENTED = 501


@dataclass(slots=True)
class _Pair:
    """The two engines of a request before its answer begins.

    Attributes:
        prefill: where the prompt is computed.
        decode: the choice of the engine that decodes.
        reserved: its count there while the prompt is computed.
        pending_s: the last time at which the prompt was known not to be computed, so that its lease had not begun.
        params: of the transfer, once the prompt is computed; empty before.
    """

    prefill: Target
    decode: Send
    reserved: InFlightRequest
    pending_s: float
    params: bytes = b""


class SplitExchange(Exchange):
    """See `Exchange`; `_pair` is None for a request that goes whole to one engine."""

    __slots__ = ("_counts", "_pair", "_placements")

    def __init__(
        self, request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, context: ExchangeContext
    ) -> None:
        super().__init__(request, route, parsed, client, context)
        self._pair: _Pair | None = None
        self._placements: Placements | None = context.dispatcher.placements
        if self._placements is not None and self.computes:
            self.job = self.job._replace(splits=self._may_split())
        # What cannot be split says nothing about the roles of the engines.
        self._counts = self.job.splits
        if self._placements is not None and self._counts:
            self._placements.load.arrived(self.job.size_tokens, request.arrived_s)

    def _may_split(self) -> bool:
        parsed, request = self.parsed, self.request
        if self.route not in ROUTES or parsed.stays_whole or parsed.media or request.http10:
            return False
        dispatcher = self._context.dispatcher
        if parsed.model is not None:
            # The adapters of two engines may differ under the same name.
            row = find_model(parsed.model, dispatcher.engines.values(), ())
            if row is None or row.get("parent"):
                return False
        return can_split(request.body)

    # 1. The prompt.

    def release(self, decision: Send) -> None:
        """Sends it to the chosen target, or first to the one that computes its prompt."""
        if self._placements is None:
            super().release(decision)
            return
        dispatcher, now_s = self._context.dispatcher, self._context.clock()
        prefill = decision.prefill if self.job.splits else None
        # Once alone: what follows a failure goes whole.
        self.job = self.job._replace(splits=False)
        if self.computes:
            self._placements.count_prompt(self.job, (prefill or decision).target, now_s)
        if prefill is None:
            super().release(decision)
            return
        reserved = dispatcher.reserve(decision.target, now_s)
        self._pair = _Pair(prefill.target, decision._replace(prefill=None), reserved, now_s)
        if self.request.span is not None:
            self.request.span.set_attribute("moeserving.prefill_engine", prefill.target.server)
        super().release(prefill)

    @property
    def _prefilling(self) -> _Pair | None:
        """The pair while the prompt is computed; None else."""
        pair = self._pair
        return None if pair is None or pair.params else pair

    def _begin_attempt(self) -> tuple[bytes, Body]:
        url, body = super()._begin_attempt()
        return url, self._body_of_phase(body)

    def _body_of_phase(self, body: Body) -> Body:
        """The body for the engine that gets the request now, made of that for any engine."""
        if (pair := self._pair) is None:
            return body
        return build_decode_body(body, pair.params) if pair.params else build_prefill_body(self.route, body)

    def received(self, data: bytes, connection: UpstreamConnection) -> None:
        """Bytes of an engine's answer came."""
        if (pair := self._prefilling) is None:
            super().received(data, connection)
            return
        self.last_s = self._context.clock()
        beginning = self._beginning
        beginning.received += data
        if len(beginning.received) > LONGEST_ANSWER_BYTES:
            self._drop_upstream()
            # Answers to `/v1/responses` repeat fields of the client, so that it may have made this one so long.
            self._go_whole(NO_PARAMS, None)
        elif connection.complete:
            self._read_prefill(pair, connection)

    def _read_prefill(self, pair: _Pair, connection: UpstreamConnection) -> None:
        """The first engine has answered."""
        beginning, status = self._beginning, connection.status
        beginning.read(b"", status, computes=False, complete=True)
        body = split_chunks(beginning.body)[0] if beginning.is_chunked else beginning.body
        self._upstream = None
        connection.release()
        if status >= 500 and status != _NOT_IMPLEMENTED:
            self._fail(f"the engine answered {status}", _failure_of(status, beginning.head + body))
        elif status != 200:
            # The other request that a client's error is answered with is the client's own.
            self._go_whole(REFUSED, None)
        elif (params := read_transfer_params(body)) is None:
            self._go_whole(NO_PARAMS, pair.prefill)
        else:
            self._decode(pair, params)

    # 2. The answer.

    def _decode(self, pair: _Pair, params: bytes) -> None:
        """The prompt is computed: sends the request to the other engine."""
        context, dispatcher, target = self._context, self._context.dispatcher, pair.decode.target
        assert self._in_flight is not None
        dispatcher.answer(self._in_flight, self.last_s)
        dispatcher.complete(self._in_flight, self.last_s)
        if self._is_late(pair):
            self._go_whole(LEASE_OVER, None)
            return
        engine = dispatcher.engines.get(target.server)
        is_tried = engine is not None and engine.is_tried_with(pair.reserved.key, self.last_s)
        if not is_tried and not dispatcher.is_accepting(target):
            self._go_whole(DECODE_GONE, None)
            return
        pair.params = params
        dispatcher.settle(self._in_flight, self.last_s)
        context.recent.attempt(self, pair.decode, dispatcher, self.last_s)
        one_token = self.job._replace(prompt_tokens=1, cached={})
        self._in_flight = dispatcher.send(one_token, self._keys, self._session, pair.decode, self.last_s)
        # The first token of a pair says nothing of how fast this engine computes prompts.
        self._in_flight.is_measure = False
        dispatcher.settle(pair.reserved, self.last_s, successor=self._in_flight)
        self._beginning = AnswerBeginning()
        self._send()

    def _is_late(self, pair: _Pair) -> bool:
        assert self._placements is not None
        return self._context.clock() - pair.pending_s >= self._placements.longest_wait_s(pair.prefill.server)

    def _write_request(self, connection: UpstreamConnection) -> None:
        pair = self._pair
        if pair is not None and pair.params and self._is_late(pair):
            connection.abort()
            self._go_whole(LEASE_OVER, None)
        else:
            super()._write_request(connection)

    def _start(self, part: AnswerPart, connection: UpstreamConnection) -> None:
        pair = self._pair
        if pair is not None and part is not AnswerPart.ENGINE_ERROR:
            self._pair = None
            if part is not AnswerPart.REFUSAL and self._placements is not None:
                self._placements.note_transfer(pair.prefill.server, pair.decode.target.server)
        super()._start(part, connection)

    # Failures, before the answer begins.

    def _go_whole(self, reason: str, failed: Target | None, *, counts: bool = False) -> None:
        """Leaves the pair where no engine failed as one; `counts`: an engine may have begun to work on the request."""
        assert self._in_flight is not None
        now_s = self._context.clock()
        self._leave_pair(reason, failed)
        if not counts:
            self.attempts.move(now_s)
        self._context.dispatcher.settle(self._in_flight, now_s)
        self._retry()

    def _leave_pair(self, reason: str, failed: Target | None) -> None:
        pair, self._pair = self._pair, None
        if pair is not None and self._placements is not None:
            now_s = self._context.clock()
            self._context.dispatcher.settle(pair.reserved, now_s)
            self._placements.fall_back(reason, None if failed is None else failed.server, now_s)

    def _fail(self, reason: str, failure: AttemptFailure = AttemptFailure.BROKEN) -> None:
        if (pair := self._pair) is not None:
            phase, failed = ("decode", pair.decode.target) if pair.params else ("prefill", pair.prefill)
            self._leave_pair(f"{phase}_{failure.value}", failed)
        super()._fail(reason, failure)

    def _retry_error(self) -> bool:
        pair = self._pair
        if pair is None or read_failure(self._beginning) is AttemptFailure.ENGINE_DEAD:
            return super()._retry_error()
        # The transfer may have failed because of either engine, so neither is ejected.
        self._drop_upstream()
        self._go_whole(DECODE_ERROR, pair.decode.target, counts=True)
        return True

    def lost(self, connection: UpstreamConnection, reason: str) -> None:
        """The engine ended the connection before its answer was whole."""
        if self._prefilling is None:
            super().lost(connection, reason)
            return
        self._upstream = None
        if connection.reused and not self._beginning.received:
            self._send_anew()
        else:
            self._fail(reason)

    def _send_anew(self) -> None:
        if self._pair is None:
            super()._send_anew()
        else:
            self._go_whole(CONNECTION_CLOSED, None, counts=True)

    # Time, and the end.

    def pause(self) -> None:
        """As for any exchange; the short answer about a prompt is read at once, as its lease runs."""
        if self._prefilling is None:
            super().pause()
        else:
            self._paused = True

    def check(self, now_s: float, limits: Limits) -> None:
        """As for any exchange; notes that the prompt is not computed yet."""
        if (pair := self._prefilling) is not None:
            pair.pending_s = now_s
        super().check(now_s, limits)

    def _end_silent(self, target: Target, now_s: float, idle_timeout_s: float) -> None:
        if self._pair is None or self._context.dispatcher.is_working(target, now_s, idle_timeout_s):
            super()._end_silent(target, now_s, idle_timeout_s)
            return
        self._drop_upstream()
        self._fail(f"nothing moved for {idle_timeout_s:g} s", AttemptFailure.ENGINE_ERROR)

    def _end(self, status: int, reason: str = "", *, refusal: str = "", broken: bool = False) -> None:
        context = self._context
        if (pair := self._pair) is not None:
            self._pair = None
            context.dispatcher.settle(pair.reserved, context.clock())
        if self._placements is not None and self.computes and status < 400 and not broken and not refusal:
            self._note_end(self._placements)
        super()._end(status, reason, refusal=refusal, broken=broken)

    def _note_end(self, placements: Placements) -> None:
        if self._in_flight is not None and self._counts:
            lasted_s = self.last_s - self.request.arrived_s
            answer_s = None if self.ttft_s is None else lasted_s - self.ttft_s
            placements.note_end(self._in_flight.target, answer_s, lasted_s, self.last_s)


def _failure_of(status: int, answer: bytes) -> AttemptFailure:
    if says_engine_is_dead(answer):
        return AttemptFailure.ENGINE_DEAD
    return AttemptFailure.ENGINE_FULL if status == 503 else AttemptFailure.ENGINE_ERROR

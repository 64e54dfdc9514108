"""One request of a proxy: the messages of its gRPC stream, from the head of the request to the end of the answer.

The body of a request comes whole (`BUFFERED`) or in parts in both directions (`FULL_DUPLEX_STREAMED`); either way the
pick follows its end. Where the proxy sends no body, or will not wait for the pick, the pick follows the head.

States: head -> body -> picked -> answer. The stream ends when the proxy closes it, and with an answer at once.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from moe_contract.peer_tokens import HEADER as PEER_HEADER

from moe_gateway.endpoint_picker import proxy_messages, wire
from moe_gateway.endpoint_picker.admission import (
    PickerParts,
    Refusal,
    admit,
    check_head,
    find_own_answer,
    read_body,
    refuse_length,
    refuse_unseen,
)
from moe_gateway.endpoint_picker.answer_head import read_answer_head
from moe_gateway.endpoint_picker.picked_request import Pick, PickedRequest, endpoint_of
from moe_gateway.endpoint_picker.read_ahead import ReadAhead
from moe_gateway.endpoint_picker.request_head import Headers, body_length, find_given, find_removed, read_head
from moe_gateway.endpoint_picker.wire import Message
from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.http.bodies import Body, LargeBody, build_body
from moe_gateway.http.cors import insert_lines, is_preflight
from moe_gateway.http.heads import RANK_HEADER
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route, find_route
from moe_gateway.request.context import ClientRequest, ClientSide
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.rejections import REJECTIONS

OTHER = "other"
NO_BODY = "a request with trailers needs a body"
Replies = list[Message]


@dataclass(slots=True)
class _Head:
    """The head of a request, and how its bodies come.

    Attributes:
        headers: as they came.
        request: the same as the gateway has it.
        route: where it goes.
        servers: names of the engines that the proxy can reach; None: all.
        mode: how the body of the request comes.
        answer_mode: how the body of the answer comes.
    """

    headers: Headers
    request: ClientRequest
    route: Route
    servers: frozenset[str] | None
    mode: int
    answer_mode: int

    @property
    def picks_at_once(self) -> bool:
        """Whether the pick cannot wait for the body."""
        return self.mode in (wire.NONE, wire.STREAMED)


class SilentRequest(Exception):
    """Neither the engine nor the client has moved anything for long; the proxy has to end the request."""


class AbortedStream(Exception):
    """The gateway has given a request up by a fault of its own; the proxy has to end it."""


class Stream:
    """The exchange of messages about one request.

    Args:
        parts: of the gateway.
    """

    def __init__(self, parts: PickerParts) -> None:
        self._parts = parts
        self._head: _Head | None = None
        self._pieces: list[bytes] = []
        self._length = 0
        self._picked: PickedRequest | None = None
        self._refused = self._is_aborted = False
        self._task: asyncio.Task[None] | None = None

    async def run(self, messages: AsyncIterator[Message], write: Callable[[Message], Awaitable[None]]) -> None:
        """Writes the replies to the messages of a proxy; ends with them, or after an answer at once.

        Raises:
            AbortedStream: `abort` was called.
            SilentRequest: nothing has moved for the idle timeout.
        """
        incoming, self._task = ReadAhead(messages), asyncio.current_task()
        try:
            while not self._refused and (message := await incoming.take()) is not None:
                for reply in await self._reply(message, incoming):
                    await write(reply)
        except asyncio.CancelledError:
            if self._task is None or not self._is_aborted:
                raise
            self._task.uncancel()
            is_silent = self._picked is not None and self._picked.is_silent
            raise (SilentRequest if is_silent else AbortedStream) from None
        finally:
            incoming.close()
            self._end()

    def check(self, now_s: float) -> None:
        """Called a few times a second: ends what took too long."""
        picked = self._picked
        if picked is not None and picked.check(now_s, self._parts.limits.idle_timeout_s):
            self.abort()

    def abort(self) -> None:
        """Ends the stream before its answer is whole."""
        if self._task is not None:
            self._is_aborted = True
            self._task.cancel()

    def _end(self) -> None:
        if self._picked is not None:
            self._parts.open.discard(self)
            self._picked.leave()
        elif self._head is not None and not self._refused:
            outcome, route = RequestOutcome.CLIENT_GONE, self._head.route
            self._parts.context.stats.finish(route.label, outcome.status, refusal=outcome.label)

    async def _reply(self, message: Message, incoming: ReadAhead[Message]) -> Replies:
        match message.WhichOneof("request"):
            case "request_headers":
                return await self._read_head(message, incoming)
            case "request_body":
                return await self._read_body(message.request_body, incoming)
            case "request_trailers":
                return await self._read_trailers(incoming)
            case _:
                return self._pass_answer(message)

    # The request.

    async def _read_head(self, message: Message, incoming: ReadAhead[Message]) -> Replies:
        if self._head is not None:
            return []
        headers = proxy_messages.read_headers(message.request_headers.headers)
        parts = self._parts
        request = read_head(headers, parts.new_request_id(), parts.context.clock())
        checked = check_head(request, body_length(headers), parts)
        if isinstance(checked, Refusal):
            # Its error has the shape of the API that was asked.
            return self._refuse(request, find_route(request.url), checked)
        own = find_own_answer(request, checked, parts)
        if isinstance(own, Refusal):
            return self._refuse(request, checked, own)
        if own is not None:
            parts.context.stats.finish(checked.label, 200)
            return self._answer_at_once(request, own)
        mode, answer_mode = proxy_messages.read_body_modes(message)
        subset = proxy_messages.read_subset(message.metadata_context)
        self._head = _Head(headers, request, checked, self._name_servers(subset), mode, answer_mode)
        has_body = not message.request_headers.end_of_stream
        if not has_body or self._head.picks_at_once:
            return await self._pick(incoming, is_body_known=not has_body)
        # In both directions the proxy waits with the head for the answer to it, which follows the whole body.
        # Otherwise it may never ask again, and goes on with this head where trailers follow that it does not send.
        removed = find_removed(headers, request.headers, ())
        return [] if mode == wire.FULL_DUPLEX else [proxy_messages.await_body(removed)]

    def _name_servers(self, subset: frozenset[str] | None) -> frozenset[str] | None:
        if subset is None:
            return None
        engines = self._parts.context.dispatcher.engines.values()
        return frozenset(engine.address.name for engine in engines if endpoint_of(engine.address) in subset)

    async def _read_body(self, body: Message, incoming: ReadAhead[Message]) -> Replies:
        head = self._head
        if head is None:
            return []
        if self._picked is not None:
            return [proxy_messages.continue_body(body, head.mode, of_answer=False)]
        self._pieces.append(body.body)
        self._length += len(body.body)
        most_bytes = self._parts.limits.max_body_bytes
        if self._length > most_bytes:
            return self._refuse(head.request, head.route, refuse_length(most_bytes))
        ends = body.end_of_stream
        if not ends and head.mode == wire.FULL_DUPLEX:
            return []
        # A buffered body may be followed by trailers; one that is buffered in part may lack its end.
        return await self._pick(incoming, is_body_known=ends or head.mode == wire.BUFFERED, ends=ends)

    async def _read_trailers(self, incoming: ReadAhead[Message]) -> Replies:
        replies = [proxy_messages.continue_trailers(of_answer=False)]
        if self._head is None or self._picked is not None:
            return replies
        if self._head.mode != wire.FULL_DUPLEX:
            # The head has gone on, and no message about trailers can say where.
            return self._refuse(self._head.request, self._head.route, Refusal(RequestOutcome.BAD_REQUEST, NO_BODY))
        picked = await self._pick(incoming, is_body_known=True, ends=False)
        return picked if self._refused or not picked else picked + replies

    async def _pick(self, incoming: ReadAhead[Message], *, is_body_known: bool, ends: bool = True) -> Replies:
        """Picks an engine, perhaps after a while; no reply where the client leaves meanwhile.

        Args:
            incoming: shows that the client leaves.
            is_body_known: the whole body has come.
            ends: no trailers follow it.
        """
        head, parts = self._head, self._parts
        assert head is not None
        request = head.request
        request.body = original = build_body(self._pieces) if self._pieces else b""
        parsed = await read_body(request, head.route, parts, incoming, is_known=is_body_known)
        if parsed is None:
            return []
        admitted = parsed if isinstance(parsed, Refusal) else self._admit(head, parsed)
        if isinstance(admitted, Refusal):
            return self._refuse(request, head.route, admitted)
        parsed, client = admitted
        picked = PickedRequest(request, head.route, parsed, client, parts.context, head.servers)
        self._picked = picked
        parts.open.add(self)
        picked.begin()
        decision = await incoming.unless_ended(picked.decided)
        if decision is None:
            return []
        pick = None if isinstance(decision, Rejection) else picked.describe(decision, parts.settings.fallbacks)
        # An engine that exchanges blocks may have come while the request was held.
        unseen = None if is_body_known else refuse_unseen(head.route, parts)
        if pick is None or unseen is not None:
            rejection = decision if isinstance(decision, Rejection) else Rejection.NO_FITTING_ENGINE
            return self._end_refused(picked, unseen or self._explain(rejection))
        changed = None if request.body is original else request.body
        return self._send(pick, head, original, changed, ends=ends)

    def _admit(self, head: _Head, parsed: Parsed) -> tuple[Parsed, ClientSide] | Refusal:
        shows_answer = head.answer_mode not in (wire.NONE, wire.BUFFERED_PARTIAL)
        return admit(head.request, head.route, parsed, self._parts, shows_answer=shows_answer)

    def _send(self, pick: Pick, head: _Head, original: Body, changed: Body | None, *, ends: bool) -> Replies:
        given = {"x-request-id": pick.request_id}
        if pick.rank is not None:
            given[RANK_HEADER.decode()] = b"%d" % pick.rank
        if pick.engine.agent_url is not None and (signed := self._parts.sign_request(head.request)):
            given[PEER_HEADER] = signed
        given |= find_given(head.headers, head.request.headers)
        removed = find_removed(head.headers, head.request.headers, given)
        if not self._pieces:
            return [proxy_messages.pick_at_headers(pick.endpoints, given, removed)]
        if head.mode == wire.FULL_DUPLEX:
            body = _split(original if changed is None else changed)
            return [
                proxy_messages.pick_at_headers(pick.endpoints, given, removed),
                *proxy_messages.send_body(body, end=ends),
            ]
        new = None if changed is None else b"".join(_split(changed))
        if new is not None:
            # Envoy refuses a new body that has another length than the head says.
            given["content-length"] = b"%d" % len(new)
        return [proxy_messages.pick_at_body(pick.endpoints, given, removed, new)]

    # Answers without an engine.

    def _explain(self, rejection: Rejection) -> Refusal:
        outcome, message = REJECTIONS[rejection]
        context = self._parts.context
        return Refusal(outcome, message, retry_after_s=context.dispatcher.retry_after_s(context.clock()))

    def _end_refused(self, picked: PickedRequest, refusal: Refusal) -> Replies:
        outcome = refusal.outcome
        picked.end(outcome.status, refusal.message, refusal=outcome.label)
        return self._answer_at_once(picked.request, refusal.build(picked.request, picked.route))

    def _refuse(self, request: ClientRequest, route: Route | None, refusal: Refusal) -> Replies:
        outcome = refusal.outcome
        label = OTHER if route is None else route.label
        self._parts.context.stats.finish(label, outcome.status, refusal=outcome.label)
        return self._answer_at_once(request, refusal.build(request, route))

    def _answer_at_once(self, request: ClientRequest, answer: bytes) -> Replies:
        self._refused = True
        if not is_preflight(request.method, request.headers):
            answer = insert_lines(answer, self._parts.context.cors.answer_lines(request.headers))
        return [proxy_messages.answer_at_once(answer)]

    # The answer.

    def _pass_answer(self, message: Message) -> Replies:
        match message.WhichOneof("request"):
            case "response_headers":
                return self._pass_answer_head(message)
            case "response_body":
                return self._pass_answer_body(message.response_body)
            case "response_trailers":
                self._pass(b"", complete=True)
                return [proxy_messages.continue_trailers(of_answer=True)]
            case _:
                return []

    def _pass_answer_head(self, message: Message) -> Replies:
        head = message.response_headers
        if self._picked is not None:
            shows_body = self._head is not None and self._head.answer_mode != wire.NONE
            self._picked.answer_begins(read_answer_head(message), shows_body=shows_body)
            if head.end_of_stream:
                self._pass(b"", complete=True)
        return [proxy_messages.continue_answer()]

    def _pass_answer_body(self, body: Message) -> Replies:
        self._pass(body.body, complete=body.end_of_stream)
        mode = wire.NONE if self._head is None else self._head.answer_mode
        return [proxy_messages.continue_body(body, mode, of_answer=True)]

    def _pass(self, data: bytes, *, complete: bool) -> None:
        if self._picked is not None:
            self._picked.answer_passes(data, complete=complete)


def _split(body: Body) -> tuple[bytes, ...]:
    return body.parts if isinstance(body, LargeBody) else (body,)

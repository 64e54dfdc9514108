"""What comes before the pick: route, keys, quotas, the fields of the body; with the errors that the gateway gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from moe_contract.gateway_config import Limits
from moe_contract.peer_tokens import PeerTokens
from moe_contract.picker_config import EndpointPickerConfig

from moe_gateway.access.deadlines import read_deadline
from moe_gateway.access.denials import Denial
from moe_gateway.access.priorities import read_priority
from moe_gateway.endpoint_picker.picked_request import NobodyReads
from moe_gateway.endpoint_picker.read_ahead import ReadAhead
from moe_gateway.engines.served_models import find_model, list_models, model_row
from moe_gateway.http.bodies import BodyRefused
from moe_gateway.http.cors import is_preflight
from moe_gateway.http.replies import RequestOutcome, build_error, build_health, build_models, build_preflight
from moe_gateway.http.routes import Route, find_route, read_model_name, strip_authority
from moe_gateway.request.body_reader import needs_reader
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.parsing import BadBody, Parsed
from moe_gateway.request.reading import NO_BODY, read_request
from moe_gateway.request.rejections import explain_lost_response, explain_unknown_model

BODY_UNKNOWN = "the proxy does not send the endpoint picker whole bodies of requests, which keys need"
TRANSFERS_UNKNOWN = (
    "the proxy does not send the endpoint picker whole bodies of requests, which engines that exchange KV blocks need"
)
ANSWER_UNKNOWN = "the proxy does not send the endpoint picker whole bodies of answers, which quotas of tokens need"


class Checked(Protocol):
    """A stream that is checked a few times a second."""

    def check(self, now_s: float) -> None:
        """Ends it where it took too long."""

    def abort(self) -> None:
        """Ends the stream before its answer is whole."""


@dataclass(slots=True, kw_only=True)
class PickerParts:
    """What streams of a proxy share.

    Attributes:
        context: the gateway's parts.
        settings: of the endpoint picker.
        limits: of one request.
        new_request_id: names a request that has no usable id of its own.
        peer_tokens: show an engine that a request was picked by its deployment's own; None without a file of them.
        open: streams whose requests were picked and have not ended.
    """

    context: ExchangeContext
    settings: EndpointPickerConfig
    limits: Limits
    new_request_id: Callable[[], bytes]
    peer_tokens: PeerTokens | None
    open: set[Checked] = field(default_factory=set)

    def sign_request(self, request: ClientRequest) -> bytes:
        """The header that shows an engine that its gateway has picked it; empty without tokens.

        Also where clients need no keys: after `gateway.auth` was removed, old engines are still guarded.
        """
        if self.peer_tokens is None:
            return b""
        return self.peer_tokens.sign(request.method, request.url.partition(b"?")[0])


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes to no engine; the attributes are those of `build_error`."""

    outcome: RequestOutcome
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    challenge: bytes = b""
    allow: bytes | None = None

    def build(self, request: ClientRequest, route: Route | None) -> bytes:
        """The HTTP response, in the shape of the API that was asked."""
        return build_error(
            self.outcome,
            self.message,
            request_id=request.request_id,
            param=self.param,
            retry_after_s=self.retry_after_s,
            challenge=self.challenge,
            allow=self.allow,
            is_anthropic=route is not None and route.is_anthropic,
        )


def check_head(request: ClientRequest, body_bytes: int, parts: PickerParts) -> Route | Refusal:
    """The route of a request, or why it gets none; takes its credentials out where keys are needed."""
    request.url = strip_authority(request.url)
    route = find_route(request.url)
    if route is None:
        return Refusal(RequestOutcome.NOT_FOUND, "no such path here")
    if is_preflight(request.method, request.headers):
        return route
    if request.method != route.method and not (route is Route.HEALTH and request.method == b"HEAD"):
        message = f"this path takes {route.method.decode()} alone"
        return Refusal(RequestOutcome.METHOD_NOT_ALLOWED, message, allow=route.method)
    if body_bytes > parts.limits.max_body_bytes:
        return refuse_length(parts.limits.max_body_bytes)
    gate = parts.context.gate
    denial = None if gate is None or route is Route.HEALTH else gate.identify(request)
    if denial is None and gate is not None:
        denial = gate.look(request, route)
    return route if denial is None else _as_refusal(denial)


def refuse_length(most_bytes: int) -> Refusal:
    """The answer to a body that is too large."""
    return Refusal(RequestOutcome.BODY_TOO_LARGE, f"the body is larger than {most_bytes} bytes")


def _as_refusal(denial: Denial) -> Refusal:
    return Refusal(denial.outcome, denial.message, denial.param, denial.retry_after_s, denial.challenge)


def find_own_answer(request: ClientRequest, route: Route, parts: PickerParts) -> bytes | Refusal | None:
    """The answer to what no engine is asked for, as the gateway gives it; None: an engine answers."""
    context, request_id = parts.context, request.request_id
    if is_preflight(request.method, request.headers):
        if lines := context.cors.preflight_lines(request.headers):
            return build_preflight(request_id, lines, close=False)
        return Refusal(RequestOutcome.BAD_REQUEST, "this origin is not allowed")
    if route is Route.HEALTH:
        if context.dispatcher.accepting and not context.draining:
            return build_health(request_id, close=False, head_only=request.method == b"HEAD")
        return Refusal(RequestOutcome.NO_ENGINE, "no engine accepts requests", retry_after_s=1)
    if route is Route.MODEL:
        return _find_model(read_model_name(request.url), request_id, context)
    document = _list_models(context) if route is Route.MODELS else None
    return None if document is None else build_models(document, request_id, close=False)


def _find_model(name: str, request_id: bytes, context: ExchangeContext) -> bytes | Refusal:
    dispatcher = context.dispatcher
    row = find_model(name, dispatcher.engines.values(), dispatcher.models)
    return refuse_model(name, context) if row is None else build_models(row, request_id, close=False)


def refuse_model(name: str, context: ExchangeContext) -> Refusal:
    """The answer to a request for a model that no engine serves."""
    message = explain_unknown_model(name, context.dispatcher.models)
    return Refusal(RequestOutcome.MODEL_NOT_FOUND, message, "model")


def _list_models(context: ExchangeContext) -> object | None:
    """The list of models where no engine alone has it."""
    dispatcher, model = context.dispatcher, context.model
    if dispatcher.partial_models:
        return list_models(dispatcher.engines.values())
    if not dispatcher.accepting and model:
        return {"object": "list", "data": [model_row(model)]}
    return None


async def read_body(
    request: ClientRequest, route: Route, parts: PickerParts, messages: ReadAhead[object], *, is_known: bool
) -> Parsed | Refusal | None:
    """The fields of a body; of one that has not come whole none are known. None: the client has left."""
    if not is_known:
        return refuse_unseen(route, parts) or NO_BODY
    try:
        read_deadline(request)
        if route.method != b"POST" or not needs_reader(request):
            return read_request(route, request)
        gate = parts.context.gate
        if gate is not None and (denial := gate.reserve(request)) is not None:
            return _as_refusal(denial)
        return await messages.unless_ended(parts.context.bodies.read(request, route, parts.limits.max_body_bytes))
    except BadBody as error:
        return Refusal(RequestOutcome.BAD_REQUEST, str(error), error.param)
    except BodyRefused as error:
        return Refusal(error.outcome, str(error))
    finally:
        if request.place is not None:
            request.place.free()


def refuse_unseen(route: Route, parts: PickerParts) -> Refusal | None:
    """The answer to a request whose body is not seen, where nobody else would check it; None: it may go on."""
    if route.method != b"POST":
        return None
    if parts.context.gate is not None:
        # Whose response is continued, and the priority of a key, are in the body.
        return Refusal(RequestOutcome.INTERNAL_ERROR, BODY_UNKNOWN)
    if any(engine.exchanges_blocks for engine in parts.context.dispatcher.engines.values()):
        # They fetch blocks from whatever address a client writes there.
        return Refusal(RequestOutcome.INTERNAL_ERROR, TRANSFERS_UNKNOWN)
    return None


def admit(
    request: ClientRequest, route: Route, parsed: Parsed, parts: PickerParts, *, shows_answer: bool
) -> tuple[Parsed, ClientSide] | Refusal:
    """Checks model, response and quota; the second part counts what passes of the answer.

    Args:
        request: from a caller that was identified, where keys are needed.
        route: of the request.
        parsed: its body.
        parts: of the gateway.
        shows_answer: the whole body of the answer will pass.
    """
    context, client, parsed = parts.context, NobodyReads(), read_priority(request, route, parsed)
    dispatcher, gate, previous = context.dispatcher, context.gate, parsed.previous_response
    if parsed.model is not None and dispatcher.models and parsed.model not in dispatcher.models:
        return refuse_model(parsed.model, context)
    owner = None if request.caller is None else request.caller.name
    if previous is not None and dispatcher.is_lost(previous, owner):
        param = "response_id" if route.names_response else "previous_response_id"
        return Refusal(RequestOutcome.RESPONSE_NOT_FOUND, explain_lost_response(previous), param)
    if gate is None or request.caller is None or route is Route.MODELS:
        return parsed, client
    if route.has_job and not shows_answer and gate.counts_tokens(request.caller):
        return Refusal(RequestOutcome.INTERNAL_ERROR, ANSWER_UNKNOWN)
    admitted = gate.admit(request, route, parsed, client, dispatcher.count_tokens(parsed))
    return _as_refusal(admitted) if isinstance(admitted, Denial) else admitted

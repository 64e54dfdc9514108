"""A request that waits before its dispatch: for its body to be read, for the names of models, and for the engine of the
response that it names.

That engine is looked for where another gateway has passed the response on.
"""

from moe_scheduling.signals import Target

from moe_gateway.engines.response_search import SearchIncomplete
from moe_gateway.http.bodies import BodyRefused
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route, url_of_response
from moe_gateway.request.context import ClientRequest, ExchangeContext
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.pending_body import PendingBody

INCOMPLETE = "no engine is known to have the response {!r}, and one that may have it does not answer"


def needs_search(context: ExchangeContext, request: ClientRequest, parsed: Parsed) -> bool:
    """Whether the engines are to be asked for a response; a tenant's responses are known to their gateway alone."""
    previous = parsed.previous_response
    if previous is None or request.caller is not None or not context.dispatcher.is_lost(previous):
        return False
    return url_of_response(previous) is not None


def is_unknown(context: ExchangeContext, parsed: Parsed) -> bool:
    """Whether a request names a model that no engine has listed, while all that are ready have listed theirs."""
    dispatcher, model = context.dispatcher, parsed.model
    models = dispatcher.models
    return model is not None and bool(models) and model not in models and dispatcher.knows_all_models


async def read_pending(
    pending: PendingBody, request: ClientRequest, route: Route, context: ExchangeContext, most_bytes: int
) -> Parsed:
    """Reads the body of a request where that is still to be done, and looks for its model and its response.

    Args:
        pending: the request while it waits.
        request: whose body and headers are replaced where the body is compressed.
        route: of the request.
        context: the gateway's parts.
        most_bytes: largest size of a decoded body.

    Raises:
        BadBody: the body cannot be dispatched.
        BodyRefused: it cannot be decoded or parsed, nobody waits for it, or an engine that may have the response does
            not answer.
    """
    parsed = pending.parsed
    if parsed is None:
        parsed = await context.bodies.read(request, route, most_bytes, lambda: not pending.is_over)
    if context.names is not None and is_unknown(context, parsed):
        await context.names.refresh()
    if needs_search(context, request, parsed):
        await _search(pending, context, request, parsed)
    return parsed


async def _search(pending: PendingBody, context: ExchangeContext, request: ClientRequest, parsed: Parsed) -> None:
    """Asks all engines for a response, and records which one has it.

    Nobody is asked where the client is gone when the turn comes, or another search has found the response by then.
    """
    dispatcher, previous = context.dispatcher, parsed.previous_response
    if previous is None or (url := url_of_response(previous)) is None:
        return

    def is_wanted() -> bool:
        return not pending.is_over and dispatcher.is_lost(previous)

    try:
        server = await context.responses.find(url, dispatcher.engines.values(), request.request_id, is_wanted)
    except SearchIncomplete:
        raise BodyRefused(RequestOutcome.NO_ENGINE, INCOMPLETE.format(previous), retry_after_s=1) from None
    if server is not None and server in dispatcher.engines:
        dispatcher.record_response(previous, Target(server, 0))

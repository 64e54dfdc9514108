"""Makes the exchange of a request, of the kind that the gateway's configuration asks for."""

from moe_gateway.continuation.find import find_continuation
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest, ClientSide, ExchangeContext
from moe_gateway.request.continued_exchange import ContinuedExchange
from moe_gateway.request.exchange import Exchange
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.split_exchange import SplitExchange


def make_exchange(
    request: ClientRequest, route: Route, parsed: Parsed, client: ClientSide, context: ExchangeContext
) -> Exchange:
    """Returns the exchange of a request."""
    if (settings := context.continuation) is not None:
        found = find_continuation(request, route, parsed, settings)
        if found is not None:
            return ContinuedExchange(request, route, parsed, client, context, found)
    kind = Exchange if context.dispatcher.placements is None else SplitExchange
    return kind(request, route, parsed, client, context)

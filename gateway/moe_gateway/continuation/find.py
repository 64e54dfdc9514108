"""Finds out whether the stream of a request can go on at another engine, and keeps its state then."""

import orjson
from moe_contract.gateway_config import ContinuedStreams

from moe_gateway.continuation.chunk_stream import ChunkStream
from moe_gateway.continuation.event_stream import EventStream
from moe_gateway.continuation.stream import Continuation
from moe_gateway.continuation.ways import EVENT_ROUTES, ROUTES, find_way, is_repeatable
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import Parsed


def find_continuation(
    request: ClientRequest, route: Route, parsed: Parsed, settings: ContinuedStreams
) -> Continuation | None:
    """The state of a stream that can go on at another engine; None for any other request.

    Args:
        request: of the client.
        route: of the request.
        parsed: its fields.
        settings: of the gateway.
    """
    body = request.body
    if not parsed.stream or route not in ROUTES or request.http10 or type(body) is not bytes:
        return None
    if b'"temperature"' not in body and b'"seed"' not in body:
        return None
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if route in EVENT_ROUTES:
        return EventStream(request, route, document) if is_repeatable(route, document) else None
    by_prefix = settings.chats_by_prefix if route is Route.CHAT else settings.completions_by_prefix
    way = find_way(route, document, has_media=bool(parsed.media), by_prefix=by_prefix)
    return None if way is None else ChunkStream(request, route, document, way)

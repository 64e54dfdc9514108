"""Finds the route of a request target. The list is closed, so that no admin route of an engine can be reached. Pure."""

import re
from urllib.parse import unquote_to_bytes

from moe_contract.serving_routes import Route

__all__ = ["ROUTES", "Route", "find_route", "read_model_name", "read_response_id", "url_of_response"]

ROUTES: dict[bytes, Route] = {route.path: route for route in Route if b"{" not in route.path}
_RESPONSE = re.compile(rb"/v1/responses/(?!\.{1,2}(?:/|\Z))([A-Za-z0-9._~:-]{1,200})(/cancel)?")
_MODEL = re.compile(rb"/v1/models/([!-~]{1,1000})")


def strip_authority(target: bytes) -> bytes:
    """The path and query of a request target that names a host too (RFC 9112, 3.2.2); any other target as it is."""
    return _ABSOLUTE.sub(b"/", target, count=1) if target[:1] != b"/" else target


_ABSOLUTE = re.compile(rb"\Ahttps?://[^/?#]+(?:/|(?=\?)|\Z)", re.IGNORECASE)


def find_route(url: bytes) -> Route | None:
    """The route of a request target; None unless its path, without a query, is spelt exactly."""
    path = url if b"?" not in url else url[: url.index(b"?")]
    route = ROUTES.get(path)
    if route is not None:
        return route
    if (found := _RESPONSE.fullmatch(path)) is not None:
        return Route.RESPONSE_CANCEL if found[2] else Route.RESPONSE
    return Route.MODEL if _MODEL.fullmatch(path) is not None else None


def read_response_id(url: bytes) -> str:
    """The id in the target of a route that names a response."""
    found = _RESPONSE.match(url)
    return "" if found is None else found[1].decode()


def url_of_response(response_id: str) -> bytes | None:
    """The target of a response; None for an id that no target can have."""
    url = b"/v1/responses/" + response_id.encode("utf-8", "surrogatepass")
    found = _RESPONSE.fullmatch(url)
    return url if found is not None and not found[2] else None


def read_model_name(url: bytes) -> str:
    """The name in the target of `Route.MODEL`; clients spell a slash in it as it is or percent-encoded."""
    found = _MODEL.fullmatch(url.partition(b"?")[0])
    return "" if found is None else unquote_to_bytes(found[1]).decode("utf-8", "replace")

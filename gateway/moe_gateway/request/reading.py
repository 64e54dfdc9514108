"""Reads what dispatch needs of a whole request, by the kind of its route. Pure."""

from moe_gateway.http.routes import Route, read_response_id
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.form import parse_form
from moe_gateway.request.parsing import Parsed, parse_body

NO_BODY = Parsed(model=None, stream=False, priority=0, user=None, prompt=b"", prompt_tokens=0)


def read_request(route: Route, request: ClientRequest) -> Parsed:
    """The model, the size and the rest that dispatch needs.

    Raises:
        BadBody: the body cannot be dispatched.
    """
    if route.names_response:
        stream = b"stream=true" in request.url.lower()
        return NO_BODY._replace(stream=stream, previous_response=read_response_id(request.url))
    if route.method != b"POST":
        return NO_BODY
    assert isinstance(request.body, bytes)
    if route.is_form:
        return parse_form(request.headers, request.body)
    return parse_body(route, request.body, bounds_answer=request.caller is not None)

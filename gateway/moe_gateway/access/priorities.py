"""The priority of a request: what its client asks for, and the class of its key. Pure.

Lower is more urgent. A client asks by the field `priority` of a body, or by the header `X-Vllm-Priority`, which counts
before the field in vLLM. The class is the level of a key's requests: what the client asks for counts from there, and a
negative one as 0, so that no client raises itself above its class. Engines read the level where the client could have
written it, and the plugin in an engine reads it in the id of the request, on each route.
"""

import json
import re

from moe_contract.tenancy import sign_request_id
from moe_scheduling.request.fairness import ANONYMOUS_TENANT
from moe_scheduling.request.order import LARGEST_EXACT, clamp_priority

from moe_gateway.http.bodies import Body, LargeBody, split_body
from moe_gateway.http.rare_headers import PRIORITY
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import Parsed

_MARK = PRIORITY + b":"
_LINE = re.compile(rb"(?:(?<=\n)|\A)%b([^\r\n]*)\r\n" % _MARK, re.IGNORECASE)
# vLLM reads the header on these routes alone.
_READS_HEADER = frozenset({Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES})


def read_priority(request: ClientRequest, route: Route, parsed: Parsed) -> Parsed:
    """The fields of a body with the priority that the head asks for, where vLLM reads it there."""
    if _MARK not in request.headers.lower() or route not in _READS_HEADER:
        return parsed
    found = _LINE.search(request.headers)
    try:
        # vLLM ignores a value that is no integer.
        asked = parsed.priority if found is None else int(found[1].decode("latin-1"))
    except ValueError:
        return parsed
    return parsed._replace(priority=clamp_priority(asked))


def apply_class(request: ClientRequest, route: Route, parsed: Parsed, level: int) -> Parsed:
    """Gives a request, by its head and its body, the priority that it has within a class.

    Args:
        request: whose headers and body are replaced.
        route: of the request.
        parsed: its body, with the priority that the client asks for.
        level: of the class.
    """
    priority = class_priority(parsed.priority, level)
    headers = _LINE.sub(b"", request.headers) if _MARK in request.headers.lower() else request.headers
    asked_by_head = headers is not request.headers
    # At the bound the body may say more than was read.
    is_other = priority != parsed.priority or parsed.priority == LARGEST_EXACT
    if asked_by_head or route is Route.MESSAGES:
        request.headers = b"%b%b: %d\r\n" % (headers, PRIORITY, priority)
    # Forms and Anthropic's bodies have no field for it.
    if (asked_by_head or is_other) and not route.is_form and route is not Route.MESSAGES:
        request.body = write_priority(request.body, priority)
    return parsed._replace(priority=priority)


def build_engine_id(request: ClientRequest, tenant: str, priority: int, *, is_fair: bool) -> bytes:
    """The id of a request for its engine, in which nothing that the client wrote is a tenant or a priority.

    Args:
        request: of the client.
        tenant: whose it is.
        priority: its level.
        is_fair: whether engines distinguish tenants.
    """
    if request.caller is not None and request.caller.priority is not None:
        return sign_request_id(request.request_id, tenant, priority)
    return sign_request_id(request.request_id, tenant if is_fair else ANONYMOUS_TENANT)


def class_priority(asked: int, level: int) -> int:
    """The level of a request that asks for `asked` within a class."""
    return level + min(max(0, asked), LARGEST_EXACT)


def write_priority(body: Body, priority: int) -> Body:
    """The body of a request, which is a JSON object, with this priority.

    It is put in at the end, where it wins over one before it, and the rest stays as the client wrote it.
    """
    if isinstance(body, LargeBody):
        return split_body(_write_last(body.join(), priority))
    return _write_last(body, priority)


def _write_last(body: bytes, priority: int) -> bytes:
    encoding = json.detect_encoding(body)
    if encoding not in ("utf-8", "utf-8-sig"):
        body = body.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
    head = body.rstrip()[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return b'%b%b"priority":%d}' % (head, comma, priority)

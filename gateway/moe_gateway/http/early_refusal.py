"""What the head of a request says against it before its body has come. Pure.

A client without a key, or without quota left, need not send a long body, and the gateway keeps none. Nothing is taken
from a quota: the request is charged when it is whole. The reader says which bodies are short enough to be waited for.
"""

from typing import TYPE_CHECKING

from moe_gateway.access.deadlines import read_deadline
from moe_gateway.access.denials import Denial
from moe_gateway.http.bodies import BodyRefused
from moe_gateway.http.content_encoding import check_encodings, may_have_encoding, take_encoding
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import BadBody

if TYPE_CHECKING:
    from moe_gateway.access.gate import Gate


def look_at_head(request: ClientRequest, route: Route, gate: "Gate | None") -> Denial | None:
    """The answer to a request that cannot be admitted; None: its body may come.

    Args:
        request: without its body, from a caller that was identified where there are keys.
        route: of the request.
        gate: who may send requests; None: everyone.
    """
    try:
        read_deadline(request)
        if may_have_encoding(request.headers):
            check_encodings(take_encoding(request.headers)[0])
    except BadBody as error:
        return Denial(outcome=RequestOutcome.BAD_REQUEST, message=str(error))
    except BodyRefused as error:
        return Denial(outcome=error.outcome, message=str(error))
    return None if gate is None else gate.look(request, route)

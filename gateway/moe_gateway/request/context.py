"""What an exchange works with: the client's request, the client's connection, and the gateway's parts."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from moe_scheduling.request.fairness import ANONYMOUS_TENANT

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.http.bodies import Body
from moe_gateway.http.cors import OriginPolicy
from moe_gateway.http.heads import read_tenant
from moe_gateway.http.rare_headers import RareHeaders
from moe_gateway.http.upstream import Pool
from moe_gateway.request.open_users import OpenUsers
from moe_gateway.request.recent_requests import RecentRequests
from moe_gateway.request_stats import RequestStats

if TYPE_CHECKING:
    from moe_contract.gateway_config import ContinuedStreams
    from opentelemetry.trace import Span

    from moe_gateway.access.gate import Admission, Gate
    from moe_gateway.access.key_table import Caller
    from moe_gateway.access.quotas import Place
    from moe_gateway.engines.name_refresh import NameRefresh
    from moe_gateway.engines.response_search import ResponseSearch
    from moe_gateway.request.body_reader import BodyReader
    from moe_gateway.request.dispatched import DispatchedRequest
    from moe_gateway.tracing import RequestTracer


@dataclass(slots=True)
class ClientRequest:
    """A whole request of a client.

    Attributes:
        headers: lines that each end with CRLF, without hop-by-hop fields.
        session: value of the session header; None without one.
        keep_alive: whether the client lets its connection stay open after the answer.
        http10: whether it speaks HTTP/1.0.
        arrived_s: when its last byte came.
        is_plain: whether it is known to have no rare header (`RareHeaders`), so that none needs to be looked for.
        span: of its trace; None where requests are not traced.
        deadline_s: when its answer must have begun.
        caller: whose credential it had; None without keys.
        admission: its charge to a quota; None before, and without keys.
        place: its place in a quota while its body is read; None where that takes no time, and without keys.
    """

    method: bytes
    url: bytes
    headers: bytes
    body: Body
    request_id: bytes
    session: str | None
    keep_alive: bool
    http10: bool
    arrived_s: float
    is_plain: bool = False
    span: "Span | None" = None
    deadline_s: float = math.inf
    caller: "Caller | None" = None
    admission: "Admission | None" = None
    place: "Place | None" = None


def find_tenant(request: ClientRequest, header: bytes) -> str:
    """The tenant of a request: that of its credential, or the one that the header of this name says."""
    if request.caller is not None:
        return request.caller.tenant
    return read_tenant(request.headers, header) if header and not request.is_plain else ANONYMOUS_TENANT


class ClientSide(Protocol):
    """The connection that the answer goes to."""

    def write(self, data: bytes) -> None:
        """Writes more of the answer."""

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is over; the connection stays open or is closed."""


@dataclass(slots=True, kw_only=True)
class ExchangeContext:
    """The gateway's parts that exchanges use; one for the gateway.

    Attributes:
        pool_of: connections to an engine by its name; None for one that is not known.
        clock: monotonic seconds.
        spawn: starts a task that ends with the gateway at the latest.
        on_end: called at the end of each request with its status and, where something went wrong, the reason.
        recent: the newest requests, to explain them later.
        tracer: makes traces of requests; None: nobody wants them.
        model: the name of the model that is served, where it is known without an engine.
        tenant_header: the header that names a request's tenant, in lower case; empty: none does.
        bodies: reads bodies that take a while.
        responses: finds the engine of a response that another gateway passed on.
        names: asks engines for their names before a request for an unknown one is refused; None: nobody asks.
        rare_headers: finds out whether a head has one of the headers that few requests have.
        cors: which pages in browsers may see answers.
        open_users: users that have requests under way.
        gate: who may send requests; None: everyone.
        continuation: which streams go on at another engine when theirs fails; None: none.
        moves_left: streams that may yet leave engines that drain before the next check.
        draining: whether the gateway stops, so that each connection ends with its answer.
    """

    dispatcher: Dispatcher
    stats: RequestStats
    pool_of: Callable[[str], Pool | None]
    bodies: "BodyReader"
    responses: "ResponseSearch"
    clock: Callable[[], float]
    spawn: Callable[..., asyncio.Task[None]]
    on_end: Callable[["DispatchedRequest", int, str], None]
    recent: RecentRequests
    names: "NameRefresh | None" = None
    tracer: "RequestTracer | None" = None
    model: str | None = None
    tenant_header: bytes = b""
    cors: OriginPolicy = field(default_factory=OriginPolicy)
    open_users: OpenUsers = field(default_factory=OpenUsers)
    gate: "Gate | None" = None
    continuation: "ContinuedStreams | None" = None
    moves_left: int = 0
    draining: bool = False
    rare_headers: RareHeaders = field(init=False)

    def __post_init__(self) -> None:
        self.rare_headers = RareHeaders(self.tenant_header)

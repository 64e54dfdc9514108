"""What an exchange works with: the client's request, the client's connection, and the gateway's parts."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.http.bodies import Body
from moe_gateway.http.cors import OriginPolicy
from moe_gateway.http.upstream import Pool
from moe_gateway.request.open_users import OpenUsers
from moe_gateway.request_stats import RequestStats

if TYPE_CHECKING:
    from moe_gateway.request.body_reader import BodyReader
    from moe_gateway.request.exchange import Exchange


@dataclass(slots=True)
class ClientRequest:
    """A whole request of a client.

    Attributes:
        headers: lines that each end with CRLF, without hop-by-hop fields.
        session: value of the session header; None without one.
        keep_alive: whether the client lets its connection stay open after the answer.
        http10: whether it speaks HTTP/1.0.
        arrived_s: when its last byte came.
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
        on_end: called at the end of each exchange with its status and, where something went wrong, the reason.
        model: the name of the model that is served, where it is known without an engine.
        tenant_header: the header that names a request's tenant, in lower case; empty: none does.
        bodies: reads bodies that take a while.
        cors: which pages in browsers may see answers.
        open_users: users that have requests under way.
        draining: whether the gateway stops, so that each connection ends with its answer.
    """

    dispatcher: Dispatcher
    stats: RequestStats
    pool_of: Callable[[str], Pool | None]
    bodies: "BodyReader"
    clock: Callable[[], float]
    spawn: Callable[..., asyncio.Task[None]]
    on_end: Callable[["Exchange", int, str], None]
    model: str | None = None
    tenant_header: bytes = b""
    cors: OriginPolicy = field(default_factory=OriginPolicy)
    open_users: OpenUsers = field(default_factory=OpenUsers)
    draining: bool = False

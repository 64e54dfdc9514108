"""One TCP connection for calls that belong together.

Between two calls an address can become another pod's; a connection cannot. So the identity that a peer has proved on a
connection holds for a control token that is sent on that connection.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from moe_contract.clients import Unreachable


class ConnectionEnded(Unreachable):
    """The connection on which a peer has proved who it is has ended; nothing was sent on another one."""


@contextlib.asynccontextmanager
async def one_connection() -> AsyncIterator[aiohttp.ClientSession]:
    """A session for one peer that opens a single connection; a call that needs another one is not made.

    Raises:
        ConnectionEnded: from a call for which the connection is no more.
    """
    opened = False

    async def open_once(*_: Any) -> None:
        nonlocal opened
        if opened:
            raise ConnectionEnded("has closed the connection on which it said who it is")
        opened = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_start.append(open_once)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), trace_configs=[trace]) as session:
        yield session

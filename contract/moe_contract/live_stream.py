"""Reads the live page's stream of snapshots, `GET /ui/events` of a gateway's admin port, for the command line."""

from collections.abc import AsyncGenerator

import aiohttp
from pydantic import TypeAdapter

from moe_contract.clients import Refused, Unreachable, Unreadable
from moe_contract.control_tokens import authorization
from moe_contract.live_page import LiveSnapshot
from moe_contract.routes import CONNECT_TIMEOUT_S, UI

# The gateway sends one a second; a stream that is silent for longer has lost its gateway.
LONGEST_SILENCE_S = 10.0
# A snapshot of 512 ranks has 184 kB; aiohttp refuses a line above its buffer.
_MOST_EVENT_BYTES = 2**22
_SNAPSHOT = b"event: snapshot\n"
_READER = TypeAdapter(LiveSnapshot)


async def watch_snapshots(url: str, key: str) -> AsyncGenerator[LiveSnapshot]:
    """Yields the snapshots of a gateway, one a second, until the gateway ends the stream.

    The rates of the first one are zero where nobody else watches: they are differences of counters.

    Args:
        url: of the gateway's admin port.
        key: the page key, see `moe_contract.page_keys`.

    Raises:
        PeerError: the gateway cannot be reached, refuses, is silent, or sends what this version cannot read.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=LONGEST_SILENCE_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=_MOST_EVENT_BYTES) as session,
            session.get(f"{url}{UI}/events", headers=authorization(key), allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise Refused(answer.status, await answer.read())
            while event := await _read_event(answer.content):
                if event.startswith(_SNAPSHOT):
                    yield read_snapshot(event)
    except TimeoutError:
        raise Unreachable(f"sent no snapshot within {LONGEST_SILENCE_S:g} s") from None
    except (aiohttp.ClientError, OSError):
        raise Unreachable("cannot be reached") from None


async def _read_event(content: aiohttp.StreamReader) -> bytes:
    """The next event with its empty line; nothing at the end of the stream."""
    event = b""
    try:
        while line := await content.readline():
            event += line
            if line == b"\n":
                return event
    except ValueError:
        raise Unreadable("sends a snapshot that is too large") from None
    return b""


def read_snapshot(event: bytes) -> LiveSnapshot:
    """The document of an event `snapshot`, as `moe_contract.live_page.write_event` writes it.

    Raises:
        Unreadable: it is none, or a field has another type.
    """
    _, _, data = event.strip().partition(b"\ndata: ")
    try:
        return _READER.validate_json(data)
    except ValueError:
        raise Unreadable("sends snapshots that this version does not understand") from None

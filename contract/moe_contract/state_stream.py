"""The sparse stream of states, `GET /v1/state?watch=1&interval=SECONDS`: changes at once, numbers now and then.

Agents and gateways write it with `SparseStream`, the operator reads it with `read_states`. It has one state a line: the
first at once, then one as soon as something of note changes (phase, settings, requests held or not), and one at most
each interval while only numbers change. An empty line says that the writer lives; a reader that has had no byte for
`STREAM_SILENCE_S` gives the stream up. `?watch=1` without an interval is the dense stream, which the gateway reads.
The header `X-State-Interval` marks the sparse stream: agents of older versions ignore `interval` and answer with the
dense one, which no reader of states needs ten times a second.
"""

import asyncio
import math
import socket
from collections.abc import AsyncGenerator, Callable, Mapping

import aiohttp

from moe_contract.clients import Refused, Unreachable, Unreadable
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.routes import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, STATE, STREAM_HEARTBEAT_S, STREAM_SILENCE_S

NDJSON = "application/x-ndjson"
# Writers of a sparse stream repeat its interval here. Older agents know the dense stream alone and answer without it.
INTERVAL_HEADER = "X-State-Interval"
HEARTBEAT = b"\n"
LONGEST_LINE_BYTES = 4 * 1024 * 1024
# The kernel asks a silent peer for a sign of life, so that a lost node is noticed before the silence is.
KEEPALIVE_S, KEEPALIVE_PROBES = 5, 2


def parse_interval(query: Mapping[str, str]) -> float | None:
    """The interval that a request asks for, in seconds; None where it asks for the dense stream.

    Raises:
        InvalidInput: it is no positive number.
    """
    text = query.get("interval")
    if text is None:
        return None
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = math.nan
    if not 0.0 < interval_s < math.inf:
        raise InvalidInput([InputError("interval", f"a number of seconds above 0 is needed, got {text!r}")])
    return interval_s


def stream_headers(interval_s: float | None) -> dict[str, str]:
    """Headers of a stream of states, sparse with an interval, dense without."""
    headers = {"Content-Type": NDJSON, "Cache-Control": "no-store"}
    return headers if interval_s is None else headers | {INTERVAL_HEADER: f"{interval_s:g}"}


class SparseStream:
    """Decides for one watcher which line it gets at which time. Pure: times and values are arguments.

    Args:
        interval_s: least time between two states that differ in numbers alone.
        heartbeat_s: longest time without a line.
    """

    def __init__(self, interval_s: float, heartbeat_s: float = STREAM_HEARTBEAT_S) -> None:
        self._interval_s, self._heartbeat_s = interval_s, heartbeat_s
        self._sent: tuple[object, object] | None = None
        self._sent_s = self._line_s = -math.inf

    def next_line(
        self, now_s: float, notable: object, numbers: Callable[[], object], serialise: Callable[[], bytes]
    ) -> bytes:
        """The line to send now: a state, a heartbeat, or nothing (empty).

        Args:
            now_s: monotonic time.
            notable: differs from its last value when something changed that is sent at once.
            numbers: its value differs when anything else changed; called only once the interval has passed or when a
                state is sent.
            serialise: the state as a line; called when it is sent.
        """
        is_changed = self._sent is None or self._sent[0] != notable
        if is_changed or now_s - self._sent_s >= self._interval_s:
            newest = notable, numbers()
            if is_changed or newest != self._sent:
                self._sent, self._sent_s, self._line_s = newest, now_s, now_s
                return serialise()
        if now_s - self._line_s >= self._heartbeat_s:
            self._line_s = now_s
            return HEARTBEAT
        return b""


class NotStreamed(Exception):
    """The peer does not know sparse streams: it answered with its state alone, or with a dense stream.

    Attributes:
        state: its state, as JSON.
    """

    def __init__(self, state: bytes) -> None:
        super().__init__("the peer does not stream its state sparsely")
        self.state = state


class Silent(Unreachable):
    """A peer that took the connection and then sent nothing for too long, as one behind a buffering proxy seems to."""


async def read_states(
    session: aiohttp.ClientSession, url: str, interval_s: float, silence_s: float = STREAM_SILENCE_S
) -> AsyncGenerator[bytes]:
    """Yields the states of a peer, each as JSON, and empty bytes for a heartbeat, until the peer ends the stream.

    Of lines that came together only the newest state is given.

    Args:
        session: to read with; its connector needs room for all streams.
        url: of the peer.
        interval_s: least time between two states that differ in numbers alone.
        silence_s: time without a byte after which the peer counts as unreachable.

    Raises:
        NotStreamed: it answered once or with a dense stream, as peers of older versions do.
        Silent: it sent nothing for too long.
        PeerError: it cannot be reached, refuses, or sends a line or an answer without an end.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
    params = {"watch": "1", "interval": f"{interval_s:g}"}
    try:
        # A stranger at an old address could lead on to the right pod.
        request = session.get(url + STATE, params=params, timeout=timeout, allow_redirects=False)
        async with request as answer:
            if answer.status != 200:
                raise Refused(answer.status, await _read_start(answer))
            if answer.content_type != NDJSON:
                raise NotStreamed(await _read_start(answer))
            if INTERVAL_HEADER not in answer.headers:
                raise NotStreamed(await _read_start(answer, end=b"\n"))
            _ask_for_life(answer)
            rest = b""
            async for piece in answer.content.iter_any():
                if piece == HEARTBEAT and not rest:
                    yield b""
                    continue
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > LONGEST_LINE_BYTES:
                    raise Unreadable("sends a state without an end")
                if lines:
                    yield next((line for line in reversed(lines) if line), b"")
    except aiohttp.ConnectionTimeoutError:
        raise Unreachable(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
    except TimeoutError:
        raise Silent(f"sent nothing within {silence_s:g} s") from None
    except (aiohttp.ClientError, OSError):
        raise Unreachable("cannot be reached") from None


async def _read_start(answer: aiohttp.ClientResponse, end: bytes | None = None) -> bytes:
    """The body of an answer up to its end, or only as far as its first line; neither may be long or take long."""
    body = b""
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for piece in answer.content.iter_any():
                body += piece
                if end is not None and end in body.lstrip():
                    return body.lstrip().partition(end)[0]
                if len(body) > LONGEST_LINE_BYTES:
                    raise Unreadable("sends an answer without an end")
    except aiohttp.ServerTimeoutError:
        raise
    except TimeoutError:
        raise Unreadable(f"did not end its answer within {READ_TIMEOUT_S:g} s") from None
    return body


def _ask_for_life(answer: aiohttp.ClientResponse) -> None:
    transport = None if answer.connection is None else answer.connection.transport
    own = None if transport is None else transport.get_extra_info("socket")
    if own is None:
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has these options.
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_S), ("TCP_KEEPINTVL", KEEPALIVE_S), ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):  # fmt: skip
        if hasattr(socket, option):
            own.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

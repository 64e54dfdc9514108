"""Whole requests from the bytes of a client's connection, read by httptools (llhttp).

Owned by a `ClientConnection`, which feeds it. llhttp refuses what request smuggling lives on; sizes are limited here. A
bad message becomes a refusal, after which nothing more is read, because where the next message begins is then unknown.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import httptools
from moe_contract.gateway_config import Limits

from moe_gateway.http.bodies import Body, build_body
from moe_gateway.http.heads import HOP_BY_HOP
from moe_gateway.http.rare_headers import RareHeaders
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.whole_request import LONGEST_HEAD_BYTES, REQUEST_ID, SESSION_HEADERS, HeadMemory
from moe_gateway.request.context import ClientRequest

# A body that keeps coming has time at this rate, besides `body_timeout_s`: the longest body takes 9 hours, but whoever
# holds a connection with it has to send all the while.
LEAST_BYTES_PER_S = 1024
# A body of no more is waited for before its head is judged, unless the client waits for `100 Continue`: judging a head
# twice takes longer than such a body, which most clients send apart from its head and right behind it.
LONGEST_AWAITED_BYTES = 64 * 1024
_HEAD_TOO_LARGE = (RequestOutcome.HEAD_TOO_LARGE, f"the head of the request is larger than {LONGEST_HEAD_BYTES} bytes")
# Header lines that are left out when a head is read again without its offer of another protocol.
_OFFER = (b"connection:", b"upgrade:", b"expect:")


class ReaderOwner(Protocol):
    """The connection whose bytes are read."""

    def expect_within(self, seconds: float) -> None:
        """The next part of a request has to arrive within this time."""

    def expect_nothing(self) -> None:
        """Whether the request is complete: head and body have arrived."""


class OpenHead(NamedTuple):
    """A request whose head has come and whose body has not.

    Attributes:
        request: the request without its body.
        expects: whether the client waits for `100 Continue` before it sends its body.
    """

    request: ClientRequest
    expects: bool


class RequestReader:
    """Reads one message after the other.

    Args:
        owner: the connection, which keeps the deadlines.
        limits: of sizes and times.
        new_request_id: names a request that has no usable id of its own.
        clock: monotonic seconds.
        rare: the headers that a request without them is known to lack.

    Attributes:
        requests: whole requests that were not taken yet, oldest first.
        refusal: why nothing more is read; None while all is well.
        in_head: whether the head of a message is under way.
        has_open_head: whether a head has come that `take_head` has not returned, and whose body has not come; not where
            that body is short, and the client does not wait for `100 Continue`.
    """

    __slots__ = (
        "_body",
        "_body_began_s",
        "_body_bytes",
        "_chunk_bytes",
        "_clock",
        "_connection_tokens",
        "_expects",
        "_has_short_body",
        "_head_bytes",
        "_hop_by_hop",
        "_limits",
        "_lines",
        "_memory",
        "_new_request_id",
        "_owner",
        "_parser",
        "_request_id",
        "_session",
        "_url",
        "has_open_head",
        "in_head",
        "refusal",
        "requests",
    )

    def __init__(
        self,
        owner: ReaderOwner,
        limits: Limits,
        new_request_id: Callable[[], bytes],
        clock: Callable[[], float],
        rare: RareHeaders,
    ) -> None:
        self._owner = owner
        self._limits = limits
        self._new_request_id = new_request_id
        self._clock = clock
        self._memory = HeadMemory(rare)
        self._parser = httptools.HttpRequestParser(self)
        self.requests: deque[ClientRequest] = deque()
        self.refusal: tuple[RequestOutcome, str] | None = None
        self._chunk_bytes = 0
        self._start_message()
        self.in_head = False

    def _start_message(self) -> None:
        self._url = b""
        # Lines of the head, each ended by CRLF; those that concern the connection apart.
        self._lines: list[bytes] = []
        self._hop_by_hop: list[bytes] = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._body_began_s = 0.0
        self._head_bytes = 0
        self.in_head = True
        self.has_open_head = False
        self._expects = False
        self._has_short_body = False
        self._connection_tokens = b""
        self._request_id = b""
        self._session: str | None = None

    @property
    def url(self) -> bytes:
        """The target of the message that is under way; empty before it is known."""
        return self._url

    @property
    def is_within_message(self) -> bool:
        """Whether a part of a message has come and its end has not."""
        return bool(self.in_head or self._body or self._url)

    @property
    def headers(self) -> bytes:
        """The header lines of the message that is under way, as far as they have come."""
        return b"".join(self._lines)

    # What the connection calls.

    def feed(self, data: bytes) -> None:
        """Reads more bytes; whole requests are in `requests` then, and the reason to read no more is in `refusal`."""
        if not (self._url or self.in_head or self._body) and len(data) <= self._limits.max_body_bytes:
            body = self._memory.read(data)
            if body is not None:
                self._take_whole(body)
                return
        self._chunk_bytes = len(data)
        self._head_bytes += len(data)
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self.refuse(RequestOutcome.BAD_REQUEST, f"not a valid HTTP request: {error}")
        if self._head_bytes > LONGEST_HEAD_BYTES:
            self.refuse(*_HEAD_TOO_LARGE)

    def _take_whole(self, body: bytes) -> None:
        url, headers, _, request_id, session = self._memory.last
        request_id, is_plain = request_id or self._new_request_id(), self._memory.is_plain
        self.requests.append(
            ClientRequest(b"POST", url, headers, body, request_id, session, True, False, self._clock(), is_plain)
        )
        self._owner.expect_nothing()

    def refuse(self, outcome: RequestOutcome, message: str) -> None:
        """Reads nothing more; the first reason is the one that the client is answered with."""
        self.refusal = self.refusal or (outcome, message)

    def drop_message(self) -> None:
        """Forgets the message that is under way."""
        self._body, self._url = [], b""
        self.has_open_head = False

    def take_head(self) -> OpenHead:
        """The request whose body is still to come; to be called while `has_open_head`, once for each request."""
        self.has_open_head = False
        request = self._build_request(b"")
        return OpenHead(request, self._expects and not self._body and not request.http10)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Ignores the offer of another protocol, for which the parser stops: it reads the head again without the offer.

        Java's HTTP client makes that offer with its first request on each connection.
        """
        offered = self.requests.pop() if self.requests else None
        if self.refusal is not None or offered is None or offered.method == b"CONNECT":
            self.refuse(RequestOutcome.BAD_REQUEST, "the gateway speaks HTTP/1.1 alone")
            return
        first = b"%b %b HTTP/1.%d\r\n" % (offered.method, offered.url, not offered.http10)
        kept = [line for line in self._hop_by_hop if not line.startswith(_OFFER)]
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"".join([first, *self._lines, *kept, b"\r\n", rest]))

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._start_message()
        self._owner.expect_within(self._limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:
            # A trailer: nothing that the engines need, and no header.
            return
        name = name.lower()
        line = b"%b: %b\r\n" % (name, value)
        if name in HOP_BY_HOP:
            self._hop_by_hop.append(line)
            self._read_hop_by_hop(name, value)
            return
        if name == SESSION_HEADERS[0] or (name == SESSION_HEADERS[1] and self._session is None):
            self._session = value.decode("latin-1")
        self._lines.append(line)

    def _read_hop_by_hop(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            if len(value) > 15 or (length := int(value)) > self._limits.max_body_bytes:
                self._refuse_body()
            else:
                self._has_short_body = length <= LONGEST_AWAITED_BYTES
        elif name == b"expect":
            self._expects = value.lower() == b"100-continue"
        elif name == b"connection":
            self._connection_tokens += value.lower() + b","
        elif name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            self._request_id = value

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._body_began_s = self._clock()
        self._owner.expect_within(self._limits.body_timeout_s)
        if self._head_bytes + self._chunk_bytes > LONGEST_HEAD_BYTES and self._exact_head_bytes() > LONGEST_HEAD_BYTES:
            self.refuse(*_HEAD_TOO_LARGE)
        if self._connection_tokens:
            named = {token.strip() for token in self._connection_tokens.split(b",")} - {b"keep-alive", b"close", b""}
            if named:
                self._lines = [line for line in self._lines if line[: line.index(b":")] not in named]
        self.has_open_head = self.refusal is None and (self._expects or not self._has_short_body)

    def on_body(self, body: bytes) -> None:
        # Bytes outside the body are limited like a head: the frames of chunks and the trailer.
        self._head_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse_body()
        elif self.refusal is None:
            self._body.append(body)
            self._owner.expect_within(self._body_time_s())

    def _body_time_s(self) -> float:
        """Seconds for more of the body to come: fewer for one that is slower than `LEAST_BYTES_PER_S` on the whole."""
        spent_s = self._clock() - self._body_began_s
        limit_s = self._limits.body_timeout_s
        return min(limit_s, limit_s + self._body_bytes / LEAST_BYTES_PER_S - spent_s)

    def on_message_complete(self) -> None:
        if self.refusal is not None:
            return
        self.requests.append(self._build_request(build_body(self._body)))
        self.drop_message()
        self._owner.expect_nothing()

    def _build_request(self, body: Body) -> ClientRequest:
        parser = self._parser
        return ClientRequest(
            method=parser.get_method(),
            url=self._url,
            headers=b"".join(self._lines),
            body=body,
            request_id=self._request_id or self._new_request_id(),
            session=self._session,
            keep_alive=parser.should_keep_alive(),
            http10=parser.get_http_version() == "1.0",
            arrived_s=self._clock(),
        )

    def _exact_head_bytes(self) -> int:
        return len(self._url) + sum(map(len, self._lines))

    def _refuse_body(self) -> None:
        self._body.clear()
        self.refuse(RequestOutcome.BODY_TOO_LARGE, f"the body is larger than {self._limits.max_body_bytes} bytes")

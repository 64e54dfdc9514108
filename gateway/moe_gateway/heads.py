"""Heads of requests to engines and of their answers, rewritten as bytes. Pure.

Hop-by-hop fields (RFC 9110, 7.6.1) end at the gateway; so does the header that addresses a rank, which the gateway
alone may set.
"""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-data-parallel-rank",
        b"x-request-id",
    }
)
RANK_HEADER = b"x-data-parallel-rank"


def build_request_head(
    method: bytes,
    url: bytes,
    headers: list[tuple[bytes, bytes]],
    *,
    host: bytes,
    body_bytes: int,
    request_id: bytes,
    rank: int | None,
    http10: bool = False,
) -> bytes:
    """The head for the engine; `headers` are the client's, their names in lower case and free of hop-by-hop fields."""
    parts = [b"%b %b HTTP/1.%d\r\nhost: %b\r\nx-request-id: %b\r\n" % (method, url, not http10, host, request_id)]
    if body_bytes or method == b"POST":
        parts.append(b"content-length: %d\r\n" % body_bytes)
    if rank is not None:
        parts.append(b"x-data-parallel-rank: %d\r\n" % rank)
    if http10:
        parts.append(b"connection: close\r\n")
    parts.extend([b"%b: %b\r\n" % header for header in headers])
    parts.append(b"\r\n")
    return b"".join(parts)


def stamp_response(head: bytes, request_id: bytes, *, close: bool) -> bytes:
    """The engine's answer with the request's id, and with the notice that the connection ends where it does."""
    line_end = head.index(b"\r\n") + 2
    extra = b"connection: close\r\n" if close else b""
    return b"%bx-request-id: %b\r\n%b%b" % (head[:line_end], request_id, extra, head[line_end:])

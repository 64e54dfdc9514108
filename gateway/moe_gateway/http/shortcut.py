"""The shortcut through a request that came whole in one read and is like most: its head is looked at by two regular
expressions instead of one call for each header. Pure; used by a client connection between two messages.

Invariant: it reads a strict subset of what llhttp takes, and understands it alike. A request with anything that frames
messages in another way (a second length, chunks, a folded line, a bare line feed), that wants an answer in between, or
whose body is not all there, is left to the parser.
"""

import re

from moe_gateway.http.heads import HOP_BY_HOP

LONGEST_HEAD_BYTES = 64 * 1024
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

# The lines are captured with the line feed before them, so that each begins with one: a literal is found fastest.
_HEAD = re.compile(
    rb"POST ([!-~]++) HTTP/1\.1\r(\n(?:[!#$%&'*+.^_`|~0-9A-Za-z-]++:[\t\x20-\x7e\x80-\xff]*+\r\n)++)\r\n"
)
_SPECIAL = re.compile(rb"\n((?i:%b|x-session-id)):[ \t]*+([^\r]*+)\r(?=\n)" % b"|".join(sorted(HOP_BY_HOP)))

Usual = tuple[bytes, bytes, bytes, bytes, str | None]
"""URL, header lines for the engine, body, request id (empty when there is none), session."""


def read_usual_request(data: bytes) -> Usual | None:
    """The request that `data` is, if it is a usual one."""
    head = _HEAD.match(data)
    if head is None or head.end() > LONGEST_HEAD_BYTES:
        return None
    url, lines = head.groups()
    parts = _SPECIAL.split(lines)
    special = {parts[at].lower(): parts[at + 1] for at in range(1, len(parts), 3)}
    length = special.get(b"content-length", b"")
    body = data[head.end() :]
    if len(special) != len(parts) // 3 or not length.isdigit() or len(length) > 15 or int(length) != len(body):
        return None
    if special.keys() - _UNDERSTOOD or special.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    headers, session = b"".join(parts[::3])[1:], special.get(b"x-session-id")
    request_id = special.get(b"x-request-id", b"")
    if request_id and REQUEST_ID.fullmatch(request_id) is None:
        request_id = b""
    if session is None:
        return url, headers, body, request_id, None
    return url, b"%bx-session-id: %b\r\n" % (headers, session), body, request_id, session.decode("latin-1")


_UNDERSTOOD = {b"connection", b"content-length", b"host", b"x-data-parallel-rank", b"x-request-id", b"x-session-id"}

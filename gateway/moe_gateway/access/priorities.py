"""The priority of a request whose key has a priority class. Pure.

Lower is more urgent. The class is the level of the key's requests; the `priority` of a body counts from there, and a
negative one as 0, so that no client raises itself above its class. Engines read the level from the body, so it is
written there.
"""

import json

from moe_gateway.http.bodies import Body, LargeBody, split_body


def class_priority(asked: int, level: int) -> int:
    """The level of a request that asks for `asked` within a class."""
    return level + max(0, asked)


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

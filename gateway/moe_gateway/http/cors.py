"""Which answers a browser may show to a page of another origin (CORS, as the Fetch standard has it). Pure.

The gateway alone decides: it answers preflights, and replaces what an engine says. Without `Origin` nothing happens.
"""

import re
from collections.abc import Collection

ANY_ORIGIN = "*"
# Stripped from a value here: an expression that leaves them out takes quadratic time on a value full of them.
_BLANKS = b" \t"
_ORIGIN = re.compile(rb"(?:\A|\n)origin:([^\r\n]*)\r", re.IGNORECASE)
_ASKED_METHOD = re.compile(rb"(?:\A|\n)access-control-request-method:", re.IGNORECASE)
_ASKED_HEADERS = re.compile(rb"(?:\A|\n)access-control-request-headers:([^\r\n]*)\r", re.IGNORECASE)
# What clients in browsers read besides the body.
_EXPOSED = b"access-control-expose-headers: retry-after, x-request-id\r\n"
_PREFLIGHT = (
    b"access-control-allow-methods: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\naccess-control-max-age: 600\r\n"
)


class OriginPolicy:
    """The origins whose pages may use the gateway.

    Args:
        origins: such as `https://chat.example.org`; `*` is any.
    """

    __slots__ = ("_any", "_origins")

    def __init__(self, origins: Collection[str] = ()) -> None:
        self._any = ANY_ORIGIN in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def answer_lines(self, headers: bytes) -> bytes:
        """Header lines for the answer to a request; empty where no page asks, or none that may see the answer.

        Args:
            headers: lines of the request, each ended by CRLF.
        """
        # Every request comes here; the search for the bytes takes a tenth of what the expression does.
        if b"rigin:" not in headers and b"RIGIN:" not in headers:
            return b""
        return self._allow(headers)

    def _allow(self, headers: bytes) -> bytes:
        found = _ORIGIN.search(headers)
        if found is None:
            return b""
        if self._any:
            return b"access-control-allow-origin: *\r\n" + _EXPOSED
        origin = found[1].strip(_BLANKS)
        if origin in self._origins:
            return b"access-control-allow-origin: %b\r\nvary: origin\r\n%b" % (origin, _EXPOSED)
        return b""

    def preflight_lines(self, headers: bytes) -> bytes:
        """Header lines for the answer to a preflight; empty for one whose origin is not allowed."""
        lines = self._allow(headers)
        if not lines:
            return b""
        asked = _ASKED_HEADERS.search(headers)
        # As vLLM does: every header may be sent, so those that were asked for are allowed by name.
        named = b"" if asked is None else b"access-control-allow-headers: %b\r\n" % asked[1].strip(_BLANKS)
        return lines + _PREFLIGHT + named


def is_preflight(method: bytes, headers: bytes) -> bool:
    """Whether a browser asks if a page may send a request."""
    return method == b"OPTIONS" and _ASKED_METHOD.search(headers) is not None and _ORIGIN.search(headers) is not None


def insert_lines(answer: bytes, lines: bytes) -> bytes:
    """An answer with these header lines in its head."""
    return answer.replace(b"\r\n", b"\r\n" + lines, 1) if lines else answer

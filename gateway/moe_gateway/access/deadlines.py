"""The deadline of a request: `X-Request-Timeout`, in seconds from its arrival. Pure.

A request whose answer has not begun by then is ended, wherever it waits.
"""

import re

from moe_gateway.http.rare_headers import DEADLINE
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import BadBody

_MARK = DEADLINE + b":"
_SECONDS = re.compile(rb"\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}")


def read_deadline(request: ClientRequest) -> None:
    """Sets the deadline of a request that names one.

    Raises:
        BadBody: its value is no number of seconds.
    """
    lines = request.headers.lower()
    if _MARK in lines and (seconds := _read_seconds(lines)) is not None:
        request.deadline_s = request.arrived_s + seconds


def _read_seconds(lines: bytes) -> float | None:
    """The value of the first such header in lines of lower case; None where it is the end of another one's name."""
    lines = b"\r\n" + lines
    begin = lines.find(b"\r\n" + _MARK)
    if begin < 0:
        return None
    begin += len(_MARK) + 2
    value = lines[begin : lines.find(b"\r\n", begin)].strip(b" \t")
    if _SECONDS.fullmatch(value) is None:
        raise BadBody(f"X-Request-Timeout: a number of seconds is needed, got {value[:40].decode('latin-1')!r}")
    return float(value)

"""Counts the tokens of an answer on its way to the client, for a tenant with a quota of tokens.

It stands between an exchange and its client's connection. An answer names its own tokens (`usage`); those of a stream
without it are estimated: the prompt as it was admitted, and one token for each event.
"""

import re

from moe_gateway.access.quotas import Lease
from moe_gateway.request.context import ClientSide

_USAGE = re.compile(rb'"(total|prompt|input|completion|output)_tokens": ?(\d{1,12})\b')
_INPUT, _OUTPUT = ("prompt", "input"), ("completion", "output")
_EVENT_END = b"\n\n"


def read_usage(text: bytes) -> int | None:
    """All tokens by the last usage in these bytes; None without one. In what a model wrote its quotes are escaped."""
    found = {name.decode(): int(count) for name, count in _USAGE.findall(text)}
    if "total" in found:
        return found["total"]
    counts = [next((found[name] for name in names if name in found), None) for names in (_INPUT, _OUTPUT)]
    return None if counts == [None, None] else sum(count or 0 for count in counts)


class MeteredClient:
    """A `ClientSide` that passes all on and counts."""

    __slots__ = ("_before_last", "_client", "_events", "_last", "_lease")

    def __init__(self, client: ClientSide, lease: Lease) -> None:
        self._client = client
        self._lease = lease
        self._events = 0
        self._last = self._before_last = b""

    def write(self, data: bytes) -> None:
        """Passes on more of the answer."""
        self._before_last, self._last = self._last, data
        self._events += data.count(_EVENT_END)
        self._client.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is over; passes this on."""
        self._client.answered(keep_alive=keep_alive)

    def count_tokens(self, *, is_answer: bool) -> int:
        """The tokens that the request took; none where no engine answered it."""
        if not is_answer:
            return 0
        usage = read_usage(self._before_last + self._last)
        return self._lease.charged_tokens + self._events if usage is None else usage

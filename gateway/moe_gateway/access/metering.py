"""Counts the tokens of an answer on its way to the client, for a tenant with a quota of tokens.

It stands between an exchange and its client's connection. An answer names its own tokens (`usage`), wherever it has
them; those of a stream without it are estimated: the prompt as it was admitted, and one token for each event.
"""

import re

from moe_gateway.access.quotas import Lease
from moe_gateway.request.context import ClientSide

_MARK = b'"usage":'
# An object with at most one level below it; the bounds of its parts keep the search short, whatever an answer holds.
_USAGE = re.compile(rb'"usage":\s{0,8}(\{[^{}]{0,512}(?:\{[^{}]{0,512}\}[^{}]{0,512}){0,6}\})')
# Anthropic's API has the tokens that the prefix cache read or wrote in fields of their own.
_COUNT = re.compile(rb'"(total|prompt|completion|output|(?:cache_read_|cache_creation_)?input)_tokens":\s?(\d{1,12})\b')
# A usage may begin in one write and end in the next.
_TAIL_BYTES = 1024
_EVENT_END = b"\n\n"
# At most this number of events follow the usage of a stream: `[DONE]` or `message_stop`, and one more.
_MOST_LAST_EVENTS = 2


def read_usage(text: bytes) -> int | None:
    """All tokens by the usage in these bytes, of several the largest; None without one.

    A stream may repeat its usage, which grows. The model's words cannot lower it, nor what an answer repeats of its
    request.
    """
    return max((_sum_counts(found[1]) for found in _USAGE.finditer(text) if _COUNT.search(found[1])), default=None)


def _sum_counts(usage: bytes) -> int:
    counts = {name: int(count) for name, count in _COUNT.findall(usage)}
    total = counts.pop(b"total", 0)
    return max(total, sum(counts.values()))


class MeteredClient:
    """A `ClientSide` that passes all on and counts."""

    __slots__ = ("_client", "_events", "_events_at_usage", "_lease", "_tail", "_usage")

    def __init__(self, client: ClientSide, lease: Lease) -> None:
        self._client = client
        self._lease = lease
        self._events = self._events_at_usage = 0
        self._usage: int | None = None
        self._tail = b""

    def write(self, data: bytes) -> None:
        """Passes on more of the answer."""
        self._events += data.count(_EVENT_END)
        window = self._tail + data
        if _MARK in window and (usage := read_usage(window)) is not None and usage >= (self._usage or 0):
            self._usage, self._events_at_usage = usage, self._events
        self._tail = window[-_TAIL_BYTES:]
        self._client.write(data)

    def answered(self, *, keep_alive: bool) -> None:
        """The answer is over; passes this on."""
        self._client.answered(keep_alive=keep_alive)

    def count_tokens(self, *, is_answer: bool) -> int:
        """The tokens that the request took; none where no engine answered it."""
        if not is_answer:
            return 0
        estimate = self._lease.prompt_tokens + self._events
        if self._usage is None:
            return estimate
        if self._events - self._events_at_usage > _MOST_LAST_EVENTS:
            # The usage at the beginning of a stream that was left has no tokens of its answer.
            return max(self._usage, estimate)
        return self._usage

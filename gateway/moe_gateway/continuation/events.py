"""Splits an answer that comes in chunks into its head and whole server-sent events. Pure."""

import re

from moe_gateway.http.heads import skip_informational
from moe_gateway.http.upstream import LONGEST_HEAD_BYTES
from moe_gateway.request.stream_events import split_chunks

_HEAD_END = b"\r\n\r\n"
# The last chunk, the trailers and the blank line behind it.
_END = re.compile(rb"0+[ \t]*(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n")
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# A longer event is none of a model's.
LONGEST_EVENT_BYTES = 16 * 1024 * 1024


class EventReader:
    """Reads one answer of an engine.

    Attributes:
        head: the head, once it is whole.
        is_stream: whether the answer is a chunked stream of events with status 200, as far as its head has come.
        has_ended: whether its body is whole, to its last byte; what comes after it is not read.
        is_too_long: whether a head or an event has grown beyond its bound.
    """

    __slots__ = ("_rest", "_text", "has_ended", "head", "is_stream", "is_too_long")

    def __init__(self) -> None:
        self.head = b""
        self.is_stream = self.has_ended = self.is_too_long = False
        # Bytes that are no whole chunk yet, and data that are no whole event yet.
        self._rest = self._text = b""

    def read(self, data: bytes) -> list[bytes]:
        """Takes more bytes and returns the events that they complete, each with the blank line at its end."""
        if self.has_ended:
            return []
        self._rest += data
        if not self.head and not self._read_head():
            self.is_too_long = len(self._rest) > LONGEST_HEAD_BYTES
            return []
        if not self.is_stream:
            return []
        text, self._rest = split_chunks(self._rest)
        self.has_ended = _END.match(self._rest) is not None
        events, self._text = _split_events(self._text + text)
        self.is_too_long = len(self._text) + len(self._rest) > LONGEST_EVENT_BYTES
        return events

    def _read_head(self) -> bool:
        """Takes the head out of what has come; returns False while it is not whole."""
        if _HEAD_END not in self._rest:
            return False
        try:
            answer = skip_informational(self._rest)
            end = answer.index(_HEAD_END) + len(_HEAD_END)
        except ValueError:
            return False
        self.head, self._rest = answer[:end], answer[end:]
        lower = self.head.lower()
        self.is_stream = (
            lower.startswith((b"http/1.1 200", b"http/1.0 200"))
            and b"text/event-stream" in lower
            and b"\r\ntransfer-encoding: chunked" in lower
            and b"\r\ncontent-encoding:" not in lower
        )
        return True

    def take_rest(self) -> bytes:
        """The head and all that has come since, as it came, of an answer that is no stream."""
        data, self._rest = self.head + self._rest, b""
        return data


def _split_events(text: bytes) -> tuple[list[bytes], bytes]:
    """The whole events, each with the blank line at its end, and what follows them."""
    if b"\r" not in text:
        *rows, rest = text.split(b"\n\n")
        return [row + b"\n\n" for row in rows], rest
    events, at = [], 0
    for blank in _BLANK_LINE.finditer(text):
        events.append(text[at : blank.end()])
        at = blank.end()
    return events, text[at:]

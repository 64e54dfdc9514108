"""Puts the events of a stream together that come in several pieces. Pure.

Engines send an event at a time, but a read may end anywhere, and a proxy in between may cut chunks anew. An error is to
be seen, and the last event known, however they come.
"""

from moe_gateway.request.stream_events import BLANK_LINE, CHUNK_SIZE, split_chunks

# A line with the size of a chunk is shorter, its extensions included.
_LONGEST_SIZE_LINE = 64
# Of an event or chunk that is longer nothing is known.
LONGEST_EVENT_BYTES = 1024 * 1024


class EventPieces:
    """The end of a stream so far."""

    __slots__ = ("_before", "_bytes", "_ends", "_ends_bytes", "_is_chunked", "_last", "_needed", "_parts", "_text")

    def __init__(self, *, is_chunked: bool) -> None:
        self._is_chunked = is_chunked
        self._ends = b"\n\n\r\n" if is_chunked else b"\n\n"
        self._ends_bytes = len(self._ends)
        # The newest events that were whole together, and those before.
        self._before = self._last = b""
        # Of the event that goes on; then what has come of the chunk that goes on, with its size.
        self._text = b""
        self._parts: list[bytes] = []
        self._bytes = self._needed = 0

    def add(self, data: bytes) -> bytes:
        """Takes the next bytes and returns those since the last whole event, once they complete one; else none.

        They have the frames of chunks only where each chunk ends with an event.
        """
        if self._parts or self._text or data[-self._ends_bytes :] != self._ends:
            return self._go_on(data)
        if self._is_chunked:
            lines = data.count(b"\r\n")
            if lines != 2 and lines != 2 * data.count(self._ends):
                return self._go_on(data)
        self._before, self._last = self._last, data
        return data

    def _go_on(self, data: bytes) -> bytes:
        if self._is_chunked:
            data = self._take_chunks(data)
        if not data:
            return b""
        # A blank line may be spread over two pieces.
        start = max(0, len(self._text) - 3)
        self._text += data
        ends = [blank.end() for blank in BLANK_LINE.finditer(self._text, start)]
        if not ends:
            if len(self._text) > LONGEST_EVENT_BYTES:
                self._text = b""
            return b""
        events, self._text = self._text[: ends[-1]], self._text[ends[-1] :]
        self._before, self._last = self._last, events
        return events

    def _take_chunks(self, data: bytes) -> bytes:
        """The data of the chunks that are whole now."""
        self._parts.append(data)
        self._bytes += len(data)
        if self._bytes < self._needed:
            if self._bytes > LONGEST_EVENT_BYTES:
                # Where the next chunk begins is not known any more; one that ends with an event shows it.
                self._forget()
            return b""
        whole, rest = split_chunks(b"".join(self._parts))
        self._parts, self._bytes = [rest] if rest else [], len(rest)
        head = CHUNK_SIZE.match(rest)
        self._needed = 0 if head is None else head.end() + int(head[1], 16) + 2
        if head is None and self._bytes > _LONGEST_SIZE_LINE:
            self._forget()
        return whole

    def _forget(self) -> None:
        self._parts, self._text = [], b""
        self._bytes = self._needed = 0

    @property
    def end(self) -> bytes:
        """The end of the stream: its last whole events, and what has come of the next one."""
        return b"".join((self._before, self._last, self._text, *self._parts))

"""Events are put together wherever a stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.request.event_pieces import LONGEST_EVENT_BYTES, EventPieces
from moe_gateway.request.stream_events import ends_stream, find_error, split_chunks

from tests.gateway.messages import chunk

EVENTS = [
    b'data: {"x": 1}\n\n',
    b": comment\n\n",
    b"event: a\r\ndata: b\r\n\r\n",
    b'data: {"y": "' + b"z" * 50 + b'"}\n\n',
]
ERROR = b'data: {"error": {"code": 503}}\n\n'
LAST = b"data: [DONE]\n\n"


def cut(data, places):
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[begin:end] for begin, end in pairwise(marks)]


@given(
    st.lists(st.sampled_from(EVENTS), max_size=6),
    st.lists(st.sampled_from(EVENTS), max_size=6),
    st.lists(st.integers(0, 1 << 30), max_size=8),
    st.lists(st.integers(0, 1 << 30), max_size=8),
    st.booleans(),
)
def test_an_error_and_the_last_event_are_found_wherever_reads_and_chunks_end(before, after, places, chunks, is_chunked):
    data = b"".join([*before, ERROR, *after, LAST])
    raw = b"".join(map(chunk, cut(data, chunks))) if is_chunked else data
    pieces, found = EventPieces(is_chunked=is_chunked), []
    for piece in cut(raw, places):
        found.append(find_error(pieces.add(piece)))
    assert [status for status in found if status] == [503]
    assert ends_stream(pieces.end)


@given(st.lists(st.binary(max_size=60), max_size=12), st.booleans())
def test_whatever_comes_is_put_together(parts, is_chunked):
    pieces = EventPieces(is_chunked=is_chunked)
    for part in parts:
        pieces.add(part)
    assert len(pieces.end) <= len(b"".join(parts))
    split_chunks(pieces.end)


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("begin", [b"", b"ffffff\r\n"])
def test_an_event_without_end_takes_no_more_than_its_room(is_chunked, begin):
    pieces = EventPieces(is_chunked=is_chunked)
    pieces.add(begin)
    for _ in range(40):
        pieces.add(b"x" * (LONGEST_EVENT_BYTES // 8))
        assert len(pieces.end) <= LONGEST_EVENT_BYTES * 9 // 8
    # What begins behind it is seen again.
    error = chunk(ERROR) if is_chunked else ERROR
    assert [find_error(pieces.add(piece)) for piece in (b"\n\n\r\n", error, error, error)][-1] == 503

"""What a client sends before it is known costs work and memory in proportion to its size, and no more."""

import gzip
import importlib
import json
import logging
import pkgutil
import re
import tracemalloc
import zlib

import moe_gateway
import pytest
from moe_gateway.http import content_encoding
from moe_gateway.http.content_encoding import MOST_MEMBERS, SLICE_BYTES, EncodingRefused, decode_body
from moe_gateway.http.cors import OriginPolicy
from moe_gateway.http.routes import Route
from moe_gateway.logs import set_up_logs
from moe_gateway.request.parsing import parse_body
from moe_gateway.request.recent_requests import LONGEST_MODEL_CHARACTERS
from moe_gateway.request.stream_events import ends_stream
from moe_gateway.tracing import _CONTEXT_LINES

from tests.gateway.messages import post

PAGE = "https://chat.example.org"


def expressions() -> dict[str, re.Pattern]:
    """All compiled expressions of the gateway's modules."""
    found = {}
    for module in pkgutil.walk_packages(moe_gateway.__path__, "moe_gateway."):
        if not module.name.endswith("__main__"):
            rows = vars(importlib.import_module(module.name)).items()
            found |= {f"{module.name}.{name}": value for name, value in rows if isinstance(value, re.Pattern)}
    return found


def test_no_expression_repeats_lazily_without_end():
    # Such a repeat tries what follows it at each of its bytes, which takes quadratic time where that repeats too.
    texts = {
        name: row.pattern if isinstance(row.pattern, str) else row.pattern.decode("latin-1")
        for name, row in expressions().items()
    }
    assert len(texts) > 10
    assert [name for name, text in texts.items() if re.search(r"(?<!\\)(?:[*+]|\{\d+,\})\?", text)] == []


@pytest.mark.parametrize("value", [b"%b", b" %b", b"\t %b\t ", b"%b  "])
def test_blanks_around_an_origin_do_not_count(value):
    policy = OriginPolicy([PAGE])
    lines = b"a: b\r\nOrigin:" + value % PAGE.encode() + b"\r\naccess-control-request-headers:  x-a, x-b \t\r\n"
    answer = policy.preflight_lines(lines)
    assert b"access-control-allow-origin: https://chat.example.org\r\n" in answer
    assert b"access-control-allow-headers: x-a, x-b\r\n" in answer
    assert policy.answer_lines(b"origin: " + value % b"https://chat .example.org" + b"\r\n") == b""


def test_the_lines_of_a_trace_are_found_with_their_blanks():
    lines = b"a: b\r\nTraceparent: \t00-1 \t\r\ntracestate:x=1\r\nx-traceparent: 2\r\n"
    assert _CONTEXT_LINES.sub(b"", lines) == b"a: b\r\nx-traceparent: 2\r\n"
    assert [value.strip(b" \t") for _, value in _CONTEXT_LINES.findall(lines)] == [b"00-1", b"x=1"]


@pytest.mark.parametrize(
    ("tail", "ends"),
    [
        (b'event: response.completed\ndata: {"type": "response.completed"}\n\n', True),
        (b'event: message_stop\r\ndata: {"type":"message_stop"}\r\n\r\n', True),
        (b'data: {"type":"response.failed","response":{}}\n\n', True),
        (b'data: {"text": "event: message_stop"}\n\n', False),
        (b'event: message_stop\nevent: ping\ndata: {"a": 1}\n\n', False),
    ],
)
def test_the_last_named_event_is_found(tail, ends):
    assert ends_stream(tail) is ends


def test_a_query_of_ids_is_not_copied_for_each_document():
    body = json.dumps({"model": "m", "query": [1] * 3000, "documents": [[2, 3]] * 3000}).encode()
    parse_body(Route.RERANK, body)
    tracemalloc.start()
    parsed = parse_body(Route.RERANK, body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parsed.prompt_tokens == 3000 * 3000 + 6000
    assert parsed.prompt.startswith(b"[[1,1,")
    assert max(len(parsed.prompt), peak / 50) < len(body)


def test_a_body_of_many_members_is_refused():
    member = gzip.compress(b"", mtime=0)
    assert decode_body(member * MOST_MEMBERS, [b"gzip"], 1000) == b""
    with pytest.raises(EncodingRefused, match=f"more than {MOST_MEMBERS} parts") as refused:
        decode_body(member * (MOST_MEMBERS + 1), [b"gzip"], 1000)
    assert refused.value.outcome.status == 400


@pytest.mark.parametrize("members", [1, 2, 500])
def test_a_decoder_is_given_a_slice_at_a_time(monkeypatch, members):
    class Counting:
        def __init__(self):
            self.inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

        def decompress(self, data, most_bytes):
            given.append(len(data))
            return self.inner.decompress(data, most_bytes)

        eof = property(lambda self: self.inner.eof)
        unused_data = property(lambda self: self.inner.unused_data)

    given: list[int] = []
    monkeypatch.setitem(content_encoding._DECODERS, b"gzip", lambda _body: Counting())
    text = bytes(range(256)) * 400
    body = gzip.compress(text, compresslevel=0) * members
    assert decode_body(body, [b"gzip"], 1 << 30) == text * members
    assert max(given) <= SLICE_BYTES
    assert sum(given) <= len(body) + members * SLICE_BYTES


def test_decoding_ends_where_nobody_waits_for_the_body():
    asked = iter([True, True, False])
    with pytest.raises(EncodingRefused, match="nobody waits"):
        decode_body(gzip.compress(b"x" * 400_000, compresslevel=0), [b"gzip"], 1 << 30, lambda: next(asked))
    assert next(asked, "all asked") == "all asked"


async def test_the_record_of_a_request_keeps_the_beginning_of_its_models_name(make_engine, serve):
    served = await serve(await make_engine())
    served.gateway.dispatcher.models = frozenset()
    name = "x" * 10_000
    assert (await served.ask(post({"model": name, "prompt": "y"}, extra=b"x-request-id: r\r\n"))).status == 200
    record = served.gateway.recent.record("r")
    assert record is not None
    assert record.model == name[:LONGEST_MODEL_CHARACTERS]


def test_bad_forms_are_not_logged(monkeypatch):
    forms = logging.getLogger("python_multipart.multipart")
    root, library = logging.getLogger(), logging.getLogger("python_multipart")
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(library, "level", library.level)
    try:
        set_up_logs()
        assert not forms.isEnabledFor(logging.WARNING)
        assert forms.isEnabledFor(logging.ERROR)
    finally:
        monkeypatch.undo()
        root.manager._clear_cache()

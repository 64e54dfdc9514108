"""JSON that the engine takes is taken: what Python's reader and pydantic understand, not RFC 8259 alone."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.http.routes import Route
from moe_gateway.request.json_body import dump_text, load_json, read_flag, read_integer
from moe_gateway.request.parsing import BadBody, parse_body

from tests.gateway.messages import OK, post, prompt

BODY = '{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "h\u00e9llo"}]'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_every_encoding_that_python_detects_is_read(encoding):
    parsed = parse_body(Route.CHAT, (BODY + "}").encode(encoding))
    assert (parsed.model, parsed.stream, parsed.prompt.decode()) == ("tiny", True, "user\nh\u00e9llo")


@pytest.mark.parametrize(
    "field",
    ['"x": NaN', '"x": [Infinity, -Infinity]', '"x": 1e400', '"x": "\\ud83d"', '"user": "a\\ud83d"', f'"x": {10**40}'],
)
def test_unused_fields_may_have_what_python_reads(field):
    parsed = parse_body(Route.CHAT, f"{BODY}, {field}}}".encode())
    assert (parsed.model, parsed.prompt.decode()) == ("tiny", "user\nh\u00e9llo")


def test_a_lone_surrogate_counts_as_a_character_of_the_prompt():
    body = BODY.replace("h\u00e9llo", "cut \\ud83d")
    assert parse_body(Route.CHAT, f"{body}}}".encode()).prompt == b"user\ncut ?"
    tools = f'{body}, "tools": [{{"name": "\\ud83d"}}]}}'
    assert b'{"name": "\\ud83d"}' in parse_body(Route.CHAT, tools.encode()).prompt


@pytest.mark.parametrize(
    ("value", "level"), [("0.0", 0), ("2.0", 2), ("-1", -1), ("false", 0), ("true", 1), ('"3"', 3), ("null", 0)]
)
def test_a_priority_is_what_pydantic_makes_of_it(value, level):
    assert parse_body(Route.CHAT, f'{BODY}, "priority": {value}}}'.encode()).priority == level


@pytest.mark.parametrize("value", ["1.5", '"high"', "[]", "{}", "NaN", "Infinity"])
def test_a_priority_that_is_no_integer_is_refused(value):
    with pytest.raises(BadBody, match="priority must be an integer"):
        parse_body(Route.CHAT, f'{BODY}, "priority": {value}}}'.encode())


@pytest.mark.parametrize("route", [Route.MESSAGES, Route.COUNT_TOKENS, Route.TOKENIZE])
@pytest.mark.parametrize("value", [1.5, "high", [], {}, 10**30])
def test_a_priority_is_no_field_of_some_bodies(route, value):
    assert parse_body(route, json.dumps({"priority": value}).encode()).priority == 0


@pytest.mark.parametrize(
    ("value", "stream"),
    [("1", True), ("1.0", True), ('"true"', True), ('"yes"', True), ("0", False), ('"off"', False), ("null", False)],
)
def test_a_stream_is_what_pydantic_reads_as_one(value, stream):
    assert parse_body(Route.CHAT, f'{{"stream": {value}}}'.encode()).stream is stream


def test_an_empty_name_of_a_model_names_none():
    assert parse_body(Route.CHAT, b'{"model": ""}').model is None


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": "caf\xe9"}', b"{}\x00", b"{} {}", b"[" * 100_000, b"\xff\xfe{"])
def test_what_python_refuses_too_is_refused(body):
    with pytest.raises(ValueError, match=r"."):
        load_json(body)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=5,
)


@given(VALUES, st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig"]))
def test_any_document_is_read_as_python_reads_it(value, encoding):
    body = json.dumps({"a": value}, ensure_ascii=False).encode(encoding)
    assert load_json(body) == json.loads(body)
    assert isinstance(dump_text(value), bytes)


@given(VALUES)
def test_any_value_is_an_integer_a_flag_or_refused(value):
    assert read_flag(value) in (True, False)
    with contextlib.suppress(ValueError):
        assert isinstance(read_integer(value), int)


async def test_such_a_body_passes_as_it_came(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    body = json.dumps(prompt(priority=0.0)).encode("utf-16")
    assert (await served.ask(post(body))).json == OK
    assert engine.requests[0].body == body


@pytest.mark.parametrize("target", [b"http://gateway", b"http://gateway:8000", b"HTTPS://[::1]:1", b"http://a@b"])
async def test_a_target_that_names_the_host_is_its_path(make_engine, serve, target):
    engine = await make_engine()
    served = await serve(engine)
    assert (await served.ask(post(prompt(), (target + b"/v1/completions?a=b").decode()))).json == OK
    assert engine.requests[0].line == b"POST /v1/completions?a=b HTTP/1.1"
    get = b"GET %b/health HTTP/1.1\r\nhost: x\r\n\r\n" % target
    assert (await served.ask(get)).status == 200

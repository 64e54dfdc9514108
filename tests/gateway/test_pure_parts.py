"""The parts without I/O: what they read of any bytes and any JSON, and what they refuse."""

import contextlib
import json
import string

import httptools
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from moe_contract.agent_state import read_engine_state
from moe_contract.documents import parse_model
from moe_contract.gateway_config import EngineAddress, GatewayConfig, GatewaySettings, parse_gateway_settings
from moe_contract.input_errors import InvalidInput
from moe_gateway.engines.signals import read_metrics
from moe_gateway.http.heads import build_request_head, ends_between_chunks, skip_informational, stamp_response
from moe_gateway.http.replies import REASONS, RequestOutcome, build_error, build_stream_error, frame_chunk
from moe_gateway.http.routes import ROUTES, Route, find_route
from moe_gateway.request.parsing import BadBody, parse_body
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestSettings

KNOWN_KEYS = st.sampled_from(
    ["model", "prompt", "messages", "input", "instructions", "content", "text", "role", "user", "priority", "stream"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KNOWN_KEYS | st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
POSTED = st.sampled_from([route for route in Route if route.method == b"POST"])

# Bodies.


@pytest.mark.parametrize(
    ("route", "document", "text", "tokens"),
    [
        (Route.COMPLETIONS, {"prompt": "héllo"}, "héllo", None),
        (Route.COMPLETIONS, {"prompt": ["a", "b"]}, "a\nb", None),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3]}, "[1,2,3]", 3),
        (Route.COMPLETIONS, {"prompt": [[1, 2], [3]]}, "[[1,2],[3]]", 3),
        (Route.COMPLETIONS, {}, "", None),
        (Route.COMPLETIONS, {"prompt": 7}, "", None),
        (Route.CHAT, {"messages": [{"role": "user", "content": "hi"}]}, "user\nhi", None),
        (
            Route.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"image_url": "x"}]}]},
            "user\na\nimage",
            None,
        ),
        (Route.RESPONSES, {"instructions": "be", "input": [{"role": "user", "content": "hi"}]}, "be\nuser\nhi", None),
        (Route.EMBEDDINGS, {"input": ["a", "b"]}, "a\nb", None),
        (Route.TOKENIZE, {"prompt": "x"}, "", 0),
    ],
)
def test_the_prompt_is_found_where_each_route_has_it(route, document, text, tokens):
    parsed = parse_body(route, json.dumps(document).encode())
    assert (parsed.prompt.decode(), parsed.prompt_tokens) == (text, tokens)


def test_the_fields_that_dispatch_needs_are_read():
    parsed = parse_body(Route.CHAT, b'{"model":"m","stream":true,"priority":-3,"user":"u","messages":[]}')
    assert (parsed.model, parsed.stream, parsed.priority, parsed.user) == ("m", True, -3, "u")
    parsed = parse_body(Route.CHAT, b'{"stream":2,"priority":null,"user":7}')
    assert (parsed.model, parsed.stream, parsed.priority, parsed.user) == (None, False, 0, None)


@given(POSTED, ANY_JSON)
def test_any_json_is_read_or_refused(route, document):
    try:
        parsed = parse_body(route, json.dumps(document).encode())
    except BadBody:
        return
    assert isinstance(document, dict)
    assert isinstance(parsed.prompt, bytes)
    assert parsed.prompt_tokens is None or parsed.prompt_tokens >= 0


@given(POSTED, st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(route, body):
    with contextlib.suppress(BadBody):
        parse_body(route, body)


@pytest.mark.parametrize("opening", ["[", '{"content":', '[{"text":', "[[1],"])
@pytest.mark.parametrize("depth", [1, 200, 300, 500, 1000, 1022])
def test_any_depth_is_read_or_refused(opening, depth):
    closing = {"[": "]", '{"content":': "}", '[{"text":': "}]", "[[1],": "]"}[opening]
    nested = opening * depth + "1" + closing * depth
    for route, name in (
        *((Route.CHAT, "messages"), (Route.COMPLETIONS, "prompt"), (Route.RESPONSES, "input")),
        *((Route.MESSAGES, "messages"), (Route.MESSAGES, "system"), (Route.MESSAGES, "tools")),
        *((Route.RERANK, "documents"), (Route.DECISIONS, "state"), (Route.GENERATE, "token_ids")),
    ):
        with contextlib.suppress(BadBody):
            parse_body(route, f'{{"{name}": {nested}}}'.encode())


# Routes and heads.


@given(st.text(string.printable).map(str.encode) | st.sampled_from(sorted(ROUTES)))
def test_only_the_exact_paths_have_a_route(url):
    route = find_route(url)
    if route is None or b"{" not in route.path:
        assert route is (ROUTES.get(url.split(b"?")[0]))
    for path in ROUTES:
        assert find_route(b"/" + path) is None
        assert find_route(path + b"/") is None
        assert find_route(path + b"?" + url) is ROUTES[path]


def test_the_head_to_the_engine_is_exact():
    head = build_request_head(
        b"POST",
        b"/v1/completions?a=b",
        b"x: y\r\n",
        host=b"h:1",
        body_bytes=2,
        request_id=b"id",
        rank=3,
    )
    assert head == (
        b"POST /v1/completions?a=b HTTP/1.1\r\nhost: h:1\r\nx-request-id: id\r\ncontent-length: 2\r\n"
        b"x-data-parallel-rank: 3\r\nx: y\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("head", "close", "stamped"),
    [
        (b"HTTP/1.1 200 OK\r\nA:  b\r\n\r\n", False, b"HTTP/1.1 200 OK\r\nx-request-id: i\r\nA:  b\r\n\r\n"),
        (
            b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n",
            True,
            b"HTTP/1.1 200 OK\r\nx-request-id: i\r\nconnection: close\r\nA: b\r\n\r\n",
        ),
        (
            b"HTTP/1.0 200 OK\r\nConnection: x, Content-Length\r\nX: 1\r\nContent-Length: 4\r\n\r\n",
            False,
            b"HTTP/1.1 200 OK\r\nx-request-id: i\r\nContent-Length: 4\r\n\r\n",
        ),
        (b"HTTP/1.1 204 \r\nKEEP-ALIVE: 5\r\n\r\n", False, b"HTTP/1.1 204 \r\nx-request-id: i\r\n\r\n"),
        (b"HTTP/1.1 204 \r\n\r\n", False, b"HTTP/1.1 204 \r\nx-request-id: i\r\n\r\n"),
    ],
)
def test_the_head_to_the_client_is_the_engines_with_the_id(head, close, stamped):
    body = b"body\r\nConnection: x\r\n\r\n"
    assert stamp_response(head + body, head.lower(), b"i", close=close) == stamped + body


def test_informational_heads_are_skipped():
    assert skip_informational(b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 103 E\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n") == (
        b"HTTP/1.1 200 OK\r\n\r\n"
    )


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
def test_whole_chunks_are_known_from_torn_ones(pieces):
    whole = b"".join(map(frame_chunk, pieces))
    assert ends_between_chunks(whole)
    borders = {len(b"".join(map(frame_chunk, pieces[:count]))) for count in range(len(pieces) + 1)}
    for end in range(len(whole)):
        assert ends_between_chunks(whole[:end]) is (end in borders)
    assert not ends_between_chunks(whole + b"0\r\n\r\n")


@given(st.binary(max_size=60))
def test_any_bytes_are_chunks_or_not(data):
    assert ends_between_chunks(data) in (True, False)


# Replies.


@given(st.sampled_from([outcome for outcome in RequestOutcome if outcome.status in REASONS]), st.text(), st.booleans())
def test_every_refusal_is_a_whole_http_message(outcome, message, close):
    class Reader:
        body, complete, keep_alive = b"", False, False

        def on_body(self, data):
            self.body += data

        def on_message_complete(self):
            self.complete, self.keep_alive = True, parser.should_keep_alive()

    raw = build_error(outcome, message.encode(errors="replace").decode(), request_id=b"i", close=close, retry_after_s=3)
    reader = Reader()
    parser = httptools.HttpResponseParser(reader)
    parser.feed_data(raw)
    assert (reader.complete, parser.get_status_code(), reader.keep_alive) == (True, outcome.status, not close)
    assert orjson.loads(reader.body)["error"]["code"] == outcome.label


def test_every_outcome_that_is_answered_has_a_reason_phrase():
    assert {outcome.status for outcome in RequestOutcome} - {RequestOutcome.CLIENT_GONE.status} <= set(REASONS)


def test_an_error_event_ends_what_was_unfinished():
    assert build_stream_error(RequestOutcome.ENGINE_FAILED, "x").startswith(b"\n\ndata: {")
    assert build_stream_error(RequestOutcome.ENGINE_FAILED, "a\nb").count(b"\n\n") == 2


# Configuration.

IN_FORCE = GatewaySettings(
    dispatch=EngineSettings(), request=RequestSettings(), engines=(EngineAddress(name="a", url="http://127.0.0.1:1"),)
)
FIELD = st.sampled_from(
    [
        "dispatch",
        "request",
        "engines",
        "policy",
        "stickiness_s",
        "saturation_s",
        "targets",
        "inter_token_s",
        "ageing_rate",
        "name",
        "url",
        "ranks",
        "agent_url",
        "listen",
        "admin",
        "port",
        "host",
        "limits",
        "token_file",
        "max_body_bytes",
    ]
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD | st.text(max_size=5), inner, max_size=4)
)


@given(DOCUMENTS)
@example({"bytes": None})
@example({"dispatch": {"str": 1}})
def test_any_change_is_valid_or_names_its_problems(document):
    try:
        change = parse_gateway_settings(document, IN_FORCE)
    except InvalidInput:
        return
    assert parse_gateway_settings(orjson.loads(orjson.dumps(change.document())), IN_FORCE) == change


@given(DOCUMENTS)
def test_any_configuration_is_valid_or_names_its_problems(document):
    with contextlib.suppress(InvalidInput):
        parse_model(GatewayConfig, document)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8001", "http://[::1]:80", "http://a.b-c.svc:1", "http://host"])
def test_addresses_are_taken(url):
    assert EngineAddress(name="a", url=url).url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "https://h",
        "http://h/",
        "http://h/x",
        "http://h?x",
        "http://h#x",
        "http://u@h",
        "http://h:",
        "http://h:99999",
        "http://h:x",
        "http://[::1",
        "http://:80",
        "http://a b",
        "http://h\n",
        "h:80",
        "http://é",
    ],
)
def test_what_is_no_address_is_not_taken(url):
    with pytest.raises(ValueError, match="an address such as"):
        EngineAddress(name="a", url=url)


# Signals.


NAMES = st.sampled_from(["vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "other"])
LABELS = st.sampled_from(
    ["", '{engine="0"}', '{engine="3",a="b"}', '{engine="-1"}', '{engine="x"}', '{engine="\u0663"}']
)
SAMPLES = st.tuples(NAMES, LABELS, st.floats()).map(lambda row: f"{row[0]}{row[1]} {row[2]}\n")


@given(st.lists(SAMPLES, max_size=6).map("".join))
def test_any_samples_yield_signals_of_ranks(text):
    ranks = [rank for rank, _ in read_metrics(text)]
    assert ranks == sorted(set(ranks) & {0, 3})


def test_a_signal_of_a_newer_agent_is_read_by_the_names_that_are_known():
    text = b'{"phase": "ready", "ranks": [{"rank": 0, "age_s": -1, "waiting": 2, "from_the_future": 1}]}'
    (row,) = read_engine_state(text).ranks
    assert (row.signal.waiting, row.signal.step_time, row.age_s) == (2, None, -1.0)

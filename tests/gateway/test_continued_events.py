"""Streams of `/v1/messages` and `/v1/responses` whose engine fails go on at another one, which computes them anew."""

import json

import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.gateway_config import ContinuedStreams
from moe_gateway.continuation.event_stream import EventStream
from moe_gateway.continuation.find import find_continuation
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import parse_body
from moe_gateway.request.stream_events import split_chunks

from tests.gateway.messages import SSE_HEAD, chunk, post
from tests.gateway.peers import always
from tests.gateway.speaking_engine import MESSAGES, RESPONSES, Part, Speaking, named, read_event
from tests.gateway.test_continuation import NOTICE, TURNS, start
from tests.gateway.waiting import until

PATHS = {Route.MESSAGES: MESSAGES, Route.RESPONSES: RESPONSES}
TEXT = "Grüße aus 東京, where 🦀 live. "
PARTS = (
    Part("thinking", "Let me see. "),
    Part("text", TEXT),
    Part("tool", '{"city": "東京"}', "weather"),
    Part("tool", "{}", "time"),
)
FAILURES = ["reset", "half", "dead", "marked dead", "ends", "abort", "error"]


def body_of(route, **fields):
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
    if route is Route.RESPONSES:
        asked = {"input": "hello", "max_output_tokens": 60}
    return {"model": "tiny", "stream": True, "temperature": 0, **asked, **fields}


def ask_for(route, **fields):
    return post(body_of(route, **fields), PATHS[route])


def events(body):
    """The documents of a stream, without its comments."""
    return [read_event(row + b"\n\n") for row in body.split(b"\n\n") if row and not row.startswith(b":")]


def all_ids(rows):
    """The ids in the events of a response, each time they stand there, by place."""
    for row in rows:
        parts = [row, row.get("item"), row.get("response")]
        parts += (row.get("response") or {}).get("output") or ()
        for part in parts:
            yield from (part[name] for name in ("item_id", "id", "call_id") if part and name in part)


def whole(route, rows):
    """A stream as a client understands it: its events, deltas of one part as one, with ids numbered as they come."""
    numbers = [row.pop("sequence_number", None) for row in rows]
    assert numbers == [None if route is Route.MESSAGES else number for number in range(len(rows))]
    names = {}
    for value in all_ids(rows):
        names.setdefault(value, f"id-{len(names)}")
    joined = []
    for row in rows:
        text = json.dumps(row, ensure_ascii=False, sort_keys=True)
        for value, name in names.items():
            text = text.replace(f'"{value}"', f'"{name}"')
        rest, text = take_text(json.loads(text))
        if text and joined and joined[-1][0] == rest:
            joined[-1] = (rest, joined[-1][1] + text)
        else:
            joined.append((rest, text))
    return joined


def take_text(row):
    """An event without the text of its delta, and that text."""
    delta = row.get("delta")
    if type(delta) is str:
        return row | {"delta": ""}, delta
    for name in {"text", "thinking", "partial_json"} & {*(delta or {})}:
        return row | {"delta": delta | {name: ""}}, delta[name]
    return row, ""


def expected(route, **script):
    """The stream without a failure."""
    engine = Speaking(parts=PARTS, **script)
    return whole(route, [read_event(row) for row in engine.events(PATHS[route], body_of(route))])


def without_draws(rows):
    """A message without its signatures and ids of calls, which are drawn at random."""
    text = json.dumps(rows)
    for number in (1, 2):
        text = text.replace(f"signature-{number}-", "signature-").replace(f"chatcmpl-tool-{number}-", "tool-")
    return json.loads(text)


def length_of(route):
    return len(list(Speaking(parts=PARTS).events(PATHS[route], {})))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("route", PATHS)
async def test_a_stream_survives_its_engine(make_engine, serve, route, failure):
    script = Speaking(parts=PARTS, cuts=[9], fail=failure, sizes=[3, 5])
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(route))
    assert (answer.status, answer.headers[b"x-moeserving-continuation"]) == (200, b"replay")
    assert without_draws(whole(route, events(answer.body))) == without_draws(expected(route))
    assert answer.body.count(NOTICE) == 1
    assert b"moeserving-engine" not in answer.body
    (first_path, first), (path, second) = script.bodies
    assert first_path == path == PATHS[route]
    assert second == first | ({"request_id": "resp_1"} if route is Route.RESPONSES else {})
    stats = served.gateway.stats
    record = served.gateway.recent.record(answer.headers[b"x-request-id"].decode())
    assert [attempt.continued for attempt in record.attempts] == ["", "replay"]
    assert (stats.continuations, stats.failed, served.in_flight) == ({"replay": 1}, 0, 0)
    assert sum(stats.requests.values()) == stats.requests[route.label, 200] == 1
    assert sum(stats.ttft.counts) == 1


@pytest.mark.parametrize("route", PATHS)
async def test_a_stream_is_whole_wherever_it_is_cut(make_engine, serve, route):
    script = Speaking(parts=PARTS, sizes=[3, 7])
    served = await start(make_engine, serve, script)
    want = without_draws(expected(route))
    for cut in range(5, length_of(route) + 1):
        script.cuts, script.bodies = [cut], []
        answer = await served.ask(ask_for(route))
        assert without_draws(whole(route, events(answer.body))) == want, cut
        assert len({row["message"]["id"] for row in events(answer.body) if "message" in row}) <= 1
    assert served.gateway.stats.failed == 0


@pytest.mark.parametrize("route", PATHS)
async def test_without_a_failure_nothing_of_a_stream_differs(make_engine, serve, route):
    served = await start(make_engine, serve, Speaking(parts=PARTS))
    plain = await start(make_engine, serve, Speaking(parts=PARTS), continuation=None)
    assert (await served.ask(ask_for(route))).body == (await plain.ask(ask_for(route))).body


async def test_only_the_last_event_needs_no_other_engine(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[length_of(Route.MESSAGES) - 1])
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.MESSAGES))
    assert whole(Route.MESSAGES, events(answer.body)) == expected(Route.MESSAGES)
    assert (len(script.bodies), served.gateway.stats.continuations) == (1, {})


@pytest.mark.parametrize("drift", [2, 20])
@pytest.mark.parametrize("route", PATHS)
async def test_another_engine_that_computes_something_else_ends_the_stream(make_engine, serve, route, drift):
    script = Speaking(parts=PARTS, cuts=[16], drift=drift)
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(route))
    last = answer.body.rstrip().split(b"\n")[-1]
    assert b"something else" in json.loads(last.removeprefix(b"data: "))["error"]["message"].encode()
    assert b"?" not in answer.body
    assert served.gateway.stats.continuations == {"replay": 1, "none": 1}


@pytest.mark.parametrize("route", PATHS)
async def test_another_engine_whose_answer_is_shorter_ends_the_stream(make_engine, serve, route):
    script = Speaking(parts=PARTS, cuts=[16])
    served = await start(make_engine, serve, script)
    write = script.events

    def shorter(path, body):
        if len(script.bodies) > 1:
            script.parts = (Part("thinking", "Let"),)
        return write(path, body)

    script.events = shorter
    answer = await served.ask(ask_for(route))
    assert b"something else" in answer.body
    assert b"message_stop" not in answer.body
    assert b"response.completed" not in answer.body


async def test_a_response_is_found_at_the_engine_that_ended_it(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[9])
    engines = [await make_engine(script) for _ in range(3)]
    served = await serve(*engines, dispatch=TURNS, continuation={})
    answer = await served.ask(ask_for(Route.RESPONSES))
    record = served.gateway.recent.record(answer.headers[b"x-request-id"].decode())
    assert served.gateway.dispatcher._jobs.responses.find("resp_1") == record.attempts[1].name


async def test_a_client_that_names_its_response_keeps_the_name(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[9])
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.RESPONSES, request_id="resp_mine"))
    assert whole(Route.RESPONSES, events(answer.body)) == expected(Route.RESPONSES)
    assert script.bodies[0] == script.bodies[1]


async def test_a_stream_stays_at_an_engine_that_drains(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[9], fail="pauses")
    engines = [await make_engine(script), await make_engine(script)]
    served = await serve(*engines, dispatch=TURNS, continuation={})
    client = await served.connect()
    client.send(ask_for(Route.MESSAGES))
    await until(lambda: served.gateway.stats.ttft.total > 0)
    first = next(engine for engine in engines if engine.requests)
    first.agent.say(accepting=False, phase="draining")
    await until(lambda: served.gateway.dispatcher.engines[first.name].is_draining)
    later_s = served.gateway.clock() + 0.5
    await until(lambda: served.gateway.clock() > later_s)
    assert (len(script.bodies), served.in_flight) == (1, 1)
    client.reset()


@pytest.mark.parametrize("route", PATHS)
async def test_an_event_that_is_not_known_ends_the_hope_of_a_stream(make_engine, serve, route):
    script = Speaking(parts=PARTS, cuts=[16])
    served = await start(make_engine, serve, script)
    write = script.events
    unknown = named({"type": "response.web_search_call.searching", "sequence_number": 4})

    def with_unknown(path, body):
        rows = list(write(path, body))
        return [*rows[:4], unknown, *rows[4:]]

    script.events = with_unknown
    answer = await served.ask(ask_for(route))
    assert unknown in answer.body
    assert len(script.bodies) == 1
    assert b'"error"' in answer.body.split(b"\n\n")[-2]
    assert served.gateway.stats.continuations == {"none": 1}


@pytest.mark.parametrize("route", PATHS)
async def test_a_stream_of_unknown_events_is_what_it_is_without_continuation(make_engine, serve, route):
    """Also where its last event is not known."""
    rows = list(Speaking(parts=PARTS).events(PATHS[route], {}))[:-1]
    rows = [*rows[:8], named({"type": "response.refusal.delta", "delta": "no"}), *rows[8:]]
    script = always(SSE_HEAD + b"".join(map(chunk, [*rows, named({"type": "response.failed"})])) + b"0\r\n\r\n")
    served = await start(make_engine, serve, script)
    plain = await start(make_engine, serve, script, continuation=None)
    assert (await served.ask(ask_for(route))).body == (await plain.ask(ask_for(route))).body
    assert served.gateway.stats.failed == 0


def begun_message(rows):
    stream = stream_of(Route.MESSAGES, body_of(Route.MESSAGES))
    stream.start()
    return stream, stream.read(SSE_HEAD + b"".join(map(chunk, rows)), has_begun=True)


UNKNOWN, END = named({"type": "unknown"}), b"0\r\n\r\n"
REFUSED = named({"type": "error", "error": {"type": "invalid_request_error", "message": "no", "code": 400}})


@pytest.mark.parametrize(
    ("known", "behind"),
    [(False, b""), (False, chunk(b"data: [DONE]\n\n")), (True, chunk(REFUSED))],
    ids=["end", "done", "error of the client"],
)
def test_the_end_of_a_block_passes_where_nothing_may_show_that_it_was_cut_off(known, behind):
    rows = list(Speaking(parts=PARTS[1:2]).events(MESSAGES, {}))[:-2]
    assert b"content_block_stop" in rows[-1]
    if not known:
        rows.insert(1, UNKNOWN)
    stream, out = begun_message(rows)
    assert rows[-1] not in out
    out += stream.read(behind + END, has_begun=True)
    assert split_chunks(out.removeprefix(SSE_HEAD)) == (b"".join(rows) + split_chunks(behind)[0], END)
    assert stream.failure is None


def test_ends_of_blocks_are_not_held_without_end():
    rows = list(Speaking(parts=PARTS[1:2]).events(MESSAGES, {}))[:-2]
    stream, out = begun_message([*rows, *rows[-1:] * 100])
    assert 90 < out.count(rows[-1]) <= 101
    assert stream.failure is None


def test_a_field_that_is_nested_deeply_is_no_exception():
    """orjson reads more levels than it writes."""
    deep = b'{"z": %b%b,' % (b"[" * 600, b"]" * 600)
    for route in PATHS:
        rows = list(Speaking(parts=PARTS).events(PATHS[route], {}))
        stream = stream_of(route, body_of(route))
        stream.start()
        stream.read(SSE_HEAD + b"".join(map(chunk, rows[:8])), has_begun=True)
        stream.prepare(None)
        stream.start()
        again = [row.replace(b"{", deep, 1) for row in rows]
        assert stream.read(SSE_HEAD + b"".join(map(chunk, again)), has_begun=True) == b""
        assert stream.failure is not None


# The seam, without sockets.


def stream_of(route, body):
    data = json.dumps(body).encode()
    request = ClientRequest(b"POST", PATHS[route].encode(), b"", data, b"id", None, True, False, 0.0)
    return find_continuation(request, route, parse_body(route, data), ContinuedStreams())


@pytest.mark.parametrize(
    ("route", "fields", "goes_on"),
    [
        (Route.MESSAGES, {}, True),
        (Route.MESSAGES, {"tools": [{"name": "a", "input_schema": {}}], "thinking": {"type": "adaptive"}}, True),
        (Route.MESSAGES, {"temperature": 1, "seed": 3}, False),
        (Route.MESSAGES, {"vllm_xargs": {"a": 1}}, False),
        (Route.RESPONSES, {}, True),
        (Route.RESPONSES, {"temperature": 1, "seed": 3}, True),
        (Route.RESPONSES, {"temperature": 1}, False),
        (Route.RESPONSES, {"store": True, "background": False, "previous_response_id": None, "tools": []}, True),
        (Route.RESPONSES, {"background": True}, False),
        (Route.RESPONSES, {"previous_response_id": "resp_1"}, False),
        (Route.RESPONSES, {"tools": [{"type": "function"}, {"type": "custom"}, {"type": "namespace"}]}, True),
        (Route.RESPONSES, {"tools": [{"type": "web_search_preview"}]}, False),
        (Route.RESPONSES, {"tools": "none"}, False),
        (Route.RESPONSES, {"include": ["reasoning.encrypted_content"]}, True),
        (Route.RESPONSES, {"include": ["message.output_text.logprobs"]}, False),
        (Route.COUNT_TOKENS, {}, False),
    ],
    ids=str,
)
def test_the_fields_of_a_request_say_whether_its_stream_goes_on(route, fields, goes_on):
    body = body_of(route, **fields)
    data = json.dumps(body).encode()
    request = ClientRequest(b"POST", route.path, b"", data, b"id", None, True, False, 0.0)
    found = find_continuation(request, route, parse_body(route, data), ContinuedStreams())
    assert isinstance(found, EventStream) is goes_on


def feed(stream, data, size, *, has_begun):
    return b"".join(stream.read(data[at : at + size], has_begun=has_begun) for at in range(0, len(data), size))


TEXTS = st.text(st.sampled_from('abé東🦀\n\0"{'), min_size=1, max_size=12)
ANSWERS = st.lists(st.tuples(st.sampled_from(["thinking", "text", "tool"]), TEXTS), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_cuts_change_nothing(data):
    """Two engines fail one after the other, each anywhere, also amid an event."""
    route = data.draw(st.sampled_from(list(PATHS)))
    parts = tuple(Part(kind, text, f"call {at % 2}") for at, (kind, text) in enumerate(data.draw(ANSWERS)))
    script = Speaking(parts=parts, sizes=data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    body = body_of(route)
    want = whole(route, [read_event(row) for row in script.events(PATHS[route], body)])
    stream = stream_of(route, body)
    out, has_begun = b"", False
    for attempt in range(3):
        url, sent = stream.start()
        script.bodies.append((url.decode(), json.loads(sent)))
        rows = [chunk(row) for row in script.events(url.decode(), json.loads(sent))]
        raw = SSE_HEAD + b"".join(rows) + b"0\r\n\r\n"
        # Behind the first delta of the stream: before it nothing has passed.
        first = next(at for at, row in enumerate(rows) if b".delta" in row or b"_delta" in row)
        least = len(SSE_HEAD + b"".join(rows[: first + 1])) if attempt == 0 else 0
        if attempt < 2:
            raw = raw[: data.draw(st.integers(least, len(raw) - 1))]
        out += feed(stream, raw, data.draw(st.integers(1, 300)), has_begun=has_begun)
        assert stream.failure is None
        has_begun = True
        if (ending := stream.build_ending()) is not None:
            out += ending
            break
        assert stream.can_go_on
        stream.prepare(None)
    passed, rest = split_chunks(out.removeprefix(SSE_HEAD))
    assert rest == b"0\r\n\r\n"
    got = whole(route, events(passed))
    assert unsigned(got) == unsigned(want)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["message", "text", "msg_1_0", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", "type"]), inner, max_size=2),
    max_leaves=4,
)
CHUNKS = [
    {"id": "x", "choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [{"token": "x"}]}}]},
    {"id": "x", "choices": [{"index": 0, "text": "x", "token_ids": [3], "logprobs": {"tokens": ["x"]}}]},
    {
        "id": "x",
        "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "a", "arguments": ""}}]}}],
    },
]


def places(value, path=()):
    """The paths to all values within a document."""
    rows = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
    for name, inner in rows:
        yield (*path, name)
        yield from places(inner, (*path, name))


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_no_document_is_read_with_an_exception(data):
    """Events of vLLM with another value somewhere, from the first engine and from the next one."""
    route = data.draw(st.sampled_from([*PATHS, Route.CHAT]))
    body = {"model": "tiny", "stream": True, "temperature": 0, "messages": [], "max_tokens": 9, "input": "x"}
    request = ClientRequest(b"POST", route.path, b"", json.dumps(body).encode(), b"id", None, True, False, 0.0)
    stream = find_continuation(request, route, parse_body(route, request.body), ContinuedStreams())
    stream.start()
    rows = CHUNKS
    if route in PATHS:
        rows = [read_event(row) for row in Speaking(parts=PARTS).events(PATHS[route], {})]
    stream.read(SSE_HEAD, has_begun=False)
    begun = data.draw(st.integers(0, 12))
    for attempt in range(2):
        for at, row in enumerate(rows):
            if attempt == 0 and at == begun:
                break
            document = json.loads(json.dumps(row))
            if data.draw(st.integers(0, 9)) == 0:
                *way, last = data.draw(st.sampled_from(list(places(document))))
                inner = document
                for name in way:
                    inner = inner[name]
                inner[last] = data.draw(VALUES)
            stream.read(chunk(b"data: %b\n\n" % json.dumps(document).encode()), has_begun=True)
        if not stream.can_go_on:
            break
        stream.prepare(None)
        stream.start()
        stream.read(SSE_HEAD, has_begun=True)


def unsigned(rows):
    """Without what is drawn at random in messages."""
    kept = json.loads(json.dumps(rows))
    for row, _ in kept:
        row.get("delta", {}).pop("signature", None) if type(row.get("delta")) is dict else None
        row.get("content_block", {}).pop("id", None)
    return kept


# The official clients.


async def test_anthropics_client_sees_one_message(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[length_of(Route.MESSAGES) - 12], sizes=[3, 5], stop_reason="tool_use")
    served = await start(make_engine, serve, script)
    plain = await start(make_engine, serve, Speaking(parts=PARTS, stop_reason="tool_use"), continuation=None)
    messages = []
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}
    for url in (served.url, plain.url):
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
            client.messages.stream(**asked, extra_body={"temperature": 0}) as stream,
        ):
            messages.append(await stream.get_final_message())
    assert len(script.bodies) == 2
    continued = messages[0]
    rows = [without_draws(message.model_dump(mode="json")) for message in messages]
    assert rows[0] == rows[1]
    assert [block.type for block in continued.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert continued.content[2].input == {"city": "東京"}


async def test_openais_client_sees_one_response(make_engine, serve):
    script = Speaking(parts=PARTS, cuts=[24], sizes=[3, 5])
    served = await start(make_engine, serve, script)
    plain = await start(make_engine, serve, Speaking(parts=PARTS), continuation=None)
    responses = []
    for url in (served.url, plain.url):
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            client.responses.stream(model="tiny", input="hello", temperature=0, max_output_tokens=60) as stream,
        ):
            passed = [event async for event in stream]
            responses.append(await stream.get_final_response())
            assert [event.sequence_number for event in passed] == list(range(len(passed)))
            done = {event.item.id for event in passed if event.type == "response.output_item.done"}
            assert done == {item.id for item in responses[-1].output}
    assert len(script.bodies) == 2
    continued, undisturbed = responses
    assert continued.output_text == undisturbed.output_text == TEXT
    assert continued.usage == undisturbed.usage
    assert [item.type for item in continued.output] == [item.type for item in undisturbed.output]

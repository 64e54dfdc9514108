"""Streams whose engine fails go on at another engine: the client gets what it would have got without the failure."""

import json
import time

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.gateway_config import ContinuedStreams
from moe_gateway.continuation.find import find_continuation
from moe_gateway.continuation.stream import Continuation
from moe_gateway.engines.fleet import LONGEST_EJECTION_S
from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.parsing import parse_body
from moe_gateway.request.stream_events import split_chunks

from tests.gateway.computing_engine import MAX_MODEL_LEN, Computing
from tests.gateway.messages import SSE_HEAD, chunk, json_answer, post
from tests.gateway.peers import PeerServer, always
from tests.gateway.waiting import until

TURNS = {"policy": "roundRobin"}
TEXT = "Grüße aus 東京, where 🦀 live. STOP here. "
ON = {"continuation": {"chats_by_prefix": True}}
FAILURES = ["reset", "half", "dead", "marked dead", "ends", "abort"]
NOTICE = b": continued by another engine\n\n"
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
PATHS = {Route.COMPLETIONS: "/v1/completions", Route.CHAT: "/v1/chat/completions"}


def body_of(route, **fields):
    prompt = {"prompt": "hello"} if route is Route.COMPLETIONS else {"messages": [{"role": "user", "content": "hello"}]}
    return {"model": "tiny", "stream": True, "temperature": 0, "max_tokens": 60, **prompt, **fields}


def ask_for(route, **fields):
    return post(body_of(route, **fields), PATHS[route])


def events(body):
    """The documents of a stream, without its comments; its last event as text."""
    rows = [row for row in body.decode().split("\n\n") if row and not row.startswith(":")]
    return [row if row == "data: [DONE]" else json.loads(row.removeprefix("data: ")) for row in rows]


def whole(rows):
    """A stream as a client understands it: text by field, token ids, the end, usage, and what its chunks share."""
    documents = [row for row in rows if type(row) is dict]
    choices = [row["choices"][0] for row in documents if row["choices"]]
    deltas = [choice.get("delta") or {"text": choice.get("text")} for choice in choices]
    fields = {name for delta in deltas for name in delta} - {"role"}
    return {
        "text": {name: "".join(delta.get(name) or "" for delta in deltas) for name in fields},
        "roles": sum("role" in delta for delta in deltas),
        "tokens": [token for choice in choices for token in choice.get("token_ids") or ()],
        "ends": [(row["finish_reason"], row.get("stop_reason")) for row in choices if row["finish_reason"]],
        "usage": documents[-1].get("usage"),
        "shared": {(row["id"], row["object"], row["created"], row["model"]) for row in documents},
        "done": rows.count("data: [DONE]") == 1 and rows[-1] == "data: [DONE]",
    }


async def start(make_engine, serve, script, *, engines=2, **sections):
    """A gateway before engines with one script; which of them is first is left to chance."""
    running = [await make_engine(script) for _ in range(engines)]
    served = await serve(*running, dispatch=TURNS, **(ON | sections))
    for engine in running:
        served.gateway.dispatcher.set_models(engine.name, {"tiny": {"id": "tiny", "max_model_len": MAX_MODEL_LEN}})
    return served


def expected(route, fields, **script):
    """The stream without a failure."""
    engine = Computing(TEXT, **script)
    return whole(
        [json.loads(row.removeprefix(b"data: ")) for row in engine.events(PATHS[route], body_of(route, **fields))]
    )


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("route", PATHS)
async def test_a_stream_survives_its_engine(make_engine, serve, route, failure):
    script = Computing(TEXT, cuts=[9], fail=failure)
    served = await start(make_engine, serve, script)
    begun_s = time.monotonic()
    answer = await served.ask(ask_for(route, **USAGE))
    assert (answer.status, answer.headers[b"x-moeserving-continuation"]) == (200, b"prefix")
    assert whole(events(answer.body)) | {"done": False} == expected(route, USAGE)
    assert whole(events(answer.body))["done"]
    assert answer.body.count(NOTICE) == 1
    assert b"moeserving-engine" not in answer.body
    (_, first), (path, second) = script.bodies
    assert first["return_token_ids"]
    assert path == "/v1/completions"
    assert second["prompt"][:5] == [1000, 1001, 1002, 1003, 1004]
    assert second["max_tokens"] == 60 - (len(second["prompt"]) - 5)
    stats = served.gateway.stats
    record = served.gateway.recent.record(answer.headers[b"x-request-id"].decode())
    assert [attempt.continued for attempt in record.attempts] == ["", "prefix"]
    if "dead" in failure:
        # The engine gets nothing until it has started anew.
        engine = served.gateway.dispatcher.engines[record.attempts[0].name]
        assert engine.ejected_until_s >= begun_s + LONGEST_EJECTION_S
    assert (stats.continuations, stats.failed, served.in_flight) == ({"prefix": 1}, 0, 0)
    assert sum(stats.requests.values()) == stats.requests[route.label, 200] == 1
    assert sum(stats.ttft.counts) == 1


@pytest.mark.parametrize("route", PATHS)
async def test_a_stream_is_whole_wherever_it_is_cut(make_engine, serve, route):
    """Also within a character, within a stop string, and after the last token."""
    fields = {"stop": ["STOP", "🦀🦀"], **USAGE}
    whole_stream = expected(route, fields)
    script = Computing(TEXT)
    served = await start(make_engine, serve, script)
    length = len(list(script.events(PATHS[route], body_of(route, **fields))))
    cuts = [*range(2, length - 2, 6), length - 2, length - 1, length]
    for cut in cuts:
        script.cuts = [cut]
        answer = await served.ask(ask_for(route, **fields))
        assert whole(events(answer.body)) == whole_stream | {"done": True}, cut
    assert served.gateway.stats.failed == 0
    # The last two needed no other engine: only the end of the stream was missing.
    assert served.gateway.stats.continuations.total() == len(cuts) - 2


async def test_an_engine_that_fails_after_each_last_token_counts_as_one_that_breaks_its_answers_off(make_engine, serve):
    script = Computing(TEXT)
    served = await start(make_engine, serve, script, engines=1)
    length = len(list(script.events(PATHS[Route.CHAT], body_of(Route.CHAT))))
    (engine,) = served.gateway.dispatcher.engines.values()
    for count in (1, 2):
        script.cuts = [length]
        assert whole(events((await served.ask(ask_for(Route.CHAT))).body))["done"]
        assert engine.errors == count


async def test_what_the_client_did_not_ask_for_is_not_there(make_engine, serve):
    served = await start(make_engine, serve, Computing(TEXT))
    plain = await start(make_engine, serve, Computing(TEXT), continuation=None)
    for route in PATHS:
        assert (await served.ask(ask_for(route))).body == (await plain.ask(ask_for(route))).body


async def test_a_client_that_asks_for_token_ids_gets_each_once(make_engine, serve):
    fields = {"return_token_ids": True, "stop": "STOP"}
    for route in PATHS:
        served = await start(make_engine, serve, Computing(TEXT, cuts=[12], at_once=3))
        answer = await served.ask(ask_for(route, **fields))
        assert whole(events(answer.body)) == expected(route, fields, at_once=3) | {"done": True}


async def test_with_continuation_off_a_stream_ends_with_an_error_event(make_engine, serve):
    script = Computing(TEXT, cuts=[9])
    served = await start(make_engine, serve, script, continuation=None)
    answer = await served.ask(ask_for(Route.CHAT))
    assert b"x-moeserving-continuation" not in answer.headers
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"
    assert len(script.bodies) == 1
    assert "return_token_ids" not in script.bodies[0][1]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 7},
        {"presence_penalty": 0.5},
        {"bad_words": ["x"]},
        {"structured_outputs": {"json": {}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", PATHS)
async def test_what_counts_from_the_first_token_is_computed_anew(make_engine, serve, route, fields):
    script = Computing(TEXT, cuts=[9])
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(route, **fields, **USAGE))
    assert answer.headers[b"x-moeserving-continuation"] == b"replay"
    assert whole(events(answer.body)) == expected(route, USAGE) | {"done": True}
    assert script.bodies[0] == script.bodies[1]
    assert served.gateway.stats.continuations == {"replay": 1}


async def test_a_chat_whose_text_is_parsed_is_computed_anew(make_engine, serve):
    script = Computing(TEXT, cuts=[25], reasoning="Let me think. ")
    served = await start(make_engine, serve, script, continuation={})
    answer = await served.ask(ask_for(Route.CHAT))
    assert whole(events(answer.body)) == expected(Route.CHAT, {}, reasoning="Let me think. ") | {"done": True}
    assert served.gateway.stats.continuations == {"replay": 1}


@pytest.mark.parametrize("drift", [2, 12])
async def test_another_engine_that_computes_something_else_ends_the_stream(make_engine, serve, drift):
    script = Computing(TEXT, cuts=[20], drift=drift)
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.COMPLETIONS, seed=3, temperature=0.5))
    rows = events(answer.body)
    assert "something else" in rows[-1]["error"]["message"]
    assert TEXT.startswith(whole(rows[:-1])["text"]["text"])
    assert served.gateway.stats.continuations == {"replay": 1, "none": 1}
    # Which is the fault of neither engine alone.
    assert sum(served.gateway.dispatcher.ejections.values()) == 1


async def test_a_request_is_not_carried_from_engine_to_engine(make_engine, serve):
    script = Computing(TEXT, cuts=[9, 9, 9, 9])
    served = await start(make_engine, serve, script, engines=4)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"
    assert len(script.bodies) == 2
    assert served.gateway.stats.continuations == {"prefix": 1, "none": 1}


async def test_an_engine_that_cannot_be_reached_is_no_attempt(make_engine, serve):
    script = Computing(TEXT, cuts=[9])
    engines = [await make_engine(script) for _ in range(3)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    client = await served.connect()
    script.fail = "pauses"
    client.send(ask_for(Route.COMPLETIONS))
    await until(lambda: served.gateway.stats.ttft.total > 0)
    for engine in engines:
        if not engine.requests:
            # Its port is closed; its agent has not noticed yet.
            await PeerServer.stop(engine)
    script.paused.set()
    await until(lambda: sum(served.gateway.dispatcher.ejections.values()) >= 3)
    answer = await client.answer()
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}
    assert served.gateway.stats.continuations == {"prefix": 1}


async def test_a_request_that_failed_before_its_first_token_is_not_continued_any_more(make_engine, serve):
    script = Computing(TEXT, cuts=[0, 9])
    served = await start(make_engine, serve, script, engines=3)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"
    assert len(script.bodies) == 2


@pytest.mark.parametrize(
    "second",
    [always(json_answer({"error": {"message": "too long", "code": 400}}, status="400 Bad Request")), always(SSE_HEAD)],
    ids=["refusal", "head only"],
)
async def test_an_engine_that_does_not_take_the_stream_over_ends_it(make_engine, serve, second):
    computing = Computing(TEXT, cuts=[9])

    async def script(received, writer):
        if computing.bodies:
            await second(received, writer)
            writer.close()
        else:
            await computing(received, writer)

    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"
    assert (served.gateway.stats.failed, served.in_flight) == (1, 0)


async def test_a_stream_waits_for_the_only_engine(make_engine, serve):
    script = Computing(TEXT, cuts=[9])
    served = await start(make_engine, serve, script, engines=1)
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}


async def test_a_stream_for_which_no_engine_comes_back_ends_with_an_error(make_engine, serve):
    script = Computing(TEXT, cuts=[9], fail="pauses")
    engine = await make_engine(script)
    served = await serve(engine, limits={"hold_timeout_s": 0.3}, **ON)
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS))
    await until(lambda: served.gateway.stats.ttft.total > 0)
    engine.agent.say(accepting=False, phase="backoff")
    await until(lambda: not served.accepting)
    script.paused.set()
    answer = await client.answer()
    assert events(answer.body)[-1]["error"]["code"] == "no_engine"
    stats = served.gateway.stats
    assert (served.in_flight, stats.failed, stats.requests) == (0, 1, {("completions", 503): 1})


async def test_an_engine_that_drains_hands_its_streams_over(make_engine, serve):
    script = Computing(TEXT, cuts=[9], fail="pauses")
    engines = [await make_engine(script), await make_engine(script)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS))
    await until(lambda: script.bodies)
    first = next(engine for engine in engines if engine.requests)
    await until(lambda: served.gateway.stats.ttft.total > 0)
    first.agent.say(accepting=False, phase="draining")
    answer = await client.answer()
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}
    assert [len(engine.requests) for engine in engines] == [1, 1]
    assert first.requests[0].gone.is_set() or await first.requests[0].gone.wait()
    stats = served.gateway.stats
    assert (stats.continuations, stats.failed, served.in_flight) == ({"prefix": 1}, 0, 0)


async def test_a_stream_that_had_to_be_computed_anew_stays_at_an_engine_that_drains(make_engine, serve):
    script = Computing(TEXT, cuts=[9], fail="pauses")
    engines = [await make_engine(script), await make_engine(script)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS, seed=1, temperature=1))
    await until(lambda: script.bodies)
    first = next(engine for engine in engines if engine.requests)
    await until(lambda: served.gateway.stats.ttft.total > 0)
    first.agent.say(accepting=False, phase="draining")
    await until(lambda: served.gateway.dispatcher.engines[first.name].is_draining)
    exchange_checks = served.gateway.clock() + 0.5
    await until(lambda: served.gateway.clock() > exchange_checks)
    assert (len(script.bodies), served.in_flight) == (1, 1)
    client.reset()


# The seam, without sockets.


def run(route, body, script, cut):
    """What the client gets of a stream whose first engine fails after `cut` events."""
    data = json.dumps(body).encode()
    request = ClientRequest(b"POST", PATHS[route].encode(), b"", data, b"id", None, True, False, 0.0)
    stream = find_continuation(request, route, parse_body(route, data), ContinuedStreams(chats_by_prefix=True))
    assert isinstance(stream, Continuation)
    out = b""
    for attempt in range(2):
        url, sent = stream.start()
        document = json.loads(sent)
        script.bodies.append((url.decode(), document))
        rows = list(script.events(url.decode(), document))
        out += stream.read(SSE_HEAD, has_begun=attempt > 0)
        for row in rows[: cut if attempt == 0 else None]:
            out += stream.read(chunk(row), has_begun=attempt > 0)
        assert stream.failure is None
        if attempt == 0:
            if (ending := stream.build_ending()) is not None:
                out += ending
                break
            stream.prepare(MAX_MODEL_LEN)
        else:
            out += stream.read(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n", has_begun=True)
            assert stream.failure is None
    body, rest = split_chunks(out.removeprefix(SSE_HEAD))
    assert rest == b"0\r\n\r\n"
    return events(body)


ALPHABET = st.sampled_from("abé東🦀\n")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_cut_changes_nothing(data):
    text = data.draw(st.text(ALPHABET, min_size=4, max_size=30))
    stops = data.draw(st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=2))
    fields = {
        "stop": stops,
        "include_stop_str_in_output": data.draw(st.booleans()),
        "min_tokens": data.draw(st.integers(0, 8)),
        "max_tokens": data.draw(st.integers(2, 60)),
        "return_token_ids": data.draw(st.booleans()),
        **data.draw(st.sampled_from([{}, USAGE])),
        **data.draw(st.sampled_from([{}, {"presence_penalty": 1}])),
    }
    route = data.draw(st.sampled_from(list(PATHS)))
    body = body_of(route, **fields)
    script = Computing(text, at_once=data.draw(st.sampled_from([1, 1, 2, 5])))
    rows = [json.loads(row.removeprefix(b"data: ")) for row in script.events(PATHS[route], body)]
    first_token = 2 if route is Route.CHAT else 1
    if len(rows) < first_token:
        return
    cut = data.draw(st.integers(first_token, len(rows)))
    got = run(route, body, script, cut)
    want = whole(rows) | {"done": True}
    if not fields["return_token_ids"]:
        want["tokens"] = []
    assert whole(got) == want


@pytest.mark.parametrize("name", ["chat", "completion"])
async def test_openais_client_sees_one_stream(make_engine, serve, name):
    script = Computing(TEXT, cuts=[9])
    served = await start(make_engine, serve, script)
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        common = {"model": "tiny", "temperature": 0, "stream": True, "max_tokens": 60}
        if name == "chat":
            messages = [{"role": "user", "content": "hello"}]
            rows = [row async for row in await client.chat.completions.create(messages=messages, **common)]
            text = "".join(row.choices[0].delta.content or "" for row in rows)
        else:
            rows = [row async for row in await client.completions.create(prompt="hello", **common)]
            text = "".join(row.choices[0].text for row in rows)
    assert text == TEXT
    assert len({row.id for row in rows}) == 1
    assert served.gateway.stats.continuations == {"prefix": 1}

"""Quotas, priority classes and their answers, through a gateway."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_gateway.access.metering import read_usage
from moe_gateway.access.priorities import class_priority, write_priority
from moe_scheduling.request.order import LARGEST_EXACT

from tests.gateway.clients import KEY
from tests.gateway.compiled import interpreted
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, answer_ok, never
from tests.gateway.test_forms import form
from tests.gateway.waiting import until

BEARER = b"Authorization: Bearer " + KEY.encode() + b"\r\n"


def use_of(served):
    (use,) = served.gateway._context.gate._quotas._uses.values()
    return use


async def test_more_requests_than_the_quota_are_refused_with_the_time_to_come_again(limited):
    engine, served = await limited(requests_per_minute=2)
    request = post(prompt(), extra=BEARER)
    assert [(await served.ask(request)).status for _ in range(2)] == [200, 200]
    answer = await served.ask(request)
    assert answer.status == 429
    assert 29 <= int(answer.headers[b"retry-after"]) <= 30
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"].startswith("the limit of 2 requests a minute is reached; ask again in ")
    assert len(engine.requests) == 2


async def test_openais_client_sees_a_rate_limit(limited):
    _, served = await limited(requests_per_minute=1)
    async with openai.AsyncOpenAI(api_key=KEY, base_url=served.url + "/v1", max_retries=0) as client:
        await client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.RateLimitError) as raised:
            await client.completions.create(model="tiny", prompt="a")
    assert raised.value.response.headers["retry-after"] == "60"


async def test_models_and_health_cost_nothing(limited):
    _, served = await limited(requests_per_minute=1)
    for _ in range(3):
        assert (await served.ask(b"GET /v1/models HTTP/1.1\r\nhost: g\r\n%b\r\n" % BEARER)).status == 200
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 200


async def test_the_tokens_of_an_answer_count(limited):
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43}}
    _, served = await limited(always(json_answer(OK | usage)), tokens_per_minute=60)
    await served.ask(post(prompt(), extra=BEARER))
    assert use_of(served).tokens.level == pytest.approx(17, abs=1)


async def test_a_stream_without_usage_counts_its_events(limited):
    answer = SSE_HEAD + b"".join(event("x") for _ in range(20)) + SSE_END
    _, served = await limited(always(answer), tokens_per_minute=600)
    await served.ask(post(prompt(stream=True), extra=BEARER))
    prompt_tokens = served.gateway.dispatcher.count_tokens.__self__._jobs._ratio("tiny").tokens(5)
    assert use_of(served).tokens.level == pytest.approx(600 - 21 - prompt_tokens, abs=1)


async def test_a_stream_with_usage_counts_what_it_says(limited):
    last = chunk(b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":100,"completion_tokens":93}}\n\n')
    _, served = await limited(always(SSE_HEAD + event("x") * 3 + last + SSE_END), tokens_per_minute=600)
    await served.ask(post(prompt(stream=True), extra=BEARER))
    assert use_of(served).tokens.level == pytest.approx(500, abs=1)


@pytest.mark.parametrize("pad", ["", "x" * 2_000_000], ids=["small", "large"])
async def test_what_answers_may_have_is_reserved_until_they_end(limited, pad):
    """So several long answers at a time pass no quota together."""
    engine, served = await limited(never, tokens_per_minute=600)
    limited_prompt = {"model": "tiny", "prompt": "x", "pad": pad, "max_tokens": 500}
    client = await served.connect()
    client.send(post(limited_prompt, extra=BEARER))
    await until(lambda: len(engine.requests) == 1, "the first request")
    refused = await served.ask(post(limited_prompt, extra=BEARER))
    assert refused.status == 429
    assert refused.json["error"]["message"].startswith("the limit of 600 tokens a minute is reached")
    client.reset()
    await until(lambda: use_of(served).in_flight == 0, "the end of the first one")
    engine.script = answer_ok
    assert (await served.ask(post(limited_prompt, extra=BEARER))).status == 200
    assert len(engine.requests) == 2


async def test_an_answer_that_is_an_error_costs_no_tokens(limited):
    _, served = await limited(always(json_answer({"error": {}}, status="400 Bad Request")), tokens_per_minute=600)
    assert (await served.ask(post(prompt("x" * 400), extra=BEARER))).status == 400
    assert use_of(served).tokens.level == 600


async def test_too_many_at_a_time_are_refused_and_one_that_ends_makes_room(limited):
    engine, served = await limited(never, concurrency=1)
    client = await served.connect()
    client.send(post(prompt(), extra=BEARER))
    await until(lambda: engine.requests)
    answer = await served.ask(post(prompt(), extra=BEARER))
    assert (answer.status, answer.headers[b"retry-after"]) == (429, b"1")
    assert answer.json["error"]["message"] == "the limit of 1 requests at a time is reached"
    client.reset()
    await until(lambda: use_of(served).in_flight == 0, "the end of the request")
    engine.script = answer_ok
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 200


async def test_every_end_of_a_request_gives_its_place_back(limited):
    async def fail(_request, writer):
        writer.close()

    engine, served = await limited(fail, concurrency=3, tokens_per_minute=1000)
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 502
    engine.script = always(SSE_HEAD + event("x"), close=True)
    client = await served.connect()
    client.send(post(prompt(stream=True), extra=BEARER))
    await client.rest()
    assert (await served.ask(post({"model": "none"}, extra=BEARER))).status == 404
    assert (await served.ask(post(b"{", extra=BEARER))).status == 400
    assert use_of(served).in_flight == 0


@pytest.mark.parametrize(
    ("asked", "sent"), [({}, 10), ({"priority": 0}, 10), ({"priority": -100}, 10), ({"priority": 5}, 15)]
)
async def test_a_client_cannot_raise_itself_above_its_class(limited, asked, sent):
    engine, served = await limited(priority=10)
    await served.ask(post(prompt(**asked), extra=BEARER))
    body = json.loads(engine.requests[0].body)
    assert body == prompt(priority=sent)


async def test_without_a_class_the_body_passes_byte_for_byte(limited):
    engine, served = await limited()
    request = prompt(priority=-3)
    await served.ask(post(request, extra=BEARER))
    assert engine.requests[0].body == json.dumps(request).encode()


async def test_held_requests_of_an_urgent_class_go_first(make_engine, serve, tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()
    for name, priority in (("urgent", -10), ("batch", 10)):
        (folder / name).write_text(json.dumps({"keys": [f"sk-{name}-0123456789"], "priority": priority}))
    engine = await make_engine()
    served = await serve(engine, auth={"key_dirs": [str(folder)]}, request={"policy": "priority"})
    engine.agent.say(accepting=False)
    await served.takes()
    for count, name in enumerate((b"batch", b"batch", b"urgent"), start=1):
        client = await served.connect()
        client.send(post(prompt(name.decode()), extra=b"x-api-key: sk-%b-0123456789\r\n" % name))
        await served.held(count)
    engine.agent.say(accepting=True)
    await until(lambda: len(engine.requests) == 3, "all requests")
    assert [json.loads(row.body)["prompt"] for row in engine.requests] == ["urgent", "batch", "batch"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (b'{"usage": {"prompt_tokens": 3, "total_tokens": 10, "completion_tokens": 7}}', 10),
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":7}}', 10),
        (b'{"usage":{"input_tokens":3,"output_tokens":7}}', 10),
        (b'{"usage":{"input_tokens":3}}', 3),
        (b'data: {"usage":{"total_tokens":5}}\n\ndata: {"usage":{"total_tokens":6}}\n\n', 6),
        (b'{"text": "\\"total_tokens\\": 999"}', None),
        (b'{"total_tokens": null}', None),
        (b"", None),
    ],
)
def test_usage_is_read_where_an_answer_has_it(text, tokens):
    assert read_usage(text) == tokens


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
space = st.text("\t\n\r ", max_size=3)


@given(
    st.dictionaries(st.text(max_size=8) | st.just("priority"), values, max_size=4),
    st.integers(-(2**31), 2**31),
    space,
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
)
def test_a_body_with_another_priority_is_the_same_but_for_it(document, priority, around, encoding):
    body = (around + json.dumps(document, ensure_ascii=False) + around).encode(encoding, "surrogatepass")
    assert json.loads(write_priority(body, priority)) == document | {"priority": priority}


@given(st.integers(), st.integers(-1000, 1000))
def test_no_request_is_more_urgent_than_its_class(asked, level):
    assert class_priority(asked, level) >= level
    assert class_priority(asked, level) == level + min(asked, LARGEST_EXACT) or asked < 0


@interpreted
async def test_the_class_orders_a_form_in_the_gateway_and_leaves_it_as_it_is(limited):
    engine, served = await limited(priority=10)
    body = form(("model", b"tiny"), ("file", b"x" * 100))
    seen = []
    choose = served.gateway.dispatcher.choose
    served.gateway.dispatcher.choose = lambda job, *rest, **named: seen.append(job) or choose(job, *rest, **named)
    request = post(body, "/v1/audio/transcriptions", extra=BEARER)
    kind = b"content-type: multipart/form-data; boundary=b-1"
    assert (await served.ask(request.replace(b"content-type: application/json", kind))).status == 200
    assert [job.priority for job in seen] == [10]
    assert engine.requests[0].body == body


@interpreted
async def test_the_place_of_a_request_is_given_back_first_at_its_end(limited, monkeypatch, unreported):
    _, served = await limited(concurrency=1)

    def fail(*_arguments):
        raise RuntimeError("no list")

    monkeypatch.setattr(served.gateway.recent, "end", fail)
    client = await served.connect()
    client.send(post(prompt(), extra=BEARER))
    await until(lambda: unreported, "the failure")
    unreported.clear()
    assert use_of(served).in_flight == 0

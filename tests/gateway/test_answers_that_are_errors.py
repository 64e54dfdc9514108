"""An error is no answer: it counts against the engine that made it, another engine answers, and nothing learns from it.

The error of a client counts against nobody.
"""

import json

import pytest

from tests.gateway.clients import get
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, answer_ok, reset
from tests.gateway.waiting import until

TURNS = {"policy": "roundRobin"}
BROKEN = {"error": {"message": "CUDA error", "type": "InternalServerError", "code": 500}}
REFUSED = {"error": {"message": "bad schema", "type": "BadRequestError", "code": 400}}


def data(document):
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def stream(*events):
    return always(SSE_HEAD + b"".join(chunk(row) for row in events) + SSE_END)


ROLE = data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
TOKEN = data({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})
ENGINE_ERRORS = {
    "500": always(json_answer(BROKEN, status="500 Internal Server Error")),
    "502": always(json_answer({}, status="502 Bad Gateway")),
    "504": always(json_answer({}, status="504 Gateway Timeout")),
    "an error as the first event": stream(data(BROKEN)),
    "an error after the role": stream(ROLE, data(BROKEN)),
    "an error after comments": stream(b": ping\n\n", data(BROKEN)),
    "an error in the form of responses": stream(b"event: response.failed\n" + data({"type": "response.failed"})),
    "nothing": always(SSE_HEAD + b"0\r\n\r\n"),
}
CLIENT_ERRORS = {
    "400": always(json_answer(REFUSED, status="400 Bad Request")),
    "404": always(json_answer(REFUSED, status="404 Not Found")),
    "501": always(json_answer(REFUSED, status="501 Not Implemented")),
    "a refusal as the first event": stream(data(REFUSED)),
    "a refusal after the role": stream(ROLE, data(REFUSED)),
}


@pytest.mark.parametrize("policy", ["roundRobin", "predicted", "leastRequests"])
@pytest.mark.parametrize("error", ENGINE_ERRORS.values(), ids=ENGINE_ERRORS)
async def test_an_engine_that_fails_fast_is_no_black_hole(make_engine, serve, error, policy):
    bad, good = await make_engine(error, name="bad"), await make_engine()
    served = await serve(bad, good, dispatch={"policy": policy})
    for number in range(30):
        assert (await served.ask(post(prompt(f"{number}", stream=True)))).json == OK
    assert len(good.requests) == 30
    # Three until it is ejected, then one for each trial within the second that this takes at most.
    assert len(bad.requests) <= 6
    if policy == "roundRobin":
        assert served.gateway.dispatcher.engines["bad"].errors >= 3
        assert served.gateway.dispatcher.ejections["bad"] >= 1
    assert (served.gateway.stats.failed, served.in_flight) == (0, 0)
    assert served.target_state("bad").ttft_factor == 1.0
    assert not [target for target in served.gateway.dispatcher.targets.predictions.ratios if target.server == "bad"]


async def test_an_engine_that_answers_again_is_used_again(make_engine, serve):
    bad, good = await make_engine(ENGINE_ERRORS["500"], name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(8):
        await served.ask(post(prompt()))
    bad.script = answer_ok
    await until(lambda: served.target_state("bad").accepting)
    before = len(bad.requests)
    for _ in range(8):
        assert (await served.ask(post(prompt()))).json == OK
    assert len(bad.requests) >= before + 3
    assert served.gateway.dispatcher.engines["bad"].errors < 3


@pytest.mark.parametrize("error", ENGINE_ERRORS.values(), ids=ENGINE_ERRORS)
async def test_the_last_engine_is_never_ejected_for_its_errors(make_engine, serve, error):
    engine, gone = await make_engine(error), await make_engine()
    served = await serve(engine, gone)
    gone.agent.say(accepting=False, phase="draining")
    await served.takes(engine)
    for _ in range(8):
        await served.ask(post(prompt(stream=True)))
        assert served.gateway.dispatcher.accepting
    stats = served.gateway.stats
    assert (len(engine.requests), stats.failed, stats.retried) == (8, 8, 0)
    gone.agent.say(accepting=True, phase="ready")
    await served.takes(gone)


@pytest.mark.parametrize("refusal", CLIENT_ERRORS.values(), ids=CLIENT_ERRORS)
async def test_the_error_of_a_client_counts_against_no_engine_and_teaches_nothing(make_engine, serve, refusal):
    engine, other = await make_engine(refusal), await make_engine(refusal)
    served = await serve(engine, other, dispatch=TURNS)
    for _ in range(8):
        answer = await served.ask(post(prompt(stream=True)))
        assert b"bad schema" in answer.body
    dispatcher, stats = served.gateway.dispatcher, served.gateway.stats
    assert (len(engine.requests), len(other.requests)) == (4, 4)
    assert (dict(dispatcher.ejections), stats.retried) == ({}, 0)
    assert dispatcher.targets.predictions.ratios == {}
    assert (await get(served, "/v1/state"))[1]["ttft_s"] is None


async def test_an_error_within_a_stream_counts_as_a_failure_of_the_engine(make_engine, serve):
    bad, good = await make_engine(stream(ROLE, TOKEN, data(BROKEN)), name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    answers = [await served.ask(post(prompt(stream=True))) for _ in range(8)]
    assert sum(b"CUDA" in answer.body for answer in answers) == 3
    assert served.gateway.stats.failed == 3
    assert served.gateway.stats.requests == {("completions", 200): 5, ("completions", 500): 3}
    assert served.gateway.dispatcher.ejections["bad"] == 1
    assert all(answer.body.endswith(b"data: [DONE]\n\n") for answer in answers if b"CUDA" in answer.body)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (REFUSED, 400),
        ({"error": {"message": "x", "code": "429"}}, 429),
        ({"error": {"message": "x", "type": "invalid_request_error"}}, 400),
        ({"object": "error", "message": "x", "code": 503}, 503),
        ({"error": {"message": "x", "code": 7}}, 500),
        ({"error": "x"}, 500),
    ],
)
@pytest.mark.parametrize("before", [[], [ROLE], [ROLE, TOKEN]], ids=["first", "after the role", "after a token"])
async def test_a_stream_that_ends_with_an_error_counts_as_that_error(make_engine, serve, before, error, code):
    served = await serve(await make_engine(stream(*before, data(error))))
    assert (await served.ask(post(prompt(stream=True)))).status == 200
    stats = served.gateway.stats
    assert stats.requests == {("completions", code): 1}
    assert stats.failed == (code >= 500)


async def test_a_stream_that_breaks_off_counts_as_a_failure_of_the_gateway(make_engine, serve):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + chunk(TOKEN))
        await writer.drain()
        reset(writer)

    served = await serve(await make_engine(breaks))
    await served.ask(post(prompt(stream=True)))
    stats = served.gateway.stats
    assert stats.requests == {("completions", 502): 1}
    assert (stats.refusals, stats.failed) == ({"engine_failed": 1}, 1)


async def test_models_that_are_listed_forgive_no_errors(make_engine, serve):
    bad, good = await make_engine(ENGINE_ERRORS["500"], name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(8):
        for _ in range(2):
            assert (await served.ask(post(prompt()))).json == OK
        await served.ask(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
    assert served.gateway.dispatcher.ejections["bad"] >= 1


# Comments, which keep a connection alive, come before the first token.


async def begins(served, *, path="/v1/chat/completions"):
    client = await served.connect()
    client.send(post({"model": "tiny", "messages": [{"role": "user", "content": "word " * 50}], "stream": True}, path))
    return client


async def test_a_comment_passes_at_once_and_is_no_first_token(make_engine, serve):
    writers = []

    async def comments(_request, writer):
        writer.write(SSE_HEAD + chunk(b": ping\n\n"))
        writers.append(writer)

    engine = await make_engine(comments)
    served = await serve(engine)
    client = await begins(served)
    assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await client.reader.readuntil(b": ping\n\n\r\n") == chunk(b": ping\n\n")
    assert served.target_state(engine.name).unanswered_prefill_tokens > 50
    assert (await get(served, "/v1/state"))[1]["ttft_s"] is None
    writers[0].write(chunk(ROLE) + chunk(b": ping\n\n") + chunk(TOKEN)[:-5])
    writers[0].write(chunk(TOKEN)[-5:] + SSE_END)
    rest = await client.reader.readuntil(b"0\r\n\r\n")
    assert b": ping" in rest
    assert rest.index(ROLE) < rest.index(TOKEN) < rest.index(b"[DONE]")
    assert (served.gateway.stats.ttft.total > 0.0, served.in_flight) == (True, 0)
    # The connection serves the next request.
    client.send(post(prompt()))
    await until(lambda: len(engine.requests) == 2)


COMES_BEFORE = {
    "a comment": b": ping\n\n",
    "the role": ROLE,
    "response.created": b"event: response.created\n" + data({"type": "response.created", "response": {"id": "1"}}),
}


@pytest.mark.parametrize("before", COMES_BEFORE.values(), ids=COMES_BEFORE)
async def test_an_engine_that_breaks_before_the_first_token_is_replaced(make_engine, serve, before):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + chunk(before))
        await writer.drain()
        await until(lambda: served.in_flight == 1)
        reset(writer)

    bad, good = await make_engine(breaks), await make_engine(stream(ROLE, TOKEN))
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(2):
        answer = await (await begins(served)).answer()
        own = answer.body.replace(before, b"", 1) if before.startswith(b":") else answer.body
        assert own == ROLE + TOKEN + b"data: [DONE]\n\n"
    assert len(bad.requests) == 1
    assert (served.gateway.stats.failed, served.in_flight) == (0, 0)


@pytest.mark.parametrize(
    "then",
    [CLIENT_ERRORS["400"], ENGINE_ERRORS["500"], always(json_answer({"message": "bad schema"}))],
    ids=["400", "500", "in one piece"],
)
async def test_an_open_stream_ends_with_the_error_that_another_engine_answers(make_engine, serve, then):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + chunk(b": ping\n\n"))
        await writer.drain()
        await until(lambda: served.in_flight == 1)
        reset(writer)

    served = await serve(await make_engine(breaks), await make_engine(then), dispatch=TURNS)
    answers = [await (await begins(served)).answer() for _ in range(2)]
    bodies = [answer.body for answer in answers if answer.body.startswith(b": ping")]
    assert len(bodies) == 1
    assert bodies[0].count(b"data: {") == 1
    # Where the engine with the error was first, no attempt is left for another one.
    assert b"bad schema" in bodies[0] or b"CUDA" in bodies[0] or b"engine_failed" in bodies[0]


async def test_an_open_stream_that_no_engine_takes_ends_with_an_error_event(make_engine, serve):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + chunk(b": ping\n\n"))
        await writer.drain()
        await until(lambda: served.in_flight == 1)
        reset(writer)

    served = await serve(await make_engine(breaks), await make_engine(breaks))
    answer = await (await begins(served)).answer()
    assert answer.status == 200
    assert json.loads(answer.body.split(b"data: ")[1])["error"]["code"] == "engine_failed"
    assert served.gateway.stats.failed == 1


async def test_streams_alone_have_a_first_token_whichever_route(make_engine, serve):
    created = COMES_BEFORE["response.created"]
    text = b"event: response.output_text.delta\n" + data({"type": "response.output_text.delta", "delta": "x"})
    engine = await make_engine(stream(created, text))
    served = await serve(engine)
    stats = served.gateway.stats

    async def firsts(path, body):
        before = sum(stats.ttft.counts)
        await served.ask(post(body, path))
        return sum(stats.ttft.counts) - before

    assert await firsts("/v1/responses", {"model": "tiny", "input": "x", "stream": True}) == 1
    engine.script = stream(ROLE, TOKEN)
    assert await firsts("/v1/chat/completions", {"model": "tiny", "messages": [], "stream": True}) == 1
    engine.script = stream(event("a"))
    assert await firsts("/v1/completions", prompt(stream=True)) == 1
    engine.script = answer_ok
    assert await firsts("/v1/completions", prompt()) == 0
    assert await firsts("/v1/embeddings", {"model": "tiny", "input": "x"}) == 0
    assert await firsts("/v1/responses", {"model": "tiny", "input": "x"}) == 0
    engine.script = CLIENT_ERRORS["400"]
    assert await firsts("/v1/chat/completions", {"model": "tiny", "messages": [], "stream": True}) == 0

"""An engine may fail: before its first byte another one answers, once; after it the stream ends with an error."""

import asyncio
import json

import pytest
from moe_gateway.engines import fleet

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, chunk, event, json_answer, post, prompt
from tests.gateway.peers import always, answer_ok, never, reset
from tests.gateway.waiting import until


async def reset_at_once(_request, writer):
    reset(writer)


async def reset_after_head(_request, writer):
    writer.write(SSE_HEAD)
    await asyncio.sleep(0.02)
    reset(writer)


async def reset_in_head(_request, writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-")
    await asyncio.sleep(0.02)
    reset(writer)


async def close_at_once(_request, writer):
    writer.close()


FAILURES = {
    "reset": reset_at_once,
    "closed": close_at_once,
    "reset in the head": reset_in_head,
    "reset after the head": reset_after_head,
    "503": always(json_answer({}, status="503 Service Unavailable")),
    "not HTTP": always(b"SSH-2.0-OpenSSH\r\n"),
    "line feeds alone": always(b"HTTP/1.1 200 OK\ncontent-length: 0\n\n"),
    "101": always(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"),
    "two lengths": always(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab"),
    "endless head": always(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 400_000),
}
TURNS = {"policy": "roundRobin"}


def log_of(*engines):
    return [len(engine.requests) for engine in engines]


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_before_the_first_byte_another_engine_answers(make_engine, serve, failure):
    bad, good = await make_engine(failure), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    body = json.dumps(prompt("the same bytes")).encode()
    answers = [await served.ask(post(body)) for _ in range(2)]
    assert [answer.json for answer in answers] == [OK, OK]
    assert log_of(bad, good) == [1, 2]
    assert {request.body for request in good.requests + bad.requests} == {body}
    assert bad.requests[0].headers[b"x-request-id"] in [row.headers[b"x-request-id"] for row in good.requests]
    assert served.gateway.stats.retried == 1
    assert served.in_flight == 0


async def test_a_refused_connection_is_tried_elsewhere(make_engine, serve):
    bad, good = await make_engine(), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    agent, bad.agent = bad.agent, None
    await bad.stop()
    assert [(await served.ask(post(prompt()))).status for _ in range(4)] == [200] * 4
    assert len(good.requests) == 4
    await agent.stop()


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_when_the_second_engine_fails_too_the_client_gets_an_error(make_engine, serve, failure):
    engines = [await make_engine(failure), await make_engine(failure)]
    served = await serve(*engines)
    client = await served.connect()
    client.send(post(prompt()))
    answer = await client.answer()
    if failure is FAILURES["503"]:
        assert answer.status == 503
    else:
        assert (answer.status, answer.json["error"]["code"]) == (502, "engine_failed")
        assert answer.json["error"]["type"] == "server_error"
    assert log_of(*engines) == [1, 1]
    assert served.in_flight == 0
    stats = served.gateway.stats
    assert (stats.finished, stats.failed, stats.retried) == (1, 1, 1)


async def test_a_single_engine_gets_its_second_chance_after_a_pause(make_engine, serve):
    engine = await make_engine(reset_at_once)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    engine.script = answer_ok
    assert (await client.answer()).json == OK
    assert len(engine.requests) == 2
    assert engine.requests[1].at_s - engine.requests[0].at_s > 0.2


async def test_an_error_500_of_an_engine_that_drains_is_no_answer(make_engine, serve):
    asked = asyncio.Event()

    async def fails_when_draining(_request, writer):
        asked.set()
        await asyncio.sleep(0.1)
        writer.write(json_answer({}, status="500 Internal Server Error"))

    bad, good = await make_engine(fails_when_draining), await make_engine(fails_when_draining)
    served = await serve(bad, good, dispatch=TURNS)
    client = await served.connect()
    client.send(post(prompt()))
    await asked.wait()
    first, second = (bad, good) if bad.requests else (good, bad)
    second.script = answer_ok
    first.agent.say(accepting=False, phase="draining")
    assert (await client.answer()).json == OK


async def test_an_engine_that_is_full_keeps_its_good_name_and_gets_new_work_a_moment_later(make_engine, serve):
    full, other = await make_engine(FAILURES["503"], name="full"), await make_engine()
    served = await serve(full, other, dispatch=TURNS)
    for _ in range(6):
        assert (await served.ask(post(prompt()))).json == OK
    stats, engine = served.gateway.stats, served.gateway.dispatcher.engines["full"]
    assert (engine.failures, dict(served.gateway.dispatcher.ejections), stats.failed) == (0, {}, 0)
    assert stats.retried == len(full.requests)
    full.script = answer_ok
    await until(lambda: served.target_state("full").accepting)
    before = len(full.requests)
    for _ in range(4):
        assert (await served.ask(post(prompt()))).json == OK
    assert len(full.requests) == before + 2


async def test_what_the_only_engine_turned_away_waits_until_it_has_room(make_engine, serve):
    engine = await make_engine(FAILURES["503"])
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    engine.script = answer_ok
    assert (await client.answer()).json == OK
    assert len(engine.requests) == 2
    assert served.gateway.dispatcher.ejections == {}


async def test_a_connection_that_the_engine_closed_as_idle_is_no_failure(make_engine, serve):
    async def answer_then_close(request, writer):
        await answer_ok(request, writer)
        await writer.drain()
        # The answer allowed another request, which then meets the end of the connection.
        writer.transport.pause_reading()
        asyncio.get_running_loop().call_later(0.05, writer.transport.abort)

    engine = await make_engine(answer_then_close)
    served = await serve(engine)
    client = await served.connect()
    for _ in range(3):
        client.send(post(prompt()))
        assert (await client.answer()).json == OK
        await asyncio.sleep(0.045)
    stats = served.gateway.stats
    assert (stats.retried, dict(served.gateway.dispatcher.ejections)) == (0, {})


# An engine whose processes have died, while its server goes on for some seconds.


def dead(message):
    return {"error": {"message": message, "type": "InternalServerError", "code": 500}}


DEAD_032 = dead("EngineCore encountered an issue. See stack trace")
DEAD_033 = dead("The server had an error while processing your request.")
# Whatever another version may say.
DEAD_LATER = dead("Something else.")
HEADER = b"moeserving-engine: dead\r\n"
MARK = b": moeserving-engine: dead\n"


def dead_500(error, extra=b""):
    answer = json_answer(error, status="500 Internal Server Error")
    return always(answer.replace(b"\r\n", b"\r\n" + extra, 1))


def dead_event(error, comment=b""):
    return always(SSE_HEAD + chunk(comment + b"data: " + json.dumps(error).encode() + b"\n\n") + SSE_END)


async def mark_before_its_event(_request, writer):
    """As a proxy may cut what the engine sent in one piece."""
    writer.write(SSE_HEAD + chunk(MARK + b"\n"))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.write(chunk(b"data: " + json.dumps(DEAD_LATER).encode() + b"\n\n") + SSE_END)


LAST_WORDS = {
    "500": dead_500(DEAD_032),
    "500 of vLLM 0.33": dead_500(DEAD_033),
    "500 that is marked": dead_500(DEAD_LATER, HEADER),
    "a stream's first event": dead_event(DEAD_032),
    "a first event of vLLM 0.33": dead_event(DEAD_033),
    "a first event that is marked": dead_event(DEAD_LATER, MARK + b"\n"),
    "a first event with its mark": dead_event(DEAD_LATER, MARK),
    "a mark that comes before its event": mark_before_its_event,
}


@pytest.mark.parametrize("last_words", LAST_WORDS.values(), ids=LAST_WORDS)
async def test_what_a_dead_engine_says_is_no_answer_and_another_one_takes_over(make_engine, serve, last_words):
    dead, good = await make_engine(last_words), await make_engine()
    served = await serve(dead, good, dispatch=TURNS)
    assert [(await served.ask(post(prompt()))).json for _ in range(4)] == [OK] * 4
    assert log_of(dead, good) == [1, 4]


@pytest.mark.parametrize("last_words", LAST_WORDS.values(), ids=LAST_WORDS)
async def test_the_only_engine_gets_nothing_until_it_has_started_anew(make_engine, serve, last_words):
    engine = await make_engine(last_words)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    # Longer than what follows a failure of any other kind.
    await asyncio.sleep(0.6)
    assert log_of(engine) == [1]
    engine.script = answer_ok
    engine.agent.say(accepting=False, phase="backoff")
    await until(lambda: not served.gateway.dispatcher.engines[engine.name].is_ready)
    engine.agent.say(accepting=True, phase="ready")
    assert (await client.answer()).json == OK


async def test_an_error_of_another_kind_passes_as_it_is(make_engine, serve):
    engine = await make_engine(always(json_answer({"error": {"message": "no"}}, status="500 Internal Server Error")))
    served = await serve(engine)
    assert (await served.ask(post(prompt()))).status == 500
    engine.script = always(SSE_HEAD + event('{"error": 1}') + SSE_END)
    assert b"error" in (await served.ask(post(prompt(stream=True)))).body
    assert served.gateway.stats.retried == 0


@pytest.mark.parametrize(
    "text",
    [
        "'EngineCore encountered an issue'",
        '{"message": "EngineCore encountered an issue"}',
        '{"message":"EngineCore encountered an issue"}',
        "'The server had an error while processing your request.'",
        "The server had an error while processing your request. Sorry about that!",
        "\n: moeserving-engine: dead\n",
        "\r\nmoeserving-engine: dead\r\n",
    ],
)
async def test_a_clients_text_within_an_error_is_no_engines_death(make_engine, serve, text):
    answer = {"error": {"message": text, "type": "InternalServerError"}}
    engine = await make_engine(always(json_answer(answer, status="500 Internal Server Error")))
    served = await serve(engine)
    assert (await served.ask(post(prompt()))).json == answer
    assert served.gateway.stats.retried == 0


async def test_an_engine_that_cannot_be_reached_is_tried_until_it_can(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    agent, engine.agent = engine.agent, None
    await engine.stop()
    client = await served.connect()
    client.send(post(prompt()))
    await until(lambda: served.gateway.stats.retried > 2)
    await engine.start()
    assert (await client.answer()).json == OK
    await agent.stop()


async def test_what_cannot_be_reached_is_not_tried_for_longer_than_requests_are_held(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, limits={"hold_timeout_s": 1.0})
    agent, engine.agent = engine.agent, None
    await engine.stop()
    began_s = asyncio.get_running_loop().time()
    assert (await served.ask(post(prompt()))).status == 503
    # Tries at 0, 0.25 and 0.75 s; the next would be at 1.75 s.
    assert 0.9 < asyncio.get_running_loop().time() - began_s < 1.6
    await agent.stop()


async def test_what_was_computed_for_longer_than_that_may_wait_for_the_engines_next_start_too(make_engine, serve):
    async def dies_late(_request, writer):
        await asyncio.sleep(1.3)
        reset(writer)

    engine = await make_engine(dies_late)
    served = await serve(engine, limits={"hold_timeout_s": 1.0})
    client = await served.connect()
    client.send(post(prompt()))
    await until(lambda: log_of(engine) == [1])
    await asyncio.sleep(1.1)
    agent, engine.agent = engine.agent, None
    await engine.stop()
    # It has begun to find the engine unreachable.
    await until(lambda: served.gateway.stats.retried > 1)
    engine.script = answer_ok
    await engine.start()
    assert (await client.answer()).json == OK
    await agent.stop()


# After the first byte.


async def test_a_stream_that_breaks_ends_with_an_error_event_and_the_connection(make_engine, serve):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await asyncio.sleep(0.02)
        writer.write(event("b"))
        await asyncio.sleep(0.02)
        reset(writer)

    engine, other = await make_engine(breaks), await make_engine(breaks)
    served = await serve(engine, other)
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    answer = await client.answer()
    events = [line for line in answer.body.split(b"\n") if line]
    assert events[:2] == [b'data: {"text": "a"}', b'data: {"text": "b"}']
    error = json.loads(events[2].removeprefix(b"data: "))["error"]
    assert (len(events), error["code"], error["type"]) == (3, "engine_failed", "server_error")
    assert await client.ended()
    assert sum(log_of(engine, other)) == 1
    stats = served.gateway.stats
    assert (stats.requests["completions", 502], stats.failed, stats.retried) == (1, 1, 0)


@pytest.mark.parametrize(
    "torn",
    [
        b"1e\r\ndata: half of an ev",
        b"1e\r\n",
        b"1e",
        chunk(b"data: a\r\n\r\n")[:-2],
        b"20\r\ndata: looks like an end\r\n",
    ],
)
async def test_a_stream_torn_inside_a_chunk_just_ends(make_engine, serve, torn):
    async def breaks(_request, writer):
        writer.write(SSE_HEAD + event("a") + torn)
        await writer.drain()
        await asyncio.sleep(0.02)
        reset(writer)

    served = await serve(await make_engine(breaks))
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    assert (await client.rest()).endswith(event("a") + torn)


async def test_an_answer_that_breaks_is_cut_short_and_never_looks_whole(make_engine, serve):
    async def breaks(_request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.02)
        reset(writer)

    served = await serve(await make_engine(breaks))
    client = await served.connect()
    client.send(post(prompt()))
    assert (await client.rest()).endswith(b"\r\n\r\nhalf")
    assert served.gateway.stats.failed == 1


FORGED = b"HTTP/1.1 500 Oops\r\ncontent-length: 6\r\n\r\nforged"


@pytest.mark.parametrize("junk", [b"junk", FORGED, FORGED[:-3], FORGED[:20]])
async def test_what_follows_an_answer_is_no_answer_to_the_next_request(make_engine, serve, junk):
    engine = await make_engine(always(json_answer(OK) + junk))
    served = await serve(engine)
    before, client = engine.connections, await served.connect()
    client.send(post(prompt()) + post(prompt()))
    assert (await client.answer()).json == OK
    # Bytes behind the answer cannot be distinguished from it, but the connection ends there.
    assert await client.rest() in (b"", junk)
    assert (await served.ask(post(prompt()))).json == OK
    assert served.gateway.stats.failed == 0
    # A request each; the models are asked for on a connection from before.
    assert engine.connections - before == 2


async def test_what_an_engine_says_unasked_ends_its_connection(make_engine, serve):
    async def talkative(_request, writer):
        await answer_ok(_request, writer)
        await asyncio.sleep(0.02)
        writer.write(json_answer({"forged": True}))

    engine = await make_engine(talkative)
    served = await serve(engine)
    client = await served.connect()
    for _ in range(2):
        client.send(post(prompt()))
        assert (await client.answer()).json == OK
        await asyncio.sleep(0.05)
    # A request each, and at times one more that asks for the models.
    assert engine.connections >= 2


# Silence.


async def test_an_engine_that_never_answers_is_given_up(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine, limits={"idle_timeout_s": 0.3})
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.json["error"]["code"]) == (504, "engine_silent")
    await asyncio.wait_for(engine.requests[0].gone.wait(), 1.0)
    assert served.in_flight == 0


async def test_a_stream_that_falls_silent_ends_with_an_error_event(make_engine, serve):
    async def stalls(request, writer):
        writer.write(SSE_HEAD + event("a"))
        await never(request, writer)

    served = await serve(await make_engine(stalls), limits={"idle_timeout_s": 0.3})
    answer = await served.ask(post(prompt(stream=True)))
    assert b'"engine_failed"' in answer.body


async def test_a_stream_may_be_longer_than_every_time_limit(make_engine, serve):
    async def slow(_request, writer):
        writer.write(SSE_HEAD)
        for _ in range(16):
            writer.write(event("x"))
            await asyncio.sleep(0.05)
        writer.write(SSE_END)

    limits = {"idle_timeout_s": 0.4, "header_timeout_s": 0.3, "body_timeout_s": 0.3, "hold_timeout_s": 0.3}
    served = await serve(await make_engine(slow), limits=limits)
    answer = await served.ask(post(prompt(stream=True)))
    assert answer.framed_body.endswith(SSE_END)
    assert b"error" not in answer.body


# The breaker.


async def test_an_engine_that_fails_gets_no_new_work_for_a_while_and_comes_back(make_engine, serve, monkeypatch):
    # Longer than the six requests take on any machine; it is ended below.
    monkeypatch.setattr(fleet, "FIRST_EJECTION_S", 600.0)
    bad, good = await make_engine(reset_at_once, name="bad"), await make_engine()
    served = await serve(bad, good, dispatch=TURNS)
    for _ in range(6):
        assert (await served.ask(post(prompt()))).status == 200
    assert len(bad.requests) == 1
    assert not served.target_state("bad").accepting
    bad.script = answer_ok
    served.gateway.dispatcher.engines["bad"].ejected_until_s = 0.0
    await until(lambda: served.target_state("bad").accepting)
    for _ in range(2):
        await served.ask(post(prompt()))
    assert len(bad.requests) == 2
    assert served.gateway.dispatcher.engines["bad"].failures == 0


async def test_each_failure_in_a_row_keeps_an_engine_out_for_longer(make_engine, serve):
    engine = await make_engine(reset_at_once, name="bad")
    served = await serve(engine)
    assert (await served.ask(post(prompt()))).status == 502
    assert served.gateway.dispatcher.engines["bad"].failures == 2
    now_s = served.gateway.clock()
    assert served.gateway.dispatcher.engines["bad"].ejected_until_s - now_s > 0.3

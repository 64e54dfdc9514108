"""A response is continued at the engine that keeps it, or refused in plain words."""

import itertools
import json

import pytest
from moe_gateway.engines.response_homes import REMEMBERED_RESPONSES, ResponseHomes

from tests.gateway.messages import SSE_HEAD, chunk, json_answer, post
from tests.gateway.waiting import until

TURNS = {"policy": "roundRobin"}
IDS = itertools.count()


async def keeps(request, writer):
    """As vLLM with its response store: an unknown response is 404."""
    known = KEPT.setdefault(writer.get_extra_info("sockname"), set())
    path = request.line.split()[1].decode().partition("?")[0].split("/")
    if len(path) > 3:
        found = path[3] in known
        answer = {"id": path[3], "status": "cancelled" if path[-1] == "cancel" else "completed"} if found else {}
        writer.write(json_answer(answer, status="200 OK" if found else "404 Not Found"))
        return
    body = json.loads(request.body)
    if (previous := body.get("previous_response_id")) and previous not in known:
        writer.write(json_answer({"error": {"message": "not found", "code": 404}}, status="404 Not Found"))
        return
    known.add(name := f"resp_{next(IDS)}")
    if body.get("stream"):
        created = {"response": {"id": name, "object": "response"}, "type": "response.created"}
        delta = {"type": "response.output_text.delta", "delta": "x"}
        writer.write(SSE_HEAD + chunk(b"event: response.created\ndata: " + json.dumps(created).encode() + b"\n\n"))
        writer.write(chunk(b"data: " + json.dumps(delta).encode() + b"\n\n") + b"0\r\n\r\n")
    else:
        writer.write(json_answer({"id": name, "object": "response", "usage": {"input_tokens": 3}}))


KEPT: dict[object, set[str]] = {}


def turn(previous=None, **fields):
    return post({"model": "tiny", "input": "x", "previous_response_id": previous, **fields}, "/v1/responses")


@pytest.mark.parametrize("stream", [False, True], ids=["one piece", "stream"])
async def test_a_conversation_stays_where_its_responses_are(make_engine, serve, stream):
    engines = [await make_engine(keeps) for _ in range(3)]
    served = await serve(*engines, dispatch=TURNS)
    for _ in range(3):
        previous = None
        for _ in range(5):
            answer = await served.ask(turn(previous, stream=stream))
            assert answer.status == 200
            start = answer.body.index(b'"resp_') + 1
            previous = answer.body[start : answer.body.index(b'"', start)].decode()
    assert sum(len(engine.requests) for engine in engines) == 15
    assert sum(1 for engine in engines if engine.requests) >= 2


async def test_a_response_that_no_engine_is_known_to_have_is_refused(make_engine, serve):
    engines = [await make_engine(keeps) for _ in range(2)]
    served = await serve(*engines, dispatch=TURNS)
    first = (await served.ask(turn())).json["id"]
    home = next(engine for engine in engines if engine.requests)
    unknown = await served.ask(turn("resp_nobody"))
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "response_not_found")
    home.agent.say(accepting=False, phase="draining")
    await until(lambda: not served.target_state(home.name).accepting)
    away = await served.ask(turn(first))
    assert (away.status, away.json["error"]["code"]) == (503, "no_engine")
    # Another process has taken its place, which has none of its responses.
    KEPT.clear()
    home.agent.state["engine"]["pid"] = 2
    home.agent.say(accepting=True, phase="ready")
    await until(lambda: served.target_state(home.name).accepting)
    lost = await served.ask(turn(first))
    assert (lost.status, lost.json["error"]["code"]) == (404, "response_not_found")


async def test_a_single_engine_is_asked_for_whatever_response(make_engine, serve):
    engine = await make_engine(keeps)
    served = await serve(engine)
    assert (await served.ask(turn("resp_of_another_gateway"))).json["error"]["message"] == "not found"
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"conversation": "c"}, "conversation"), ({}, "previous_response_id")],
)
async def test_what_cannot_be_found_again_is_refused(make_engine, serve, fields, param):
    engine = await make_engine(keeps)
    served = await serve(engine)
    answer = await served.ask(turn(*([] if fields else [7]), **fields))
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert engine.requests == []
    assert (await served.ask(turn(background=False, conversation=None))).status == 200


def about(response, *, cancel=False, query=""):
    if cancel:
        return post({}, f"/v1/responses/{response}/cancel")
    return f"GET /v1/responses/{response}{query} HTTP/1.1\r\nhost: h\r\n\r\n".encode()


async def test_a_background_response_is_fetched_and_cancelled_where_it_is_computed(make_engine, serve):
    engines = [await make_engine(keeps) for _ in range(3)]
    served = await serve(*engines, dispatch=TURNS)
    names = [(await served.ask(turn(background=True))).json["id"] for _ in range(6)]
    for name in names:
        for query in ("", "?stream=true&starting_after=3"):
            assert (await served.ask(about(name, query=query))).json == {"id": name, "status": "completed"}
        assert (await served.ask(about(name, cancel=True))).json == {"id": name, "status": "cancelled"}
    stats = served.gateway.stats
    assert (stats.requests["response", 200], stats.requests["response_cancel", 200]) == (12, 6)
    assert (served.in_flight, stats.failed, stats.retried) == (0, 0, 0)


@pytest.mark.parametrize("cancel", [False, True], ids=["fetch", "cancel"])
async def test_a_response_that_is_gone_is_not_found(make_engine, serve, cancel):
    engines = [await make_engine(keeps) for _ in range(2)]
    served = await serve(*engines, dispatch=TURNS)
    name = (await served.ask(turn(background=True))).json["id"]
    home = next(engine for engine in engines if engine.requests)
    KEPT.clear()
    home.agent.state["engine"]["pid"] = 2
    home.agent.say(kv_usage=0.5)
    await until(lambda: served.gateway.dispatcher.is_lost(name))
    for gone in (name, "resp_nobody"):
        answer = await served.ask(about(gone, cancel=cancel))
        assert (answer.status, answer.json["error"]["code"]) == (404, "response_not_found")
        assert (answer.json["error"]["param"], answer.json["error"]["type"]) == ("response_id", "invalid_request_error")
    # Each was asked whether it has one of the two.
    assert sorted(len(engine.requests) for engine in engines) == [2, 3]


async def test_a_response_is_fetched_from_a_saturated_engine_too(make_engine, serve):
    engine = await make_engine(keeps)
    served = await serve(engine, dispatch={"saturation_s": 0.5})
    name = (await served.ask(turn(background=True))).json["id"]
    engine.agent.say_rank(waiting=50, waiting_prefill_tokens=10**6)
    await until(lambda: served.target_state(engine.name).signal.waiting_prefill_tokens == 10**6)
    assert (await served.ask(about(name, cancel=True))).json["status"] == "cancelled"


def test_the_oldest_responses_are_forgotten_first():
    homes = ResponseHomes()
    for number in range(REMEMBERED_RESPONSES + 1):
        homes.record(f"resp_{number}", "a" if number % 2 else "b")
    assert (homes.find("resp_0"), homes.find("resp_1"), homes.find("resp_2")) == (None, "a", "b")
    homes.forget("a")
    assert (homes.find("resp_1"), homes.find("resp_2")) == (None, "b")

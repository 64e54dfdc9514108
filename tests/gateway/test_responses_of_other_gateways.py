"""A response that another gateway passed on is found at its engine: gateways share engines and no list of responses."""

import asyncio
import itertools

import pytest
from moe_gateway.engines import response_search
from moe_gateway.http.routes import url_of_response

from tests.gateway.messages import json_answer
from tests.gateway.peers import always, never
from tests.gateway.test_kept_responses import TURNS, about, keeps, turn
from tests.gateway.test_large_bodies import TEXT
from tests.gateway.waiting import until


@pytest.fixture
def two_gateways(make_engine, serve):
    """Starts two gateways in front of the same engines."""

    async def start(script=keeps, engines=3, **sections):
        made = [await make_engine(script) for _ in range(engines)]
        return made, [await serve(*made, dispatch=TURNS, **sections) for _ in range(2)]

    return start


def asked(engines):
    """The methods and paths that each engine was asked for, in their order."""
    return [[tuple(row.line.split()[:2]) for row in engine.requests] for engine in engines]


@pytest.mark.parametrize("stream", [False, True], ids=["one piece", "stream"])
async def test_a_conversation_goes_on_through_another_gateway(two_gateways, stream):
    engines, gateways = await two_gateways()
    for served in gateways:
        await served.ask(turn())
    previous = (await gateways[0].ask(turn())).json["id"]
    for served in itertools.islice(itertools.cycle(reversed(gateways)), 6):
        answer = await served.ask(turn(previous, stream=stream))
        assert answer.status == 200
        start = answer.body.index(b'"resp_') + 1
        previous = answer.body[start : answer.body.index(b'"', start)].decode()
    made = [sum(method == b"POST" for method, _ in rows) for rows in asked(engines)]
    # The conversation of seven requests and the two before it, which went to other engines.
    assert max(made) >= 7
    assert all(served.in_flight == 0 for served in gateways)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
async def test_an_engine_is_asked_once_for_a_response_whose_home_is_known_then(two_gateways, large):
    engines, (first, second) = await two_gateways(engines=2)
    name = (await first.ask(turn())).json["id"]
    for _ in range(3):
        assert (await second.ask(turn(name, pad=TEXT if large else ""))).status == 200
    looked = [[row for row in rows if row[0] == b"GET"] for rows in asked(engines)]
    assert looked == [[(b"GET", b"/v1/responses/" + name.encode())]] * 2


async def test_a_background_response_is_fetched_and_cancelled_through_another_gateway(two_gateways):
    _, (first, second) = await two_gateways()
    for _ in range(4):
        names = [(await first.ask(turn(background=True))).json["id"] for _ in range(2)]
        assert (await second.ask(about(names[0]))).json == {"id": names[0], "status": "completed"}
        assert (await second.ask(about(names[1], cancel=True))).json == {"id": names[1], "status": "cancelled"}
    requests = second.gateway.stats.requests
    assert (requests["response", 200], requests["response_cancel", 200]) == (4, 4)


async def test_requests_behind_it_on_its_connection_keep_their_order(two_gateways):
    _, (first, second) = await two_gateways()
    name = (await first.ask(turn())).json["id"]
    client = await second.connect()
    client.send(about(name) + about(name, cancel=True) + about("resp_none"))
    assert [(await client.answer()).json.get("status") for _ in range(2)] == ["completed", "cancelled"]
    assert (await client.answer()).status == 404


async def test_what_no_engine_has_is_not_found_and_goes_nowhere_else(two_gateways):
    engines, (served, _) = await two_gateways()
    answer = await served.ask(turn("resp_none"))
    assert (answer.status, answer.json["error"]["code"]) == (404, "response_not_found")
    assert asked(engines) == [[(b"GET", b"/v1/responses/resp_none")]] * 3
    assert served.gateway.stats.requests["responses", 404] == 1


@pytest.mark.parametrize("name", ["a/b", "a/cancel", "..", "x?stream=true", "x" * 201, "\ud800", " ", "é", "%2e%2e"])
async def test_what_is_no_id_is_asked_of_nobody(two_gateways, name):
    engines, (served, _) = await two_gateways(engines=2)
    assert (await served.ask(turn(name))).status == 404
    assert asked(engines) == [[], []]
    assert url_of_response(name) is None


async def test_an_engine_that_does_not_answer_may_have_it(make_engine, serve, monkeypatch):
    monkeypatch.setattr(response_search, "SEARCH_TIMEOUT_S", 0.1)
    engines = [await make_engine(keeps), await make_engine(never)]
    served = await serve(*engines, dispatch=TURNS)
    answer = await served.ask(turn("resp_somewhere"))
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_engine")
    assert answer.headers[b"retry-after"] == b"1"
    engines[1].script = keeps
    assert (await served.ask(turn("resp_somewhere"))).status == 404


@pytest.mark.parametrize(
    "script",
    [always(b"nonsense\r\n\r\n"), always(json_answer({}, status="500 Internal Server Error")), always(b"", close=True)],
    ids=["no HTTP", "500", "closes"],
)
async def test_an_engine_that_answers_nothing_that_counts_may_have_it(make_engine, serve, script):
    served = await serve(await make_engine(keeps), await make_engine(script), dispatch=TURNS)
    assert (await served.ask(about("resp_somewhere"))).status == 503


async def test_an_engine_that_does_not_listen_has_nothing(make_engine, serve):
    engines = [await make_engine(keeps), await make_engine(keeps)]
    served = await serve(*engines, dispatch=TURNS)
    agent, engines[1].agent = engines[1].agent, None
    await engines[1].stop()
    assert (await served.ask(turn("resp_none"))).status == 404
    await agent.stop()


async def test_it_is_found_while_another_engine_does_not_answer(make_engine, serve):
    engines = [await make_engine(keeps) for _ in range(2)]
    served, other = await serve(*engines, dispatch=TURNS), await serve(*engines, dispatch=TURNS)
    name = (await other.ask(turn())).json["id"]
    next(engine for engine in engines if not engine.requests).script = never
    assert (await served.ask(about(name))).json["status"] == "completed"


async def test_a_client_that_leaves_or_is_late_ends_its_search(make_engine, serve):
    engines = [await make_engine(never) for _ in range(2)]
    served = await serve(*engines, dispatch=TURNS)
    client = await served.connect()
    client.send(about("resp_somewhere"))
    await until(lambda: all(engine.requests for engine in engines), "the questions")
    client.reset()
    late = about("resp_elsewhere").replace(b"\r\n", b"\r\nX-Request-Timeout: 0.2\r\n", 1)
    assert (await served.ask(late)).status == 504


async def test_many_searches_wait_for_one_another(make_engine, serve, monkeypatch):
    open_questions, most = 0, 0

    async def slow(request, writer):
        nonlocal open_questions, most
        open_questions += 1
        most = max(most, open_questions)
        await asyncio.sleep(0.02)
        open_questions -= 1
        await keeps(request, writer)

    monkeypatch.setattr(response_search, "MOST_SEARCHES", 2)
    served = await serve(await make_engine(slow), await make_engine(slow), dispatch=TURNS)
    answers = await asyncio.gather(*(served.ask(about(f"resp_none_{number}")) for number in range(12)))
    assert [answer.status for answer in answers] == [404] * 12
    assert most <= 4


async def test_nobody_is_asked_for_a_client_that_left_while_it_waited_or_for_what_was_found_by_then(
    make_engine, serve, monkeypatch
):
    monkeypatch.setattr(response_search, "MOST_SEARCHES", 1)
    engines = [await make_engine(keeps) for _ in range(2)]
    served, other = await serve(*engines, dispatch=TURNS), await serve(*engines, dispatch=TURNS)
    name = (await other.ask(turn())).json["id"]
    go_on, search = asyncio.Event(), served.gateway._context.responses

    async def slow(request, writer):
        await go_on.wait()
        await keeps(request, writer)

    for engine in engines:
        engine.requests.clear()
        engine.script = slow
    finds = [asyncio.create_task(served.ask(about(name))) for _ in range(3)]
    await until(lambda: all(engine.requests for engine in engines), "the questions")
    left = await served.connect()
    left.send(about("resp_left"))
    await until(lambda: len(search._turn._waiters or ()) == 3, "those that wait")
    open_before = len(served.gateway._connections)
    left.reset()
    await until(lambda: len(served.gateway._connections) < open_before, "the end of the connection")
    go_on.set()
    assert [(await answer).json["status"] for answer in finds] == ["completed"] * 3
    assert (await served.ask(about("resp_none"))).status == 404
    rows = [path for engine_rows in asked(engines) for _, path in engine_rows]
    assert b"/v1/responses/resp_left" not in rows
    # Both engines once, and for each client the one that has it.
    assert rows.count(b"/v1/responses/" + name.encode()) == 2 + 3

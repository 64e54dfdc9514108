"""An engine that works is waited for, however long an answer takes; one that does not is given up."""

import asyncio

import pytest
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.sections import Listen
from moe_gateway.engines.dispatcher import Dispatcher
from moe_scheduling.signals import EngineSignal, Target

from tests.gateway.messages import OK, SSE_HEAD, event, json_answer, post, prompt
from tests.gateway.peers import never
from tests.gateway.waiting import until

A, NOW_S, SILENCE_S = Target("a"), 100.0, 10.0
BRIEF = {"idle_timeout_s": 0.3}


@pytest.fixture
def dispatcher(tmp_path) -> Dispatcher:
    listen, engines = Listen(port=1), (EngineAddress(name="a", url="http://a"),)
    dispatcher = Dispatcher(GatewayConfig(listen=listen, admin=Listen(port=2), token_file=tmp_path, engines=engines))
    dispatcher.set_ready("a", True, NOW_S)
    dispatcher.set_reachable("a", True)
    return dispatcher


def observe(dispatcher, at_s, **values):
    dispatcher.observe(A, EngineSignal(**values), at_s, at_s)


def test_steps_show_that_an_engine_works(dispatcher):
    observe(dispatcher, NOW_S, step=1, running=1)
    observe(dispatcher, NOW_S + 8.0, step=2, running=1)
    assert dispatcher.is_working(A, NOW_S + 17.0, SILENCE_S)
    observe(dispatcher, NOW_S + 18.0, step=2, running=1)
    assert not dispatcher.is_working(A, NOW_S + 18.1, SILENCE_S)


def test_without_a_count_of_steps_a_running_request_shows_it(dispatcher):
    assert not dispatcher.is_working(A, NOW_S, SILENCE_S)
    observe(dispatcher, NOW_S, running=1)
    assert dispatcher.is_working(A, NOW_S + 0.1, SILENCE_S)
    observe(dispatcher, NOW_S + 50.0, running=1)
    assert dispatcher.is_working(A, NOW_S + 50.1, SILENCE_S)
    observe(dispatcher, NOW_S + 51.0, running=0)
    assert not dispatcher.is_working(A, NOW_S + 51.1, SILENCE_S)


def test_old_signals_and_unknown_engines_show_nothing(dispatcher):
    observe(dispatcher, NOW_S, running=1)
    assert not dispatcher.is_working(A, NOW_S + dispatcher.settings.stale_after_s + 1.0, SILENCE_S)
    assert not dispatcher.is_working(Target("b"), NOW_S, SILENCE_S)


async def step_until(agent, done: asyncio.Event) -> None:
    step = 1
    while not done.is_set():
        step += 1
        agent.say_rank(step=step, running=1)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_makes_steps_is_waited_for(make_engine, serve, stream):
    """Two requests: the one at an engine without steps has timed out before the other gets its answer."""
    go, idle = asyncio.Event(), await make_engine(never)

    async def slow(_request, writer):
        await go.wait()
        writer.write(json_answer(OK))

    engine = await make_engine(slow)
    served = await serve(engine, idle, dispatch={"policy": "roundRobin"}, limits=BRIEF)
    stepping = asyncio.ensure_future(step_until(engine.agent, go))
    clients = [await served.connect() for _ in range(2)]
    for client in clients:
        client.send(post(prompt(stream=stream)))
    await until(lambda: served.gateway.stats.refusals["engine_silent"])
    for _ in range(2):
        client = await served.connect()
        client.send(post(prompt()))
    await until(lambda: served.gateway.stats.refusals["engine_silent"] == 2)
    assert not engine.requests[0].gone.is_set()
    go.set()
    await stepping
    answers = [await client.answer() for client in clients]
    assert sorted(answer.status for answer in answers) == [200, 504]


async def test_a_client_that_does_not_read_is_cut_off_though_the_engine_works(make_engine, serve):
    done = asyncio.Event()

    async def floods(request, writer):
        writer.write(SSE_HEAD + event("x" * 100_000) * 200)
        await never(request, writer)

    engine = await make_engine(floods)
    served = await serve(engine, limits=BRIEF)
    stepping = asyncio.ensure_future(step_until(engine.agent, done))
    client = await served.connect(limit=1024)
    client.send(post(prompt(stream=True)))
    await until(lambda: engine.requests and engine.requests[0].gone.is_set())
    done.set()
    await stepping

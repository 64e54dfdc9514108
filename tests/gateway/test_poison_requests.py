"""A request that ends each engine that reads it ends as few engines as it has attempts."""

import asyncio

import pytest

from tests.gateway.messages import OK, post, prompt
from tests.gateway.peers import answer_ok, reset

TURNS = {"policy": "roundRobin"}


@pytest.mark.parametrize("comes_back", [False, True], ids=["stays away", "is back at once"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("engines", [1, 2, 4])
async def test_no_more_engines_get_it_than_it_has_attempts(make_engine, serve, engines, warm, comes_back):
    deaths, stopping = [], []

    async def dies_of_poison(request, writer):
        if b"POISON" not in request.body:
            await answer_ok(request, writer)
            return
        deaths.append(request)
        if comes_back:
            reset(writer)
            return
        engine = next(engine for engine in fleet if request in engine.requests)
        engine.agent, agent = None, engine.agent
        agents.append(agent)
        stopping.append(asyncio.ensure_future(engine.stop()))

    agents, fleet = [], [await make_engine(dies_of_poison) for _ in range(engines)]
    served = await serve(*fleet, dispatch=TURNS, limits={"hold_timeout_s": 1.0})
    if warm:
        clients = [await served.connect() for _ in range(3 * engines)]
        for client in clients:
            client.send(post(prompt()))
        assert [(await client.answer()).json for client in clients] == [OK] * len(clients)
    client = await served.connect()
    client.send(post(prompt("POISON")))
    answer = await client.answer()
    assert answer.status in (502, 503)
    assert len(deaths) <= 2
    assert served.in_flight == 0
    await asyncio.gather(*stopping)
    for agent in agents:
        await agent.stop()

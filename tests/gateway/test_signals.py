"""The signals of engines change where requests go; missing and wrong signals harm no request."""

import asyncio

import aiohttp
import pytest
from moe_gateway.engines.signals import read_metrics
from moe_scheduling.signals import EngineSignal

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import rank_row
from tests.gateway.waiting import until


@pytest.mark.parametrize(
    "said", [{"phase": "draining", "accepting": False}, {"accepting": False}, {"phase": "backoff"}]
)
async def test_an_engine_that_drains_gets_no_new_work_and_ends_its_streams(make_engine, serve, said):
    go_on = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    leaving, staying = await make_engine(stream), await make_engine(stream)
    served = await serve(leaving, staying, dispatch={"policy": "roundRobin"})
    clients = [await served.connect() for _ in range(2)]
    for client in clients:
        client.send(post(prompt(stream=True)))
        await client.reader.readuntil(event("a"))
    leaving.agent.say(**said)
    await until(lambda: not served.target_state(leaving.name).accepting)
    go_on.set()
    for client in clients:
        assert await client.reader.readexactly(len(event("b") + SSE_END)) == event("b") + SSE_END
    for _ in range(4):
        assert (await served.ask(post(prompt()))).status == 200
    assert (len(leaving.requests), len(staying.requests)) == (1, 5)


async def test_an_engine_whose_agent_is_lost_stays_in_use_by_its_requests_in_flight(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, dispatch={"stale_after_s": 0.3})
    assert (await state_of(served))[0]["signal_source"] == "agent"
    await engine.agent.stop()
    await until(lambda: not served.gateway.dispatcher.engines[engine.name].is_reachable)
    await asyncio.sleep(0.4)
    row = (await state_of(served))[0]
    assert (row["signal_source"], row["reachable"], row["accepting"]) == ("in_flight", False, True)
    assert row["signal_age_s"] > 0.3
    assert (await served.ask(post(prompt()))).json == OK
    await engine.agent.start()
    await until(lambda: served.gateway.dispatcher.engines[engine.name].is_reachable)


async def test_the_expert_signals_of_a_rank_are_shown_and_no_part_of_the_choice(make_engine, serve):
    line = {"base_s": 0.01, "prefill_s": 0.001, "decode_s": 0.0}
    grown, even = await make_engine(), await make_engine()
    served = await serve(grown, even)
    for engine in (grown, even):
        engine.agent.say(ranks=[rank_row(step=1000, step_time=line)])
    await until(lambda: all(served.target_state(engine.name).step_time_model is not None for engine in (grown, even)))
    grown.agent.say(ranks=[rank_row(step=1001, step_time=line, expert_balance=1.6, expert_pressure=0.4)])
    await until(lambda: served.target_state(grown.name).signal.expert_balance == 1.6)
    signal = next(row["signal"] for row in await state_of(served) if row["name"] == grown.name)
    assert (signal["expert_balance"], signal["expert_pressure"]) == (1.6, 0.4)
    for _ in range(4):
        await served.ask(post(prompt()))
    assert (len(grown.requests), len(even.requests)) == (2, 2)


async def state_of(served):
    async with aiohttp.ClientSession() as session, session.get(served.admin_url + "/v1/state") as answer:
        return (await answer.json())["engines"]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"engine": None},
        {"engine": {"model": ["tiny"], "pid": 1}},
        {"engine": {"model": None, "pid": []}},
        {"ranks": None},
        {"ranks": [None]},
        {"ranks": [rank_row(running="many")]},
        {"ranks": [rank_row(age_s=None)]},
        {"ranks": [rank_row(step_time={"base_s": "x"})]},
        {"ranks": [rank_row([])]},
        {"ranks": [rank_row(99)]},
        {"ranks": [rank_row(waiting_prefill_tokens=-(2**60), kv_usage=1e300, decode_tokens=2**62)]},
        {"accepting": "of course", "phase": 7},
    ],
)
async def test_an_agent_that_talks_nonsense_harms_no_request(make_engine, serve, nonsense):
    odd, good = await make_engine(), await make_engine()
    served = await serve(odd, good)
    odd.agent.say(**nonsense)
    await asyncio.sleep(0.1)
    assert [(await served.ask(post(prompt()))).status for _ in range(4)] == [200] * 4
    assert len(await state_of(served)) == 2
    odd.agent.say(engine={"model": "tiny", "pid": 1}, ranks=[rank_row(waiting=3)], accepting=True, phase="ready")
    await until(lambda: served.target_state(odd.name).signal.waiting == 3, "the agent's return to reason")


async def test_an_engine_is_not_used_before_the_first_snapshot_of_its_agent(make_engine, serve):
    engine = await make_engine()
    engine.agent.mute = True
    served = await serve(engine, ready=False)
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    engine.agent.mute = False
    assert (await client.answer()).json == OK


# Plain servers.

NEW = """# HELP vllm:num_requests_running x
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 0.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="tiny"} 7.0
"""
OLD = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="tiny"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="tiny"} 2.0
# TYPE vllm:gpu_cache_usage_perc gauge
vllm:gpu_cache_usage_perc{model_name="tiny"} 0.5
"""


def test_new_and_old_names_of_metrics_are_read_by_rank():
    loaded = EngineSignal(running=3, waiting=2, decode_tokens=3, kv_usage=0.5)
    assert dict(read_metrics(OLD)) == {0: loaded}
    new = dict(read_metrics(NEW))
    assert new[0] == EngineSignal(running=3, waiting=2, decode_tokens=3, kv_usage=0.5, preemptions=7)
    assert new[1] == EngineSignal(running=1, decode_tokens=1)
    assert dict(read_metrics("")) == {}
    assert dict(read_metrics('vllm:num_requests_running{engine="x"} 1\nvllm:num_requests_waiting NaN\n')) == {}


@pytest.mark.parametrize("text", [NEW, OLD], ids=["new", "old"])
async def test_a_plain_server_is_scraped_and_avoided_when_loaded(make_engine, serve, text):
    loaded, free = await make_engine(agent=False), await make_engine(agent=False)
    loaded.metrics = text
    served = await serve(loaded, free, dispatch={"policy": "leastRequests"})
    await until(lambda: served.target_state(loaded.name).signal is not None)
    assert [row["signal_source"] for row in await state_of(served)] == ["scrape", "in_flight"]
    for _ in range(4):
        await served.ask(post(prompt()))
    assert (len(loaded.requests), len(free.requests)) == (0, 4)


async def test_a_plain_server_without_metrics_still_serves(make_engine, serve):
    engine = await make_engine(agent=False)
    engine.metrics = "{{{ not metrics"
    served = await serve(engine)
    assert (await served.ask(post(prompt()))).json == OK


async def test_a_plain_server_serves_all_its_names(make_engine, serve):
    engine = await make_engine(agent=False)
    engine.models = ["base", "adapter"]
    served = await serve(engine)
    assert (await served.ask(post({"model": "adapter", "prompt": ""}))).status == 200
    assert (await served.ask(post({"model": "tiny", "prompt": ""}))).status == 404


async def test_a_plain_server_is_followed_by_its_health(make_engine, serve):
    engine = await make_engine(agent=False)
    served = await serve(engine)
    state = served.target_state(engine.name)
    engine.health = "503 Service Unavailable"
    await until(lambda: not state.accepting)
    engine.health = "200 OK"
    await until(lambda: state.accepting)
    await engine.stop()
    await until(lambda: not state.accepting)
    await engine.start()
    await until(lambda: state.accepting)

"""No engine runs: requests are held for the first one up to a count and a time, and the autoscaler sees them."""

import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.clients import get, put
from tests.gateway.fake_api import engine_slice
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.waiting import until

LIMITS = {"hold_requests": 5, "hold_timeout_s": 60.0}


async def asking(served, count):
    """Clients whose requests are held."""
    clients = [await served.connect() for _ in range(count)]
    for number, client in enumerate(clients):
        client.send(post(prompt(f"number {number}")))
    await served.held(count)
    return clients


async def state_of(served):
    return (await get(served, "/v1/state"))[1]


async def samples_of(served):
    families = text_string_to_metric_families((await get(served, "/metrics"))[1])
    rows = [sample for family in families for sample in family.samples if not sample.labels]
    return {sample.name.removeprefix("moeserving_gateway_"): sample.value for sample in rows}


async def test_what_came_while_there_was_no_engine_is_served_by_the_first(make_engine, api, discover):
    served = await discover(limits=LIMITS)
    clients = await asking(served, 5)
    engine = await make_engine()
    engine.agent.say(phase="starting", accepting=False)
    api.put(engine_slice(engine, ready=False))
    await until(lambda: served.gateway.dispatcher.engines)
    await served.held(5)
    engine.agent.say(phase="ready", accepting=True)
    # The agent says so before Kubernetes does, whose word counts too.
    await asyncio.sleep(0.1)
    await served.held(5)
    api.put(engine_slice(engine, ready=True))
    assert [(await client.answer()).json for client in clients] == [OK] * 5
    assert sorted(json.loads(request.body)["prompt"] for request in engine.requests) == [
        f"number {number}" for number in range(5)
    ]
    assert served.gateway.stats.failed == 0


async def test_beyond_the_count_retry_after_says_when_there_is_room(api, discover):
    served = await discover(limits=LIMITS)
    await asking(served, 5)
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_engine")
    # The one that is held longest makes room when its time is over.
    assert 55 <= int(answer.headers[b"retry-after"]) <= 60
    assert served.gateway.dispatcher.held == 5


async def test_beyond_the_time_the_error_has_a_retry_after(api, discover):
    served = await discover(limits=LIMITS | {"hold_timeout_s": 0.3})
    clients = await asking(served, 3)
    for client in clients:
        answer = await client.answer()
        assert (answer.status, answer.json["error"]["code"]) == (503, "no_engine")
        assert int(answer.headers[b"retry-after"]) >= 1
    assert (served.gateway.dispatcher.held, (await state_of(served))["held_since_s"]) == (0, None)


async def test_the_place_of_a_client_that_leaves_is_free(make_engine, api, discover):
    served = await discover(limits=LIMITS)
    clients = await asking(served, 5)
    clients[0].reset()
    await served.held(4)
    clients[0] = await served.connect()
    clients[0].send(post(prompt()))
    await served.held(5)
    engine = await make_engine()
    api.put(engine_slice(engine))
    assert [(await client.answer()).json for client in clients] == [OK] * 5
    assert len(engine.requests) == 5


async def test_an_unknown_model_is_refused_at_once_and_starts_no_engine(api, discover):
    served = await discover(model="tiny", limits=LIMITS)
    answer = await served.ask(post({"model": "large", "prompt": "x"}))
    assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
    listed = await served.ask(b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n")
    assert [row["id"] for row in listed.json["data"]] == ["tiny"]
    state = await state_of(served)
    assert (state["held"], state["in_flight"], state["arrivals_per_s"]) == (0, 0, 0.0)


async def test_the_autoscaler_sees_held_requests_and_how_long_they_wait(make_engine, api, discover):
    served = await discover(limits=LIMITS)
    idle = await state_of(served)
    assert {name: idle[name] for name in ("accepting", "held", "held_since_s", "in_flight", "wait_s", "ttft_s")} == {
        "accepting": False,
        "held": 0,
        "held_since_s": None,
        "in_flight": 0,
        "wait_s": None,
        "ttft_s": None,
    }
    assert idle["arrivals_per_s"] == idle["prompt_tokens_per_s"] == 0.0
    clients = await asking(served, 3)
    await asyncio.sleep(0.2)
    held = await state_of(served)
    assert (held["held"], held["in_flight"], held["wait_s"], held["ttft_s"]) == (3, 0, None, None)
    assert 0.2 <= held["held_since_s"] < 5.0
    assert held["arrivals_per_s"] > 0.0
    # Three prompts of 8 bytes, taken for 2 tokens each.
    assert held["prompt_tokens_per_s"] == pytest.approx(2 * held["arrivals_per_s"])
    samples = await samples_of(served)
    assert (samples["held_requests"], samples["arrivals_total"], samples["prompt_tokens_total"]) == (3, 3, 6)
    assert 0.2 <= samples["held_seconds"] < 5.0
    assert "wait_seconds" not in samples
    engine = await make_engine()
    api.put(engine_slice(engine))
    for client in clients:
        await client.answer()
    served_all = await state_of(served)
    assert (served_all["held"], served_all["held_since_s"], served_all["in_flight"]) == (0, None, 0)
    assert served_all["wait_s"] == 0.0
    assert served_all["ttft_s"] is None, "answers in one piece have no first token"
    samples = await samples_of(served)
    assert (samples["held_seconds"], samples["wait_seconds"]) == (0.0, 0.0)


async def test_the_wait_is_that_of_the_engine_where_it_is_least(make_engine, api, discover):
    loaded, free = await make_engine(), await make_engine()
    api.put(engine_slice(loaded))
    served = await discover()
    await served.takes(loaded)
    loaded.agent.say_rank(waiting=9, waiting_prefill_tokens=50_000)
    await until(lambda: served.target_state(loaded.name).signal.waiting == 9)
    # 50,000 tokens at 0.1 ms, and the fixed part of 24 whole steps.
    assert (await state_of(served))["wait_s"] == pytest.approx(5.0 + 24 * 0.004)
    api.put(engine_slice(free))
    await served.takes(loaded, free)
    assert (await state_of(served))["wait_s"] == 0.0


async def test_the_last_engine_goes_without_cutting_its_stream_and_the_next_request_is_held(make_engine, api, discover):
    go_on = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    last, next_ = await make_engine(stream), await make_engine()
    api.put(engine_slice(last))
    served = await discover(limits=LIMITS)
    await served.takes(last)
    streaming = await served.connect()
    streaming.send(post(prompt(stream=True)))
    await streaming.reader.readuntil(event("a"))
    api.put(engine_slice(last, ready=False, serving=True, terminating=True))
    await served.takes()
    (client,) = await asking(served, 1)
    api.delete(f"slice-{last.name}")
    await until(lambda: not served.gateway.dispatcher.engines)
    assert (await state_of(served))["in_flight"] == 1
    go_on.set()
    assert await streaming.reader.readexactly(len(event("b") + SSE_END)) == event("b") + SSE_END
    api.put(engine_slice(next_))
    assert (await client.answer()).json == OK


async def test_engines_of_weight_0_get_no_requests_until_they_have_a_weight(make_engine, api, discover):
    canary = await make_engine()
    api.put(engine_slice(canary, "canary"))
    served = await discover({"stable": 100, "canary": 0}, limits=LIMITS)
    await served.takes(canary)
    (client,) = await asking(served, 1)
    assert ((await state_of(served))["accepting"], (await state_of(served))["wait_s"]) == (False, None)
    await put(served, {"groups": [{"service": "canary", "weight": 1}]})
    assert (await client.answer()).json == OK

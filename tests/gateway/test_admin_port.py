"""The admin port: health, metrics that count right, state, and a control route that applies all or nothing."""

import asyncio
import socket
from contextlib import aclosing

import aiohttp
import pytest
from moe_contract.clients import GatewayClient
from moe_contract.gateway_state import read_gateway_state
from moe_contract.one_connection import one_connection
from moe_contract.state_stream import read_states
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.clients import TOKEN, get, put
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.peers import always, never, reset
from tests.gateway.waiting import free_port, until


async def test_health_is_life_and_readiness_is_an_engine_that_accepts(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    assert [(await get(served, path))[0] for path in ("/healthz", "/readyz")] == [200, 200]
    engine.agent.say(accepting=False)
    await until(lambda: not served.gateway.ready)
    assert [(await get(served, path))[0] for path in ("/healthz", "/readyz")] == [200, 503]


async def test_a_connection_serves_a_look_at_the_state_and_the_settings_after_it(make_engine, serve):
    served = await serve(await make_engine())
    async with one_connection() as session:
        client = GatewayClient(session, served.admin_url)
        await client.state()
        await client.put_settings({"request": {"policy": "fcfs"}}, ("newer", TOKEN))
        assert (await client.state()).config.document()["request"]["policy"] == "fcfs"


async def test_metrics_parse_and_count_each_request_once(make_engine, serve):
    async def torn(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await asyncio.sleep(0.02)
        reset(writer)

    engine = await make_engine()
    served = await serve(engine)
    for _ in range(3):
        await served.ask(post(prompt()))
    await served.ask(post(b"{"))
    engine.script = torn
    await served.ask(post(prompt(stream=True)))
    await until(lambda: served.gateway.ready)
    engine.script = never
    client = await served.connect()
    client.send(post(prompt()))
    await until(lambda: served.in_flight == 1)
    status, text = await get(served, "/metrics")
    assert status == 200
    samples = {
        (sample.name.removeprefix("moeserving_gateway_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["requests_total", "200", "completions"] == 3
    assert samples["requests_total", "502", "completions"] == 1
    assert samples["requests_total", "400", "completions"] == 1
    assert samples["refusals_total", "bad_request"] == 1
    assert samples["dispatch_total", "least_predicted"] == 5
    assert samples["ejections_total", engine.name] == 1
    assert samples["retries_total",] == 0
    assert samples["held_requests",] == 0
    assert 0 < samples["traffic_share",] <= 1
    assert samples["ttft_seconds_count",] == 1
    assert samples["in_flight_requests", "0", engine.name] == 1
    assert samples["engine_accepting", "0", engine.name] == 1
    assert samples["signal_stale", "0", engine.name] == 0
    assert 0 <= samples["signal_age_seconds", "0", engine.name] < 2
    assert 1 / 8 <= samples["ttft_factor", "0", engine.name] <= 8
    # Of all these answers the first byte of the stream alone came with the first token.
    assert samples["prediction_ratio_count", "0", engine.name] == 1
    assert samples["prediction_ratio_sum", "0", engine.name] > 0


async def test_state_is_what_the_contract_says(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    await served.ask(post(prompt()))
    status, state = await get(served, "/v1/state")
    assert status == 200
    demand = {"held_since_s", "in_flight", "wait_s", "ttft_s", "prompt_tokens_per_s", "arrivals_per_s"}
    bounded = {"ttft", "inter_token"}
    assert set(state) == {"accepting", "held", "config", "engines", "totals", "splits", "pod"} | demand | bounded
    assert [state[name] for name in bounded] == [None, None], "no bound is set"
    assert (state["held_since_s"], state["in_flight"], state["wait_s"]) == (None, 0, 0.0)
    assert state["ttft_s"] is None, "an answer in one piece has no first token"
    engine.script = always(SSE_HEAD + event("a") + SSE_END)
    await served.ask(post(prompt(stream=True)))
    _, later = await get(served, "/v1/state")
    assert later["ttft_s"] > 0.0
    # It has run for less than a second or a little more.
    assert 0.1 < state["arrivals_per_s"] <= 1.0
    assert state["prompt_tokens_per_s"] == pytest.approx(2 * state["arrivals_per_s"])
    assert (state["accepting"], state["held"]) == (True, 0)
    assert state["totals"] == {"requests": 1, "failed": 0, "retried": 0}
    assert set(state["config"]) == {"dispatch", "request", "engines"}
    (row,) = state["engines"]
    assert row["signal"]["step_time"] == {
        "base_s": 0.004, "prefill_s": 0.0001, "decode_s": 0.0002, "decode_root_s": 0.0, "prefill_base_s": 0.0,
    }  # fmt: skip
    del row["signal"], row["signal_age_s"]
    assert row == {
        "name": engine.name,
        "rank": 0,
        "group": None,
        "reachable": True,
        "accepting": True,
        "stalled": False,
        "in_flight": 0,
        "unanswered_prefill_tokens": 0,
        "signal_source": "agent",
        "role": "",
    }


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", "\u00e9"])
async def test_the_control_route_takes_the_token_and_nothing_else(make_engine, serve, token):
    served = await serve(await make_engine())
    before = served.gateway.in_force
    status, document = await put(served, {"dispatch": {"policy": "roundRobin"}}, token)
    assert (status, document["errors"][0]["path"]) == (401, "Authorization")
    assert served.gateway.in_force is before


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        (b"{", [("", "not JSON")]),
        (b"[]", [("", "object")]),
        ({"dispach": {}}, [("dispach", "nearest known: dispatch")]),
        ({"dispatch": {"polcy": 1}}, [("dispatch.polcy", "nearest known: policy")]),
        ({"dispatch": {"policy": "robin"}}, [("dispatch.policy", "known: ")]),
        ({"dispatch": None}, [("dispatch", "got None")]),
        ({"dispatch": {"stickiness_s": -1}}, [("dispatch", "stickiness_s must be at least 0")]),
        ({"dispatch": {"targets": {"ttft_s": 0}}}, [("dispatch.targets", "ttft_s must be greater than 0")]),
        (
            {"dispatch": {"targets": {"tffc": 1}}},
            [("dispatch.targets.tffc", "answer_weight, inter_token_s, ttft_growth, ttft_s")],
        ),
        ({"dispatch": {"saturation_s": "much"}}, [("dispatch.saturation_s", "got 'much'")]),
        ({"dispatch": {"policy": "roundRobin"}, "request": {"policy": "sjff"}}, [("request.policy", "sjf")]),
        ({"engines": [{"name": "a"}]}, [("engines[0].url", "required")]),
        ({"engines": [{"name": "a", "url": "ftp://x"}]}, [("engines[0].url", "an address")]),
        ({"engines": [{"name": "a", "url": "http://[::1"}]}, [("engines[0].url", "an address")]),
        ({"engines": [{"name": "a", "url": "http://h:99999"}]}, [("engines[0].url", "an address")]),
        ({"engines": [{"name": "a", "url": "http://h", "agent_url": "h"}]}, [("engines[0].agent_url", "an address")]),
        ({"engines": [{"name": "a", "url": "http://h", "ranks": 0}]}, [("engines[0].ranks", "greater")]),
        ({"engines": [{"name": "a", "url": "http://h"}] * 2}, [("engines", "name used twice: a")]),
        ({"engines": {"a": 1}}, [("engines", "a list is needed")]),
    ],
)
async def test_a_bad_change_names_what_is_wrong_and_changes_nothing(make_engine, serve, body, errors):
    served = await serve(await make_engine())
    before = served.gateway.in_force
    status, document = await put(served, body)
    assert status == 422
    found = [(row["path"], row["message"]) for row in document["errors"]]
    assert [path for path, _ in found] == [path for path, _ in errors]
    assert all(part in message for (_, message), (_, part) in zip(found, errors, strict=True)), found
    assert served.gateway.in_force is before
    assert (await served.ask(post(prompt()))).json == OK


async def test_a_change_keeps_what_it_leaves_out(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, dispatch={"stickiness_s": 0.7})
    status, document = await put(served, {"dispatch": {"policy": "roundRobin"}})
    assert status == 200
    assert (document["dispatch"]["policy"], document["dispatch"]["stickiness_s"]) == ("roundRobin", 0.7)
    assert document == (await get(served, "/v1/state"))[1]["config"]
    assert (await put(served, {}))[1] == document
    assert (await put(served, document))[1] == document


async def test_a_policy_that_is_switched_decides_the_next_request(make_engine, serve):
    loaded, free = await make_engine(), await make_engine()
    served = await serve(loaded, free)
    loaded.agent.say_rank(waiting_prefill_tokens=50_000)
    await until(lambda: served.target_state(loaded.name).signal.waiting_prefill_tokens)
    counts = []
    for policy in ("predicted", "roundRobin", "predicted"):
        assert (await put(served, {"dispatch": {"policy": policy}}))[0] == 200
        before = len(loaded.requests)
        for _ in range(4):
            await served.ask(post(prompt()))
        counts.append(len(loaded.requests) - before)
    assert counts == [0, 2, 0]


async def test_an_order_that_is_switched_orders_what_is_held(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False, request={"policy": "fcfs"})
    clients = []
    for text in ("x" * 9000, "short"):
        clients.append(await served.connect())
        clients[-1].send(post(prompt(text)))
        await served.held(len(clients))
    await put(served, {"request": {"policy": "sjf", "ageing_rate": 1.0, "ageing_horizon_s": 3600.0}})
    engine.agent.say(accepting=True)
    for client in clients:
        await client.answer()
    assert b"short" in engine.requests[0].body


async def test_engines_come_and_go_while_requests_run(make_engine, serve):
    go_on = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    async def waits_then_fails(_request, writer):
        await go_on.wait()
        reset(writer)

    leaving, coming = await make_engine(stream, name="leaving"), await make_engine(name="coming")
    served = await serve(leaving)
    streaming, waiting = await served.connect(), await served.connect()
    streaming.send(post(prompt(stream=True)))
    await streaming.reader.readuntil(event("a"))
    leaving.script = waits_then_fails
    waiting.send(post(prompt("is tried again elsewhere")))
    await until(lambda: len(leaving.requests) == 2)
    status, document = await put(served, {"engines": [coming.address]})
    assert (status, [row["name"] for row in document["engines"]]) == (200, ["coming"])
    await until(lambda: served.gateway.ready)
    go_on.set()
    assert (await streaming.reader.readexactly(len(event("b") + SSE_END))).endswith(SSE_END)
    assert (await waiting.answer()).json == OK
    for _ in range(3):
        assert (await served.ask(post(prompt()))).json == OK
    assert len(leaving.requests) == 2
    await until(lambda: served.in_flight == 0)
    assert [row["name"] for row in (await get(served, "/v1/state"))[1]["engines"]] == ["coming"]


async def test_a_connection_from_before_is_not_used_once_its_engine_is_gone(make_engine, serve):
    """The idle connection is closed as idle, its request is on the way, and then there is no such engine."""
    asked = asyncio.Event()

    async def once(_request, writer):
        if not asked.is_set():
            asked.set()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        else:
            await asyncio.sleep(0.2)
            reset(writer)

    leaving, coming = await make_engine(once), await make_engine(name="coming")
    served = await serve(leaving)
    client = await served.connect()
    client.send(post(prompt()))
    await client.answer()
    client.send(post(prompt()))
    await until(lambda: len(leaving.requests) == 2)
    await put(served, {"engines": [coming.address]})
    assert (await client.answer()).json == OK


async def test_an_engine_at_another_address_is_another_engine(make_engine, serve):
    old, new = await make_engine(name="one"), await make_engine(name="one")
    served = await serve(old)
    client = await served.connect()
    client.send(post(prompt()))
    await client.answer()
    new.agent.say(accepting=False)
    await put(served, {"engines": [new.address]})
    assert not served.gateway.ready
    new.agent.say(accepting=True)
    await until(lambda: served.gateway.ready)
    client.send(post(prompt()))
    await client.answer()
    assert (len(old.requests), len(new.requests)) == (1, 1)


async def test_no_engines_at_all_is_a_configuration_too(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    assert (await put(served, {"engines": []}))[0] == 200
    assert (await served.ask(post(prompt()))).status == 503
    assert (await put(served, {"engines": [engine.address]}))[0] == 200
    await until(lambda: served.gateway.ready)
    assert (await served.ask(post(prompt()))).json == OK


async def test_a_gateway_that_drains_ends_idle_connections_and_takes_no_new_ones(make_engine, serve):
    served = await serve(await make_engine())
    idle = await served.connect()
    idle.send(post(prompt()))
    await idle.answer()
    await asyncio.wait_for(served.gateway.drain(), 5)
    assert await idle.ended()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()


async def test_a_connection_whose_answer_began_before_the_drain_is_answered_once_more(make_engine, serve):
    """Its head said nothing of an end, so the next request may be on its way when the answer ends."""
    go_on = asyncio.Event()

    async def slow(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    engine = await make_engine(slow)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 60)
    assert b"close" not in head.lower()
    draining = asyncio.ensure_future(served.gateway.drain())
    await until(lambda: served.gateway.draining)
    go_on.set()
    await asyncio.wait_for(client.reader.readuntil(b"0\r\n\r\n"), 60)
    client.send(post(prompt(stream=True)))
    second = await client.answer()
    assert (second.status, second.headers[b"connection"]) == (200, b"close")
    assert await client.ended()
    await asyncio.wait_for(draining, 60)


async def test_a_connection_that_the_loop_has_not_taken_when_the_gateway_drains_is_answered(make_engine, serve):
    served = await serve(await make_engine())
    # In one turn of the loop: clients connect, the kernel takes them, and the port is closed.
    address = ("127.0.0.1", served.config.listen.port)
    clients = [socket.create_connection(address, timeout=60) for _ in range(3)]
    for client in clients:
        client.sendall(post(prompt()))
    await asyncio.wait_for(served.gateway.drain(), 60)
    for client in clients:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.close()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()


async def test_a_forced_stop_answers_held_requests_with_a_retry_after(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine, dispatch={"saturation_s": 0.5})
    sent, held = await served.connect(), await served.connect()
    sent.send(post(prompt("x" * 100_000)))
    await until(lambda: engine.requests)
    engine.agent.mute = True
    held.send(post(prompt()))
    await served.held(1)
    await served.gateway.close()
    for client in (sent, held):
        answer = await client.answer()
        assert (answer.status, answer.json["error"]["code"]) == (503, "gateway_ended")
        assert answer.headers[b"retry-after"] == b"1"
        assert await client.ended()
    assert served.gateway.stats.refusals == {"gateway_ended": 2}


async def test_a_start_that_fails_leaves_no_port_open(make_engine, serve):
    taken = await make_engine()
    port = free_port()
    with pytest.raises(OSError, match="Address already in use"):
        await serve(listen={"port": port}, admin={"port": taken.port})
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_sparse_stream_says_at_once_that_a_request_is_held_and_ends_with_the_gateway(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    await until(lambda: served.gateway.ready)
    async with (
        aiohttp.ClientSession() as session,
        aclosing(read_states(session, served.admin_url, interval_s=3600.0)) as states,
    ):

        async def newest():
            while not (line := await anext(states)):
                pass
            return read_gateway_state(line)

        state = await newest()
        assert (state.accepting, state.held) == (True, 0)
        engine.agent.say(accepting=False)
        while state.accepting:
            state = await newest()
        client = await served.connect()
        client.send(post(prompt()))
        while not state.held:
            state = await newest()
        closing = asyncio.create_task(served.gateway.close())
        async with asyncio.timeout(20):
            async for _ in states:
                pass
            await closing


async def test_an_interval_that_is_no_time_is_refused(make_engine, serve):
    served = await serve(await make_engine())
    status, text = await get(served, "/v1/state?watch=1&interval=soon")
    assert status == 422
    assert text["errors"][0]["path"] == "interval"

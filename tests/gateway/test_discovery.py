"""Engines come and go with their EndpointSlices, and an API server that fails takes nothing away."""

import asyncio
import logging

import pytest
from moe_contract.api_server import ApiServer
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.input_errors import InvalidInput
from moe_gateway.engines.discovery import Discovery
from moe_gateway.gateway import Gateway

from tests.gateway.fake_api import engine_slice, make_slice
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.waiting import free_port, until

LOST = "lost the API server"


async def test_engines_come_and_go_with_their_endpoints(make_engine, api, discover):
    one, two = await make_engine(), await make_engine()
    served = await discover()
    assert served.gateway.ready
    api.put(engine_slice(one))
    await served.takes(one)
    api.put(engine_slice(two))
    await served.takes(one, two)
    api.delete(f"slice-{one.name}")
    await served.takes(two)
    assert (await served.ask(post(prompt()))).json == OK
    assert (len(one.requests), len(two.requests)) == (0, 1)
    assert (api.lists, api.watches) == (1, 1)


async def test_engines_that_were_there_before_the_gateway_are_found(make_engine, api, discover):
    one, two = await make_engine(), await make_engine()
    for engine in (one, two):
        api.put(engine_slice(engine))
    await (await discover()).takes(one, two)


@pytest.mark.parametrize(
    "conditions", [{"ready": False}, {"terminating": True}, {"ready": False, "serving": True, "terminating": True}]
)
async def test_an_engine_that_is_not_ready_gets_no_new_work_and_ends_its_streams(
    make_engine, api, discover, conditions
):
    go_on = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await go_on.wait()
        writer.write(event("b") + SSE_END)

    leaving, staying = await make_engine(stream), await make_engine()
    api.put(engine_slice(leaving))
    served = await discover()
    await served.takes(leaving)
    client = await served.connect()
    client.send(post(prompt(stream=True)))
    await client.reader.readuntil(event("a"))
    api.put(engine_slice(staying))
    # Its agent goes on to say that it is ready: what Kubernetes says counts too.
    api.put(engine_slice(leaving, **conditions))
    await served.takes(staying)
    for _ in range(3):
        assert (await served.ask(post(prompt()))).json == OK
    api.delete(f"slice-{leaving.name}")
    await until(lambda: len(served.gateway.dispatcher.engines) == 1)
    assert served.gateway.dispatcher.in_flight == 1
    go_on.set()
    assert await client.reader.readexactly(len(event("b") + SSE_END)) == event("b") + SSE_END
    assert (len(leaving.requests), len(staying.requests)) == (1, 3)
    await until(lambda: served.gateway.dispatcher.in_flight == 0)


async def test_an_engine_that_becomes_ready_gets_what_was_held(make_engine, api, discover):
    engine = await make_engine()
    api.put(engine_slice(engine, ready=False))
    served = await discover()
    client = await served.connect()
    client.send(post(prompt()))
    await served.held(1)
    api.put(engine_slice(engine, ready=True))
    assert (await client.answer()).json == OK


async def test_an_engine_is_not_used_before_its_agent_answered(make_engine, api, discover):
    engine = await make_engine()
    engine.agent.say(phase="starting", accepting=False)
    api.put(engine_slice(engine))
    served = await discover()
    await until(lambda: served.gateway.dispatcher.engines)
    await asyncio.sleep(0.1)
    assert served.accepting == set()
    engine.agent.say(phase="ready", accepting=True)
    await served.takes(engine)


async def test_a_pod_at_another_address_is_another_engine(make_engine, api, discover):
    old, new = await make_engine(name="tiny-0"), await make_engine(name="tiny-0")
    api.put(engine_slice(old))
    served = await discover()
    await served.takes(old)
    api.put(engine_slice(new))
    await until(lambda: served.gateway.dispatcher.engines["tiny-0"].address.url == new.url)
    await served.takes(new)
    assert (await served.ask(post(prompt()))).json == OK
    assert (len(old.requests), len(new.requests)) == (0, 1)


async def test_an_engine_that_moves_to_another_slice_is_never_away(make_engine, api, discover):
    engine = await make_engine()
    api.put(engine_slice(engine, name="first"))
    served = await discover()
    await served.takes(engine)
    known = served.gateway.dispatcher.engines[engine.name]
    api.put(engine_slice(engine, name="second"))
    api.delete("first")
    other = await make_engine()
    api.put(engine_slice(other, name="third"))
    await served.takes(engine, other)
    # The same object, so its accounting and its connections were kept.
    assert served.gateway.dispatcher.engines[engine.name] is known


async def test_slices_of_other_services_name_no_engines(make_engine, api, discover):
    mine, other = await make_engine(), await make_engine()
    api.put(engine_slice(other, "another-service"))
    api.put(engine_slice(mine))
    served = await discover()
    await served.takes(mine)
    assert list(served.gateway.dispatcher.engines) == [mine.name]


async def test_a_plain_server_without_an_agent_port_is_scraped(make_engine, api, discover):
    engine = await make_engine(agent=False)
    rows = {engine.name: {"address": "127.0.0.1"}}
    api.put(make_slice("plain", "tiny-engine", rows, ports=[{"name": "engine", "port": engine.port}]))
    await (await discover()).takes(engine)


# Watches that end, and an API server that is away.


async def test_a_watch_that_breaks_is_begun_anew_and_misses_nothing(make_engine, api, discover):
    one, two = await make_engine(), await make_engine()
    api.put(engine_slice(one))
    served = await discover()
    await served.takes(one)
    for turn in range(3):
        api.drop()
        api.delete(f"slice-{(one, two)[turn % 2].name}")
        api.put(engine_slice((two, one)[turn % 2]))
        await served.takes((two, one)[turn % 2])


@pytest.mark.parametrize("as_event", [False, True], ids=["as status", "as event"])
async def test_a_version_that_is_gone_takes_another_list_and_is_no_failure(
    make_engine, api, discover, caplog, as_event
):
    one, two = await make_engine(), await make_engine()
    api.put(engine_slice(one))
    served = await discover()
    await served.takes(one)
    await until(lambda: api.watches == 1)
    lists = api.lists
    api.gone_as_event = as_event
    # One change to be seen, then the watch ends, and what happens until the next is in no event.
    api.drop()
    api.delete(f"slice-{one.name}")
    api.put(engine_slice(two))
    api.forget()
    await served.takes(two)
    await until(lambda: api.watches >= 2)
    await until(lambda: api.lists >= lists + 2)
    api.put(engine_slice(one))
    await served.takes(one, two)
    assert LOST not in [row.getMessage() for row in caplog.records if "410" in str(getattr(row, "reason", ""))]


async def test_an_api_server_that_is_away_at_the_start_is_waited_for(make_engine, api, discover):
    engine = await make_engine()
    api.put(engine_slice(engine))
    await api.stop()
    served = await discover(synced=False)
    assert served.gateway.not_ready == "the API server has not answered yet"
    await asyncio.sleep(0.2)
    assert (served.gateway.ready, served.accepting) == (False, set())
    await api.start()
    await until(lambda: served.gateway.ready)
    await served.takes(engine)


@pytest.mark.parametrize("failure", [None, 500, 403, 401, 429], ids=str)
async def test_an_api_server_that_fails_later_takes_no_engine_away(make_engine, api, discover, caplog, failure):
    caplog.set_level(logging.INFO, "moeserving.gateway")
    one, two = await make_engine(), await make_engine()
    api.put(engine_slice(one))
    served = await discover()
    await served.takes(one)
    if failure is None:
        await api.stop()
    else:
        api.answer = failure
        api.drop()
    await until(lambda: LOST in [row.getMessage() for row in caplog.records])
    await asyncio.sleep(0.5)
    assert served.gateway.ready
    assert (await served.ask(post(prompt()))).json == OK
    api.put(engine_slice(two))
    api.answer = None
    if failure is None:
        await api.start()
    await until(lambda: served.accepting == {one.name, two.name})
    # However often it was asked in vain, there is one line of its loss, and one of its return.
    said = [row.getMessage() for row in caplog.records if "API server" in row.getMessage()]
    assert said == [LOST, "the API server answers again"]


async def test_what_a_dead_watch_did_not_show_is_found_by_the_next_list(make_engine, api):
    reported = []
    discovery = Discovery(ApiServer(), "models", 1, reported.append, relist_s=0.3)
    following = asyncio.ensure_future(discovery.run(["tiny-engine"]))
    await until(lambda: api.watches == 1)
    api.mute = True
    api.put(engine_slice(await make_engine(name="late")))
    await until(lambda: reported and [row.address.name for row in reported[-1]] == ["late"])
    assert (discovery.synced, api.lists >= 2) == (True, True)
    following.cancel()
    await asyncio.wait([following])
    await discovery.close()


async def test_a_gateway_ends_while_its_api_server_is_away(make_engine, api, discover):
    served = await discover()
    await api.stop()
    await asyncio.wait_for(served.gateway.drain(), 5)


def test_without_an_api_server_to_be_found_the_start_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (token := tmp_path / "token").write_text("secret")
    ports = {"listen": {"port": free_port()}, "admin": {"port": free_port()}}
    document = ports | {"token_file": str(token), "discovery": {}}
    with pytest.raises(InvalidInput) as refused:
        Gateway(parse_model(GatewayConfig, document), ControlTokens(token))
    assert str(refused.value).startswith("discovery: neither a pod's account nor a usable kubeconfig")


async def test_a_quota_is_divided_among_the_gateways_that_are_ready(make_engine, api, serve, tmp_path):
    (keys := tmp_path / "keys").mkdir()
    engine = await make_engine()
    api.put(engine_slice(engine))
    discovery = {"namespace": "models", "groups": [{"service": "tiny-engine"}], "gateways": "tiny"}
    served = await serve(ready=False, discovery=discovery, auth={"key_dirs": [str(keys)]})
    quotas = served.gateway._context.gate._quotas
    await until(lambda: served.accepting == {engine.name}, "the engine, and nothing of the gateways")
    rows = {f"gateway-{number}": {"address": f"10.0.0.{number}", "ready": number < 3} for number in range(4)}
    api.put(make_slice("gateways", "tiny", rows, ports=[{"name": "http", "port": 8000}]))
    await until(lambda: quotas._gateways == 3, "three gateways")
    assert served.gateway.gateways == ("gateway-0", "gateway-1", "gateway-2")
    # The same pods, in the slice of their other addresses.
    sixth = {name: row | {"address": f"fd00::{name[-1]}"} for name, row in rows.items()}
    api.put(make_slice("sixth", "tiny", sixth, addressType="IPv6", ports=[{"name": "http", "port": 8000}]))
    api.put(make_slice("gateways", "tiny", {name: rows[name] for name in list(rows)[:2]}))
    api.delete("sixth")
    await until(lambda: quotas._gateways == 2, "two gateways")
    api.delete("gateways")
    await until(lambda: quotas._gateways == 1, "this one alone")
    assert served.accepting == {engine.name}

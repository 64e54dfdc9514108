"""IPv4 and IPv6 on real sockets: clients of either family, engines of either family."""

import aiohttp
import pytest
from moe_contract.addresses import ANY, LOOPBACK, LOOPBACK_IPV6, http_url, is_bindable

from tests.gateway.fake_api import engine_slice, make_slice
from tests.gateway.messages import OK, prompt
from tests.gateway.waiting import free_port, until

pytestmark = pytest.mark.skipif(not is_bindable(LOOPBACK_IPV6), reason="this machine has no IPv6 on loopback")


async def ask(host: str, port: int) -> object:
    url = http_url(host, port) + "/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=prompt()) as answer:
        return await answer.json()


@pytest.mark.parametrize("engine_host", [LOOPBACK, LOOPBACK_IPV6])
@pytest.mark.parametrize("with_agent", [True, False])
async def test_clients_of_both_families_reach_engines_of_either(make_engine, serve, engine_host, with_agent):
    engine = await make_engine(host=engine_host, agent=with_agent)
    listen, admin = ({"host": ANY, "port": free_port()} for _ in range(2))
    await serve(engine, listen=listen, admin=admin)
    for host in (LOOPBACK, LOOPBACK_IPV6):
        assert await ask(host, listen["port"]) == OK
        url = http_url(host, admin["port"]) + "/readyz"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200
    assert len(engine.requests) == 2


async def test_a_gateway_listens_at_its_configured_address_alone(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, listen={"host": LOOPBACK_IPV6, "port": free_port()})
    assert await ask(LOOPBACK_IPV6, served.config.listen.port) == OK
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(LOOPBACK, served.config.listen.port)


async def test_an_engine_that_a_slice_of_ipv6_names_gets_requests(make_engine, discover, api):
    engine = await make_engine(host=LOOPBACK_IPV6)
    api.put(engine_slice(engine) | {"addressType": "IPv6"})
    served = await discover()
    await until(lambda: served.accepting == {engine.name})
    assert await ask(LOOPBACK, served.config.listen.port) == OK


async def test_an_engine_of_two_families_is_one_engine(make_engine, discover, api):
    engine = await make_engine()
    ports = [{"name": "engine", "port": engine.port}, {"name": "agent", "port": engine.agent.port}]
    api.put(engine_slice(engine))
    second = make_slice("second", "tiny-engine", {engine.name: {"address": "fd00::1"}}, ports=ports)
    api.put(second | {"addressType": "IPv6"})
    served = await discover()
    await until(lambda: served.accepting == {engine.name})
    assert await ask(LOOPBACK, served.config.listen.port) == OK

"""Proxies of the environment: calls within a cluster never go there, downloads do."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.request import getproxies_environment, proxy_bypass_environment

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_config import AgentConfig
from moe_contract.engine_process import engine_environment
from moe_contract.proxies import is_local, is_within_cluster, with_direct_hosts

from tests.contract.refusing_proxy import RefusingProxy, refusing_proxy


@pytest.mark.parametrize(
    ("host", "local", "within"),
    [
        ("localhost", True, True),
        ("127.0.0.1", True, True),
        ("::1", True, True),
        ("10.96.0.1", False, True),
        ("fd00::1", False, True),
        ("192.168.1.9", False, True),
        ("prometheus", False, True),
        ("prometheus.monitoring.svc", False, True),
        ("prometheus.monitoring.svc.cluster.local", False, True),
        ("prometheus.monitoring.svc.company.test", False, True),
        ("8.8.8.8", False, False),
        ("2606:4700::1111", False, False),
        ("prometheus.company.test", False, False),
        ("svc.company.test", False, False),
    ],
)
def test_what_is_near(host: str, local: bool, within: bool) -> None:
    assert (is_local(host), is_within_cluster(host)) == (local, within)


PROXY = "http://proxy.test:3128"


def goes_direct(environment: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As Python's own clients decide: urllib, requests, and so the hub's client."""
    with monkeypatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return bool(proxy_bypass_environment(host, getproxies_environment()))


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("known", [{}, {"NO_PROXY": "company.test"}, {"no_proxy": "company.test"}])
def test_downloads_go_by_the_proxy_and_the_cluster_does_not(name, known, monkeypatch):
    environment = with_direct_hosts({name: PROXY} | known, ["fd00::9", "10.0.0.9", ""])
    assert environment[name] == PROXY
    near = ("localhost", "127.0.0.1", "::1", "10.0.0.9", "fd00::9", "peer.models.svc", "x.svc.cluster.local")
    assert [host for host in near if not goes_direct(environment, host, monkeypatch)] == []
    assert not goes_direct(environment, "huggingface.co", monkeypatch)
    assert goes_direct(environment, "hub.company.test", monkeypatch) is bool(known)


@pytest.mark.parametrize(
    "environment", [{}, {"NO_PROXY": "a"}, {"HTTP_PROXY": ""}, {"HTTP_PROXY": PROXY, "NO_PROXY": "*"}]
)
def test_an_environment_without_a_proxy_or_with_none_for_all_stays_as_it_is(environment):
    assert with_direct_hosts(environment, ["10.0.0.9"]) == environment


@given(st.lists(st.sampled_from(["a.test", ".b.test", "10.0.0.0/8", "localhost", "::1"]), max_size=4))
def test_what_was_reached_directly_still_is_and_nothing_stands_twice(listed: list[str]) -> None:
    environment = with_direct_hosts({"HTTP_PROXY": PROXY, "NO_PROXY": ", ".join(listed)}, ["10.0.0.9"])
    rows = environment["NO_PROXY"].split(",")
    assert set(listed) <= set(rows)
    assert len(rows) == len(set(rows))
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert with_direct_hosts(environment, ["10.0.0.9"]) == environment, "a second time changes nothing"


def test_an_engine_keeps_the_proxy_for_downloads_and_reaches_its_pod_directly(tmp_path: Path) -> None:
    config = AgentConfig.model_validate(
        {
            "run_dir": tmp_path,
            "listen": {"port": 1},
            "token_file": tmp_path / "token",
            "engine": {"port": 2, "model": "org/m", "served_name": "m"},
        }
    )
    inherited = {"HTTPS_PROXY": PROXY, "MOESERVING_POD_IP": "fd00::9", "KUBERNETES_SERVICE_HOST": "fd00:1::1"}
    environment = engine_environment(config, inherited, cpu_build=False, cpus=1)
    assert environment["HTTPS_PROXY"] == PROXY
    assert {"fd00::9", "fd00:1::1", "localhost"} <= set(environment["NO_PROXY"].split(","))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RefusingProxy]:
    with refusing_proxy(monkeypatch) as made:
        yield made


async def test_calls_of_agents_and_gateways_pass_a_refusing_proxy_by(proxy: RefusingProxy) -> None:
    import aiohttp
    from aiohttp import web
    from moe_contract.clients import AgentClient, GatewayClient

    app = web.Application()

    async def answer(request: web.Request) -> web.Response:
        return web.Response()

    app.router.add_get("/readyz", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        assert await AgentClient(session, url).is_ready()
        assert await GatewayClient(session, url).is_ready()
    await runner.cleanup()
    assert proxy.asked == []


async def test_a_download_would_ask_the_proxy(proxy: RefusingProxy) -> None:
    """The test's own control: the proxy is in force for a client that reads the environment."""
    import requests

    answer = await asyncio.to_thread(requests.get, "http://hub.invalid/model", timeout=10)
    assert answer.status_code == 403
    assert proxy.asked == ["GET http://hub.invalid/model HTTP/1.1"]
    assert os.environ["HTTP_PROXY"] == proxy.url

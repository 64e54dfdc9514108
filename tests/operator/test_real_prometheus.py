"""The autoscaler's signal out of a real Prometheus, which scrapes what gateways and agents really expose."""

import asyncio
import itertools
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from cluster_debian import require
from moe_agent.api.metrics import AgentCollector
from moe_contract.agent_state import AgentState
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.metrics import GatewayCollector
from moe_gateway.request_stats import RequestStats
from moe_operator.api import MoEServing, parse_resource
from moe_operator.autoscale.prometheus import build_role_queries, fetch_reading
from moe_operator.autoscale.signal import Fleet
from moe_operator.autoscale.source import Sources
from moe_operator.plan import Observed
from moe_operator.plan.names import Names
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.role_load import decode_load
from moe_scheduling.fleet.size import FleetSignal
from moe_scheduling.signals import StepTime
from pods import agent, gateway, pod, states
from prometheus_client import CollectorRegistry, start_http_server

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
KEY = ("ns", "tiny")
STEP = StepTime(base_s=0.010, prefill_s=0.001, decode_s=0.0005, decode_root_s=0.002)
NOBODY = Fleet(gateways=(), engines={}, silent=0, ready=0, observed_s=0.0)
Document = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exposed(collector: Any) -> Iterator[int]:
    """The port where a collector is scraped."""
    registry = CollectorRegistry()
    registry.register(collector)
    port = free_port()
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    yield port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def stats() -> RequestStats:
    return RequestStats()


@pytest.fixture
def gateway_port(stats: RequestStats) -> Iterator[int]:
    engine = EngineAddress(name="e", url="http://127.0.0.1:1").model_dump()
    document = {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "/t", "engines": [engine]}
    dispatcher = Dispatcher(GatewayConfig.model_validate(document))
    for target in dispatcher.target_states.values():
        target.accepting = True
    yield from exposed(GatewayCollector(dispatcher, stats, time.monotonic))


@pytest.fixture
def agent_port() -> Iterator[int]:
    tokens = itertools.count(1000, 100)

    def state() -> AgentState:
        found = agent(name="e", config={"version": 1, "request": {"policy": "sjf"}}, accepting=True)
        ranks = (replace(rank, computed_tokens=next(tokens), step_time=STEP) for rank in found.ranks)
        return replace(found, ranks=tuple(ranks))

    yield from exposed(AgentCollector(state, lambda: None))


@pytest.fixture
def prometheus(tmp_path: Path, gateway_port: int, agent_port: int) -> Iterator[str]:
    """The address of one that scrapes a gateway and an engine's agent five times a second."""
    require({"prometheus": "prometheus"})
    targets = {"tiny-gateway-5d9c-x7": gateway_port, "tiny-engine-5d9c-x7": agent_port}
    targets |= {f"tiny-engine-{role}-5d9c-x7": agent_port for role in ("prefill", "decode")}
    static = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "ns", "pod": pod}} for pod, port in targets.items()
    ]
    config = {"global": {"scrape_interval": "200ms"}, "scrape_configs": [{"job_name": "t", "static_configs": static}]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://{address}"
    process.terminate()
    process.wait(timeout=30)


async def signal_of_a_full_window(url: str) -> FleetSignal:
    """The first signal with all that is known, once enough of the rates' window has samples."""
    for _ in range(480):
        found = (await fetch_reading(url, KEY, NOBODY)).signal
        if found is not None and found.ttft_s is not None and (found.arrivals_per_s or 0.0) > 5.0:
            return found
        await asyncio.sleep(0.25)
    raise AssertionError("Prometheus never knew the load")


async def signal_of_a_role(url: str, role: EngineRole) -> FleetSignal:
    """The first signal of the engines of a role that has the rate of their tokens."""
    queries = build_role_queries(KEY[0], Names(KEY[1]), role, 0.03)
    for _ in range(480):
        found = (await fetch_reading(url, KEY, NOBODY, queries)).signal
        if found is not None and found.tokens_per_s is not None:
            return found
        await asyncio.sleep(0.25)
    raise AssertionError("Prometheus never knew the load of a role")


async def test_prometheus_has_the_load_of_each_role(prometheus: str) -> None:
    (rank,) = agent().ranks
    prefill, decode = [await signal_of_a_role(prometheus, role) for role in (EngineRole.PREFILL, EngineRole.DECODE)]
    backlog_s = (rank.waiting_prefill_tokens + rank.running_prefill_tokens) * STEP.prefill_s
    assert (prefill.wait_s, prefill.kv_usage, prefill.decode_load) == (pytest.approx(backlog_s), None, None)
    load = decode_load([replace(rank, step_time=STEP)], 0.03)
    assert load is not None
    assert load > rank.decode_tokens * STEP.decode_s / (0.03 - STEP.base_s)
    assert (decode.wait_s, decode.kv_usage, decode.decode_load) == (None, rank.kv_usage, pytest.approx(load))


async def busy(stats: RequestStats) -> None:
    """Ten requests a second that wait a quarter of a second for their first token."""
    while True:
        now_s = time.monotonic()
        stats.arrive(100, now_s)
        stats.answer(0.25, now_s)
        await asyncio.sleep(0.1)


async def test_prometheus_has_what_gateways_and_agents_count(prometheus: str, stats: RequestStats) -> None:
    load = asyncio.create_task(busy(stats))
    try:
        found = await signal_of_a_full_window(prometheus)
    finally:
        load.cancel()
    assert found.kv_usage == agent().ranks[0].kv_usage
    assert found.ttft_s == pytest.approx(0.25)
    assert found.wait_s is not None
    assert found.wait_s >= 0.0
    assert found.tokens_per_s is not None
    assert found.tokens_per_s > 100.0, "each scrape counts 100 more, five times a second"
    assert found.arrivals_per_s is not None
    assert found.arrivals_per_s < 15.0
    assert (found.held, found.in_flight) == (0, 0)
    assert time.monotonic() - found.observed_s < 10.0


async def test_the_pods_of_others_are_not_counted(prometheus: str, stats: RequestStats) -> None:
    stats.arrive(100, time.monotonic())
    for _ in range(240):
        if (await fetch_reading(prometheus, KEY, NOBODY)).signal is not None:
            break
        await asyncio.sleep(0.25)
    assert (await fetch_reading(prometheus, KEY, NOBODY)).signal is not None
    assert (await fetch_reading(prometheus, ("ns", "gateway"), NOBODY)).signal is None
    assert (await fetch_reading(prometheus, ("other", "tiny"), NOBODY)).signal is None


def asleep_or_idle(url: str) -> MoEServing:
    """A resource that may go to zero after a second without requests."""
    autoscaling = {"minReplicas": 0, "maxReplicas": 2, "idleAfter": "1s", "interval": "1s"}
    spec = {
        "model": {"uri": "hf://org/a"}, "autoscaling": autoscaling, "metrics": {"prometheus": {"url": url}},
    }  # fmt: skip
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return parse_resource(header | {"spec": spec})


async def test_a_gateway_that_prometheus_lacks_keeps_the_last_engine_and_one_that_holds_wakes_it(
    prometheus: str,
) -> None:
    wanted, engine = asleep_or_idle(prometheus), pod()
    seen, unseen = pod("tiny-gateway-5d9c-x7", "gateway"), pod("tiny-gateway-5d9c-y8", "gateway")
    one = Observed(tokens=("t",), replicas=1)
    async with aiohttp.ClientSession() as session:
        sources = Sources(session)

        async def decide(*pods: Document, observed: Observed = one, **gateways: Any) -> int:
            found = {f"tiny-gateway-5d9c-{name}": state for name, state in gateways.items()}
            return (await sources.decide(KEY, wanted, observed, [engine, *pods], states(found))).replicas

        for _ in range(240):
            if (await fetch_reading(prometheus, KEY, NOBODY)).signal is not None:
                break
            await asyncio.sleep(0.25)
        for _ in range(8):
            assert await decide(seen, unseen) == 1, "what the gateway that is not scraped has is not known"
            await asyncio.sleep(0.25)
        asleep = Observed(tokens=("t",), replicas=0)
        assert await decide(seen, unseen, observed=asleep) == 0
        assert await decide(seen, unseen, observed=asleep, y8=gateway(held=1)) == 1
        for _ in range(240):
            if await decide(seen) == 0:
                return
            await asyncio.sleep(0.25)
    raise AssertionError("every gateway is idle and scraped, and the last engine never ended")

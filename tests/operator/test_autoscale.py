"""Where the autoscaler's signal comes from: states of gateways and agents, or Prometheus; and what becomes of it."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
from group_pods import group_pod
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.api.metrics import AgentCollector
from moe_contract.agent_state import AgentState
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.gateway_state import GatewayState
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.metrics import GatewayCollector
from moe_gateway.request_stats import RequestStats
from moe_operator.api import MoEServing, parse_resource
from moe_operator.autoscale.autoscaler import Autoscaler, Outcome
from moe_operator.autoscale.prometheus import build_queries, fetch_reading
from moe_operator.autoscale.settings import fleet_settings
from moe_operator.autoscale.signal import Fleet, build_signal, mean_ttft_s
from moe_operator.autoscale.source import Sources
from moe_operator.kubernetes.groups import whole_replicas
from moe_operator.plan import Observed
from moe_operator.plan.names import LWS_WORKER_INDEX, Names
from moe_scheduling.fleet.size import FleetSignal
from pods import agent, gateway, pod, states
from prometheus_client import CollectorRegistry, generate_latest

from tests.contract.refusing_proxy import refusing_proxy

Document = dict[str, Any]


def fleet(
    *gateways: GatewayState, engines: dict[str, AgentState] | None = None, wanted: int | None = None, at_s: float = 0.0
):
    count = len(gateways) if wanted is None else wanted
    return Fleet(gateways=gateways, engines=engines or {}, silent=count - len(gateways), ready=count, observed_s=at_s)


def computed(tokens: int, phase: str = "ready") -> AgentState:
    state = agent(phase)
    return replace(state, ranks=tuple(replace(rank, computed_tokens=tokens) for rank in state.ranks))


def test_the_signal_is_the_whole_fleets() -> None:
    now = fleet(
        gateway(wait_s=0.5, held=2, held_since_s=3.0, in_flight=4, arrivals_per_s=1.0, ttft_s=1.0),
        gateway(wait_s=0.25, held=1, held_since_s=None, in_flight=1, arrivals_per_s=3.0, ttft_s=2.0),
        engines={"a": computed(1600), "b": agent(ranks=[]), "c": agent("starting")},
        at_s=10.0,
    )
    assert build_signal(now, 100.0) == FleetSignal(
        observed_s=10.0,
        wait_s=0.25,
        kv_usage=0.25,
        ttft_s=1.75,
        tokens_per_s=100.0,
        arrivals_per_s=4.0,
        held=3,
        held_since_s=3.0,
        in_flight=5,
    )


def test_no_gateway_or_one_that_is_silent_is_no_signal() -> None:
    assert build_signal(fleet()) is None
    assert build_signal(fleet(gateway(), wanted=2)) is None


def test_what_nobody_knows_is_absent() -> None:
    bare = gateway(wait_s=None, ttft_s=None, arrivals_per_s=None)
    signal = build_signal(fleet(bare))
    assert signal is not None
    values = (signal.wait_s, signal.kv_usage, signal.ttft_s, signal.tokens_per_s, signal.arrivals_per_s)
    assert values == (None,) * 5
    endless = build_signal(fleet(gateway(wait_s=float("inf"))))
    assert endless is not None
    assert endless.wait_s is None


def test_the_mean_time_to_first_token_is_by_requests() -> None:
    assert mean_ttft_s([]) is None
    assert mean_ttft_s([gateway(ttft_s=None)]) is None
    assert mean_ttft_s([gateway(ttft_s=1.0, arrivals_per_s=0.0), gateway(ttft_s=3.0, arrivals_per_s=None)]) == 2.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=4))
def test_a_mean_lies_between_the_least_and_the_greatest(rows: list[tuple[float, float]]) -> None:
    mean = mean_ttft_s([gateway(ttft_s=ttft, arrivals_per_s=rate) for ttft, rate in rows])
    assert mean is not None
    assert min(row[0] for row in rows) - 1e-6 <= mean <= max(row[0] for row in rows) + 1e-6


def resource(**autoscaling: Any) -> MoEServing:
    spec: Document = {"model": {"uri": "hf://org/a"}, "engine": {"replicas": 2}}
    if autoscaling:
        spec["autoscaling"] = autoscaling
    if url := autoscaling.pop("prometheus", None):
        spec["metrics"] = {"prometheus": {"url": url}}
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return parse_resource(header | {"spec": spec})


BUSY = {"mode": "internal", "maxReplicas": 8, "targets": {"kvUsage": 0.25}}
PODS = [pod(), pod("tiny-engine-b"), pod("tiny-gateway-a", "gateway")]
STATES = {"tiny-engine-a": agent(), "tiny-engine-b": agent(), "tiny-gateway-a": gateway(wait_s=5.0)}


async def decide(
    wanted: MoEServing,
    replicas: int | None = 2,
    pods: list[Document] = PODS,
    by_pod: dict[str, AgentState | GatewayState] = STATES,
):
    async with aiohttp.ClientSession() as session:
        observed = Observed(tokens=("t",), replicas=replicas)
        return await Sources(session).decide(("ns", "tiny"), wanted, observed, pods, states(by_pod))


async def test_without_autoscaling_the_number_is_the_resources() -> None:
    assert (await decide(resource(), replicas=7)).replicas == 2


@pytest.mark.parametrize(("replicas", "limited"), [(2, None), (1, "OutOfBounds"), (9, "OutOfBounds")])
async def test_in_the_external_mode_the_number_is_the_resources_within_the_bounds(
    replicas: int, limited: str | None
) -> None:
    wanted = resource(mode="external", minReplicas=2, maxReplicas=4)
    engine = wanted.spec.engine.model_copy(update={"replicas": replicas})
    wanted = wanted.model_copy(update={"spec": wanted.spec.model_copy(update={"engine": engine})})
    outcome = await decide(wanted)
    assert outcome.replicas == min(4, max(2, replicas))
    assert (outcome.limited and outcome.limited[0]) == limited


async def test_before_the_first_engines_it_begins_with_the_resources_number() -> None:
    assert (await decide(resource(**BUSY), replicas=None)).replicas == 2


async def test_a_load_above_the_target_asks_for_more() -> None:
    outcome = await decide(resource(**BUSY))
    assert outcome.replicas == 4
    assert outcome.limited is None


@pytest.mark.parametrize("silent", ["tiny-gateway-a", "all"])
async def test_without_a_signal_nothing_changes_and_that_is_reported(silent: str) -> None:
    by_pod = {} if silent == "all" else {name: state for name, state in STATES.items() if name != silent}
    outcome = await decide(resource(**BUSY), by_pod=by_pod)
    assert outcome.replicas == 2
    assert outcome.limited is not None
    assert outcome.limited[0] == "NoSignal"


async def test_the_most_engines_hold_the_number_back_and_that_is_reported() -> None:
    outcome = await decide(resource(**BUSY | {"maxReplicas": 2}))
    assert (outcome.replicas, outcome.limited and outcome.limited[0]) == (2, "TooFewReplicas")


@pytest.mark.parametrize(("worker", "ready"), [(True, {"tiny-engine-0"}), (False, set())])
async def test_of_several_nodes_an_engine_counts_as_ready_when_all_its_pods_are(
    monkeypatch: pytest.MonkeyPatch, worker: bool, ready: set[str]
) -> None:
    seen: list[tuple[set[str], set[str]]] = []

    def note(_: Autoscaler, replicas: int, ready: set[str], loading: set[str], *__: Any, **___: Any) -> Outcome:
        seen.append((ready, loading))
        return Outcome(replicas=replicas, reason="", limited=None)

    monkeypatch.setattr(Autoscaler, "decide", note)
    pods = [group_pod(0, 0), group_pod(0, 1, ready=worker), PODS[2]]
    observed = Observed(tokens=("t",), replicas=1)
    async with aiohttp.ClientSession() as session:
        whole = whole_replicas(pods, 2)
        await Sources(session).decide(("ns", "tiny"), resource(**BUSY), observed, pods, states(STATES), whole)
    assert seen == [(ready, {"tiny-engine-0"} - ready)]


async def test_of_several_nodes_the_leader_alone_is_an_engine() -> None:
    workers = [pod(f"tiny-engine-{index}", **{LWS_WORKER_INDEX: str(index)}) for index in range(4)]
    by_pod = {f"tiny-engine-{index}": agent() for index in range(4)} | {"tiny-gateway-a": gateway(wait_s=0.0)}
    in_proportion = resource(mode="internal", maxReplicas=8, targets={"kvUsage": 0.5})
    outcome = await decide(in_proportion, replicas=1, pods=[*workers, PODS[2]], by_pod=by_pod)
    assert outcome.replicas == 1, "a KV cache that is used as wanted, on one replica of four nodes"


def test_a_fleet_that_is_loading_is_not_asked_for_twice_and_the_time_of_a_start_is_learned() -> None:
    now_s = 0.0
    autoscaler = Autoscaler(lambda: now_s)
    section = resource(**BUSY).spec.autoscaling
    assert section is not None

    def decide_now(replicas: int, ready: set[str], loading: set[str]) -> int:
        engines = dict.fromkeys(ready, agent())
        signal = build_signal(fleet(gateway(), engines=engines, at_s=now_s))
        return autoscaler.decide(replicas, ready, loading, signal, fleet_settings(section)).replicas

    assert decide_now(1, {"a"}, set()) == 2, "0.5 of the KV cache is used, 0.25 is wanted"
    for moment_s in (5.0, 10.0, 40.0):
        now_s = moment_s
        assert decide_now(2, {"a"}, {"b"}) == 2
    now_s = 65.0
    assert decide_now(2, {"a", "b"}, set()) == 4
    assert autoscaler._startup_s == 60.0


class Prometheus(BaseHTTPRequestHandler):
    """Stands in for Prometheus' HTTP API: `answers` are values by a word of the query."""

    answers: dict[str, str]
    asked: list[str]
    status = 200

    def do_GET(self) -> None:
        (query,) = parse_qs(urlsplit(self.path).query)["query"]
        self.asked.append(query)
        found = [value for word, value in self.answers.items() if word in query]
        rows = [{"metric": {}, "value": [0, value]} for value in found[:1]]
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": rows}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ANSWERS = {
    "time() -": "2.5",
    "wait_seconds": "0.75",
    "kv_usage_ratio": "0.5",
    "ttft_seconds_sum": "NaN",
    "computed_tokens_total": "1200",
    "held_seconds": "0",
    "count(": "1",
    "held_requests": "0",
    "in_flight_requests": "7",
}


@pytest.fixture
def prometheus() -> Iterator[tuple[str, type[Prometheus]]]:
    handler = type("Handler", (Prometheus,), {"answers": dict(ANSWERS), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


async def test_prometheus_gives_the_signal_with_its_age_and_gateways_what_they_hold(
    prometheus: tuple[str, type[Prometheus]],
) -> None:
    url, handler = prometheus
    now_s = build_signal(fleet(gateway()))
    signal = (await fetch_reading(url, ("ns", "tiny"), fleet(gateway(held=3)))).signal
    assert signal is not None
    assert now_s is not None
    assert (signal.wait_s, signal.kv_usage, signal.tokens_per_s) == (0.75, 0.5, 1200.0)
    assert signal.ttft_s is None, "0/0: no request"
    assert signal.arrivals_per_s is None, "no sample"
    assert (signal.held, signal.in_flight) == (3, 7)
    assert len(handler.asked) == len(build_queries("ns", Names("tiny")))


async def test_old_samples_are_an_old_signal(prometheus: tuple[str, type[Prometheus]]) -> None:
    url, handler = prometheus
    young = (await fetch_reading(url, ("ns", "tiny"), fleet(gateway()))).signal
    handler.answers["time() -"] = "200"
    old = (await fetch_reading(url, ("ns", "tiny"), fleet(gateway()))).signal
    assert young is not None
    assert old is not None
    assert young.observed_s - old.observed_s > 190.0
    outcome = await decide(resource(**BUSY, prometheus=url))
    assert outcome.limited is not None
    assert outcome.limited[0] == "NoSignal"


async def test_a_prometheus_that_knows_no_gateway_refuses_or_is_away_is_no_signal(
    prometheus: tuple[str, type[Prometheus]],
) -> None:
    url, handler = prometheus
    handler.answers = {}
    assert (await fetch_reading(url, ("ns", "tiny"), fleet())).signal is None
    handler.status = 503
    assert (await fetch_reading(url, ("ns", "tiny"), fleet())).signal is None
    assert (await fetch_reading("http://127.0.0.1:1", ("ns", "tiny"), fleet())).signal is None


async def test_a_prometheus_in_the_cluster_is_asked_without_a_proxy_and_one_elsewhere_with_it(
    prometheus: tuple[str, type[Prometheus]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = prometheus
    with refusing_proxy(monkeypatch) as proxy:
        assert (await fetch_reading(url, ("ns", "tiny"), fleet(gateway()))).signal is not None
        assert proxy.asked == []
        outside = "http://prometheus.company.test"
        assert (await fetch_reading(outside, ("ns", "tiny"), fleet(gateway()))).signal is None
        assert proxy.asked[0].startswith("GET http://prometheus.company.test/api/v1/query")


def names_exposed() -> set[str]:
    config = GatewayConfig.model_validate(
        {
            "listen": {"port": 1},
            "admin": {"port": 2},
            "token_file": "/t",
            "engines": [EngineAddress(name="e", url="http://127.0.0.1:1").model_dump()],
        }
    )
    state = agent(name="e", config={"version": 1, "request": {"policy": "sjf"}}, accepting=True)
    dispatcher = Dispatcher(config)
    for target in dispatcher.target_states.values():
        target.accepting = True
    registry = CollectorRegistry()
    registry.register(GatewayCollector(dispatcher, RequestStats(), lambda: 1.0))
    registry.register(AgentCollector(lambda: state, lambda: None))
    text = generate_latest(registry).decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


def test_every_series_that_is_asked_for_is_one_that_gateways_and_agents_have() -> None:
    asked = {
        name for query in build_queries("ns", Names("tiny")).values() for name in re.findall(r"moeserving_\w+", query)
    }
    assert len(asked) == 9
    assert asked <= names_exposed()


def test_the_pods_that_are_looked_at_are_the_resources_own() -> None:
    queries = build_queries("ns", Names("tiny"))
    (engines,) = set(re.findall(r'pod=~"([^"]+)"', queries["kv_usage"]))
    (gateways,) = set(re.findall(r'pod=~"([^"]+)"', queries["held"]))
    for name in ("tiny-engine-5d9c-x7", "tiny-engine-canary-5d9c-x7", "tiny-engine-0", "tiny-engine-0-1"):
        assert re.fullmatch(engines, name)
    for name in ("tiny-engine-engine-5d9c-x7", "big-tiny-engine-5d9c-x7", "tiny-gateway-5d9c-x7"):
        assert not re.fullmatch(engines, name)
    assert re.fullmatch(gateways, "tiny-gateway-5d9c-x7")
    assert not re.fullmatch(gateways, "tiny-gateway-gateway-5d9c-x7")

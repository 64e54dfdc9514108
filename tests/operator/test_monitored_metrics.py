"""Each metric that a dashboard or an alert reads is one that the product exposes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from experts_documents import EXPERTS
from moe_agent.api.metrics import AgentCollector
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.kv_transfer import KvTransferState
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.metrics import GatewayCollector
from moe_gateway.request_stats import RequestStats
from moe_operator.kubernetes.metrics import Metrics
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Store
from moe_scheduling.engine.disaggregation import LatencyTargets
from pods import agent

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/moeserving"
SUFFIXES = ("_total", "_bucket", "_sum", "_count")


def read_texts() -> dict[str, str]:
    """Each query by the name of its panel or alert."""
    texts = {}
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for number, target in enumerate(panel.get("targets", ())):
                texts[f"{path.stem}: {panel['title']} {number}"] = target["expr"]
    for group in yaml.safe_load((CHART / "rules/moeserving.yaml").read_text())["groups"]:
        texts |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return texts


TEXTS = read_texts()


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    """The names of all families, counters with their suffix left out."""
    engine = EngineAddress(name="e", url="http://127.0.0.1:1").model_dump()
    document = {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "/t", "engines": [engine]}
    dispatcher = Dispatcher(GatewayConfig.model_validate(document | {"disaggregation": {}}))
    state = replace(agent(config={"version": 1, "request": {"policy": "sjf"}}), kv_transfer=KvTransferState())
    for target in dispatcher.target_states.values():
        target.accepting = True
    experts = EXPERTS | {
        "load": EXPERTS["load"] | {"hottest": [{"layer": 0, "expert": 0, "tokens": 40.0}]},
        "totals": EXPERTS["totals"] | {"stayed": {}},
    }
    stats = RequestStats()
    stats.bounded.set_bounds(LatencyTargets(ttft_s=1.0, inter_token_s=0.1))
    for number in range(100):
        stats.answer(0.5, float(number))
    collectors = [
        GatewayCollector(dispatcher, stats, lambda: 100.0),
        AgentCollector(lambda: state, lambda: experts),
        Metrics(WorkQueue(), Store()).registry,
    ]
    return {family.name for collector in collectors for family in collector.collect()}


@pytest.mark.parametrize("name", TEXTS)
def test_each_metric_that_is_read_is_exposed(name, exposed):
    read = set(re.findall(r"moeserving_[a-z0-9_]+", TEXTS[name]))
    assert read
    stems = {metric.removesuffix(next(filter(metric.endswith, SUFFIXES), "")) for metric in read}
    assert stems <= exposed

"""The engines as an InferencePool: what is planned for it, and the page that shows how it is used."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from foreign_kinds import INFERENCE_POOLS
from hypothesis import given, settings
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_contract.input_errors import InvalidInput
from moe_contract.picker_config import EndpointPickerConfig
from moe_operator.api import parse_resource
from moe_operator.api.crd import build_crd
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.ignored import find_ignored
from moe_operator.plan.names import CONFIG
from resource_strategies import documents

PAGE = Path(__file__).parents[2] / "docs" / "inference-gateway.md"
POOL_SCHEMA = INFERENCE_POOLS["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
Document = dict[str, Any]


def serving(pool: Document | None, **spec: Any) -> Document:
    gateway = {} if pool is None else {"inferencePool": pool}
    spec = {"model": {"uri": "hf://org/a"}, "gateway": gateway, **spec}
    return {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}, "spec": spec}


def objects(document: Document) -> dict[tuple[str, str], Document]:
    planned = plan_cluster(parse_resource(document), "ns", Observed(uid="u", tokens=("t",)), Defaults())
    return {(row["kind"], row["metadata"]["name"]): row for row in planned.objects}


def gateway(found: dict[tuple[str, str], Document]) -> Document:
    return dict(found["Deployment", "a-gateway"]["spec"]["template"])


def ingress(found: dict[tuple[str, str], Document], name: str, port: str) -> list[Document]:
    rules = found["NetworkPolicy", name]["spec"]["ingress"]
    return [peer for rule in rules for peer in rule.get("from", []) if rule["ports"][0]["port"] == port]


@settings(max_examples=40)
@given(documents())
def test_a_pool_is_planned_where_it_is_wanted_and_is_valid(document: Document) -> None:
    planned = plan_cluster(parse_resource(document), "ns", Observed(tokens=("t",)), Defaults()).objects
    pools = [row for row in planned if row["kind"] == "InferencePool"]
    assert len(pools) == ("inferencePool" in document["spec"].get("gateway", {}))
    for pool in pools:
        jsonschema.Draft202012Validator(POOL_SCHEMA).validate(pool)
        picker = pool["spec"]["endpointPickerRef"]
        (service,) = [row for row in planned if (row["kind"], row["metadata"]["name"]) == ("Service", picker["name"])]
        (port,) = service["spec"]["ports"]
        assert port["port"] == picker["port"]["number"]
        (gateway,) = [
            row for row in planned if row["metadata"].get("labels", {}).items() >= service["spec"]["selector"].items()
            and row["kind"] == "Deployment"
        ]  # fmt: skip
        ports = gateway["spec"]["template"]["spec"]["containers"][0]["ports"]
        assert port["targetPort"] in {row["name"] for row in ports}


def test_without_the_section_nothing_changes() -> None:
    found = objects(serving(None))
    assert not {"InferencePool"} & {kind for kind, _ in found}
    assert ("Service", "a-picker") not in found
    assert "endpoint_picker" not in gateway(found)["metadata"]["annotations"][CONFIG]
    assert ingress(found, "a-engine", "engine") == [
        {"podSelector": {"matchLabels": found["Service", "a"]["spec"]["selector"]}}
    ]


def test_gateways_pick_for_proxies_which_may_reach_them_and_the_engines() -> None:
    found = objects(serving({"fallbacks": 2}))
    config = parse_model(GatewayConfig, json.loads(gateway(found)["metadata"]["annotations"][CONFIG]))
    wanted = {"listen": {"host": "::", "port": 9002}, "tls": True, "fallbacks": 2}
    assert config.endpoint_picker == EndpointPickerConfig.model_validate(wanted)
    for name, port in (("a-engine", "engine"), ("a-gateway", "picker")):
        labels = [
            row["key"] for peer in ingress(found, name, port) for row in peer["podSelector"].get("matchExpressions", ())
        ]
        assert labels == ["gateway.networking.k8s.io/gateway-name", "gateway.envoyproxy.io/owning-gateway-name"]
    assert "annotations" not in found["Service", "a-picker"]["metadata"] or (
        found["Service", "a-picker"]["metadata"]["annotations"].keys() <= {"moeserving.dev/owner"}
    )


def test_annotations_of_the_service_for_clients_are_not_those_of_the_pickers() -> None:
    document = serving({})
    document["spec"]["gateway"]["service"] = {"annotations": {"cloud.test/public": "yes"}}
    found = objects(document)
    assert "cloud.test/public" in found["Service", "a"]["metadata"]["annotations"]
    assert "cloud.test/public" not in found["Service", "a-picker"]["metadata"]["annotations"]


@pytest.mark.parametrize(("nodes", "leaders_alone"), [(1, False), (2, True)])
def test_of_engines_on_several_nodes_the_leaders_are_members(nodes: int, leaders_alone: bool) -> None:
    engine = {"parallelism": {"data": 16, "nodes": nodes, "expert": True}}
    pool = objects(serving({}, engine=engine))["InferencePool", "a"]
    labels = pool["spec"]["selector"]["matchLabels"]
    assert ("leaderworkerset.sigs.k8s.io/worker-index" in labels) is leaders_alone


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"failureMode": "open"}, "spec.gateway.inferencePool.failureMode"),
        ({"fallbacks": 9}, "spec.gateway.inferencePool.fallbacks"),
        ({"enabled": True}, "spec.gateway.inferencePool.enabled"),
    ],
)
def test_what_is_not_known_is_refused_by_its_path(pool: Document, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_resource(serving(pool))


def test_on_one_machine_the_section_is_named_as_without_effect() -> None:
    assert "spec.gateway.inferencePool" in find_ignored(parse_resource(serving({})))


def page_documents() -> list[Document]:
    text = PAGE.read_text("utf-8")
    return [row for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for row in yaml.safe_load_all(block)]


def test_the_page_shows_a_valid_resource_and_a_route_to_its_pool() -> None:
    by_kind = {row["kind"]: row for row in page_documents()}
    resource = by_kind["MoEServing"]
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.Draft202012Validator(schema).validate(resource)
    planned = plan_cluster(parse_resource(resource), "ns", Observed(tokens=("t",)), Defaults()).objects
    (pool,) = [row for row in planned if row["kind"] == "InferencePool"]
    (rule,) = by_kind["HTTPRoute"]["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend == {
        "group": pool["apiVersion"].partition("/")[0],
        "kind": "InferencePool",
        "name": pool["metadata"]["name"],
    }
    (picker,) = [row for row in planned if row["kind"] == "Service" and row["metadata"]["name"].endswith("-picker")]
    rule = by_kind["DestinationRule"]["spec"]
    assert rule["host"].split(".")[0] == picker["metadata"]["name"]

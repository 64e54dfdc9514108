"""The recipes of docs/clusters.md: each is valid, planned, and does what the page says of it."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from moe_operator.api import parse_resource
from moe_operator.api.crd import build_crd
from moe_operator.plan import Defaults, Observed, plan_cluster

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
Document = dict[str, Any]
RECIPES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)]
BY_NAME = {recipe["metadata"]["name"]: recipe for recipe in RECIPES}
SCHEMA = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def objects(name: str) -> dict[tuple[str, str], Document]:
    """The objects of a recipe by kind and name, the latter without that of the resource."""
    observed = Observed(uid="u", tokens=("t",), has_service_monitors=True)
    planned = plan_cluster(parse_resource(BY_NAME[name]), "models", observed, Defaults())
    return {(row["kind"], row["metadata"]["name"].removeprefix(name).lstrip("-")): row for row in planned.objects}


def pod(name: str, component: str = "engine", role: str = "leader") -> Document:
    """The pod template of engines or gateways."""
    rows = objects(name)
    if (workload := rows.get(("LeaderWorkerSet", component))) is not None:
        return dict(workload["spec"]["leaderWorkerTemplate"][f"{role}Template"])
    return dict(rows["Deployment", component]["spec"]["template"])


def container(template: Document) -> Document:
    return next(row for row in template["spec"]["containers"] if row["name"] in ("engine", "gateway"))


def rules(name: str, component: str = "engine") -> list[Document]:
    return list(objects(name)["NetworkPolicy", component]["spec"]["ingress"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["metadata"]["name"])
def test_each_recipe_is_a_valid_resource_and_has_a_plan(recipe: Document) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(recipe)
    assert objects(recipe["metadata"]["name"])["Deployment", "gateway"]


def test_the_page_has_a_recipe_for_each_kind_of_cluster() -> None:
    assert {
        "openshift", "sidecars", "ambient", "queued", "monitored", "balanced", "dual", "rdma", "proxied", "mirrored",
        "offline", "spot",
    } == BY_NAME.keys()  # fmt: skip


@pytest.mark.parametrize("component", ["engine", "gateway"])
def test_openshift_finds_no_user_and_no_group_that_it_did_not_assign(component: str) -> None:
    template = pod("openshift", component)
    contexts = [template["spec"].get("securityContext", {}), container(template)["securityContext"]]
    for context in contexts:
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & context.keys()
    assert contexts[1]["readOnlyRootFilesystem"] is True
    assert contexts[1]["allowPrivilegeEscalation"] is False


def test_all_that_an_engine_writes_is_on_a_volume_that_it_may_write_to() -> None:
    template = pod("openshift")
    found = container(template)
    writable = {row["mountPath"] for row in found["volumeMounts"] if not row.get("readOnly")}
    variables = {row["name"]: row.get("value", "") for row in found["env"]}
    config = json.loads(template["metadata"]["annotations"]["moeserving.dev/config"])
    folders = {
        "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
        "FLASHINFER_WORKSPACE_BASE",
    }  # fmt: skip
    written = [variables[name] for name in folders] + [config["run_dir"], "/tmp", "/dev/shm"]
    written.append(config["engine"]["env"]["HF_HUB_CACHE"])
    for path in written:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in writable), path
    sources = {row["name"]: row for row in template["spec"]["volumes"]}
    homes = [row["name"] for row in found["volumeMounts"] if row["mountPath"] in (variables["HOME"], "/tmp")]
    assert [sources[name]["emptyDir"] for name in homes] == [{}, {}]
    assert variables["USER"], "torch asks for the name of the user"


def test_side_cars_leave_the_operators_ports_alone() -> None:
    engine, gateway = pod("sidecars"), pod("sidecars", "gateway")
    excluded = "traffic.sidecar.istio.io/excludeInboundPorts"
    for template, port in ((engine, "agent"), (gateway, "admin")):
        number = next(row["containerPort"] for row in container(template)["ports"] if row["name"] == port)
        assert template["metadata"]["annotations"][excluded] == str(number)
        assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "true"
    (scrapers,) = BY_NAME["sidecars"]["spec"]["networkPolicy"]["metricsFrom"]
    (rule,) = (rule for rule in rules("sidecars") if scrapers in rule["from"])
    assert rule["ports"] == [{"port": "agent", "protocol": "TCP"}]


TUNNEL = [{"port": 15008, "protocol": "TCP"}]


def test_the_tunnel_of_ambient_mode_is_open_where_another_port_is() -> None:
    (engine,) = (rule for rule in rules("ambient") if rule.get("ports") == TUNNEL)
    gateways = objects("ambient")["Deployment", "gateway"]["spec"]["selector"]
    assert {"podSelector": gateways} in engine["from"]
    (gateway,) = (rule for rule in rules("ambient", "gateway") if rule.get("ports") == TUNNEL)
    assert "from" not in gateway, "clients come from anywhere"
    for component in ("engine", "gateway"):
        (probes,) = (rule for rule in rules("ambient", component) if "ports" not in rule)
        assert probes["from"][0] == {"ipBlock": {"cidr": "169.254.7.127/32"}}
        assert pod("ambient", component)["metadata"]["labels"]["istio.io/dataplane-mode"] == "ambient"


def test_kueue_sees_the_engines_and_not_the_gateways() -> None:
    queue = "kueue.x-k8s.io/queue-name"
    found = {place: row["metadata"]["labels"].get(queue) for place, row in objects("queued").items()}
    assert {place for place, value in found.items() if value} == {("LeaderWorkerSet", "engine")}
    assert found["LeaderWorkerSet", "engine"] == "serving"
    assert queue not in pod("queued")["metadata"]["labels"], "a label of the resource restarts no pod"


def test_monitors_carry_the_label_that_prometheus_selects() -> None:
    rows = objects("monitored")
    for place in (("ServiceMonitor", "engine"), ("PodMonitor", "gateway")):
        assert rows[place]["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert sum("release" in row["metadata"]["labels"] for row in rows.values()) == 2
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert peer in rules("monitored")[1]["from"]


def test_a_load_balancer_has_its_class_and_annotations_and_all_objects_the_common_labels() -> None:
    rows = objects("balanced")
    service = rows["Service", ""]
    assert service["spec"]["loadBalancerClass"] == "service.k8s.aws/nlb"
    assert service["metadata"]["annotations"]["service.beta.kubernetes.io/aws-load-balancer-scheme"] == "internal"
    assert all(row["metadata"]["labels"]["team"] == "search" for row in rows.values())
    assert "team" not in pod("balanced")["metadata"]["labels"]


def test_processes_listen_on_both_families() -> None:
    assert objects("dual")["Service", ""]["spec"]["ipFamilyPolicy"] == "RequireDualStack"
    assert objects("spot")["Service", ""]["spec"]["ipFamilyPolicy"] == "PreferDualStack"
    assert "ipFamilyPolicy" not in objects("balanced")["Service", ""]["spec"]
    engine, gateway = (
        json.loads(pod("dual", component)["metadata"]["annotations"]["moeserving.dev/config"])
        for component in ("engine", "gateway")
    )
    hosts = [engine["listen"], engine["engine"], gateway["listen"], gateway["admin"]]
    assert [row["host"] for row in hosts] == ["::"] * 4


@pytest.mark.parametrize("role", ["leader", "worker"])
def test_on_the_hosts_network_pods_know_their_address_and_the_clusters_names(role: str) -> None:
    template = pod("rdma", role=role)
    assert template["spec"]["hostNetwork"] is True
    assert template["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    variables = [row for row in container(template)["env"] if "valueFrom" in row]
    fields = {row["name"]: row["valueFrom"]["fieldRef"]["fieldPath"] for row in variables}
    assert fields["MOESERVING_POD_NAME"] == "metadata.name"
    assert fields["MOESERVING_POD_IP"] == "status.podIP"
    assert {row["containerPort"] for row in container(template)["ports"]} == {8000, 8080}, "the scheduler sees them"
    assert "dnsPolicy" not in pod("rdma", "gateway")["spec"]


def test_a_proxy_reaches_the_engine_as_it_is_written() -> None:
    config = json.loads(pod("proxied")["metadata"]["annotations"]["moeserving.dev/config"])
    assert config["engine"]["env"] == {"HTTPS_PROXY": "http://proxy.company.test:3128", "NO_PROXY": ".company.test"}
    assert "HTTPS_PROXY" not in str(pod("proxied", "gateway"))


def test_an_air_gapped_cluster_pulls_with_its_secret_and_asks_its_mirror() -> None:
    for name in ("mirrored", "offline"):
        for component in ("engine", "gateway"):
            assert pod(name, component)["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    config = json.loads(pod("mirrored")["metadata"]["annotations"]["moeserving.dev/config"])
    assert config["engine"]["env"]["HF_ENDPOINT"] == "https://hub.company.test"
    mounts = {row["mountPath"]: row["name"] for row in container(pod("mirrored"))["volumeMounts"]}
    assert mounts["/etc/company"] == "company-ca"
    assert ("PersistentVolumeClaim", "cache") in objects("mirrored")
    offline = json.loads(pod("offline")["metadata"]["annotations"]["moeserving.dev/config"])
    assert offline["engine"]["env"]["HF_HUB_OFFLINE"] == "1"


def test_on_spot_nodes_a_drain_fits_into_the_notice_and_gateways_stay_elsewhere() -> None:
    engine, gateway = pod("spot")["spec"], pod("spot", "gateway")["spec"]
    assert engine["terminationGracePeriodSeconds"] < 120
    assert engine["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "nodeSelector" not in gateway
    assert gateway["affinity"]["nodeAffinity"]


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_no_pod_of_any_recipe_has_variables_of_services(name: str) -> None:
    for component in ("engine", "gateway"):
        assert pod(name, component)["spec"]["enableServiceLinks"] is False

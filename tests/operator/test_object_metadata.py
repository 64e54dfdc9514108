"""Labels and annotations of generated objects, the gateway's Service, and who may reach the pods."""

from typing import Any

import pytest
from hypothesis import given, settings
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource, resource_document
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.names import COMPONENT, INSTANCE, MANAGED_BY, MANAGER, REVISION
from resource_strategies import documents

Document = dict[str, Any]


def serving(labels: dict[str, str] | None = None, **spec: Any) -> Document:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing"}
    metadata = {"name": "tiny"} | ({"labels": labels} if labels else {})
    return {**header, "metadata": metadata, "spec": {"model": {"uri": "hf://org/a"}, **spec}}


def plan(document: Document) -> ClusterPlan:
    observed = Observed(uid="u", tokens=("t",), has_service_monitors=True)
    return plan_cluster(parse_resource(document), "ns", observed, Defaults())


def rows(document: Document) -> dict[str, Document]:
    """The metadata of each object by `Kind/name`."""
    return {f"{row['kind']}/{row['metadata']['name']}": row["metadata"] for row in plan(document).objects}


def templates(document: Document) -> list[Document]:
    found = []
    for row in plan(document).objects:
        if row["kind"] == "Deployment":
            found.append(row["spec"]["template"])
        elif row["kind"] == "LeaderWorkerSet":
            found += [row["spec"]["leaderWorkerTemplate"][f"{role}Template"] for role in ("leader", "worker")]
    return found


def test_the_nearer_section_wins_and_the_operators_own_labels_always_do():
    found = rows(
        serving(
            {"team": "resource", "a": "resource", INSTANCE: "argo-application", MANAGED_BY: "Helm"},
            commonMetadata={"labels": {"team": "common", "b": "common"}, "annotations": {"note": "common"}},
            metrics={"labels": {"team": "metrics"}, "annotations": {"note": "metrics"}},
            gateway={"service": {"labels": {"team": "service"}, "annotations": {"lb": "internal"}}},
        )
    )
    assert {metadata["labels"][INSTANCE] for metadata in found.values()} == {"tiny"}
    assert {metadata["labels"][MANAGED_BY] for metadata in found.values()} == {MANAGER}
    own = {"ServiceMonitor/tiny-engine": "metrics", "PodMonitor/tiny-gateway": "metrics", "Service/tiny": "service"}
    for name, metadata in found.items():
        assert metadata["labels"]["team"] == own.get(name, "common"), name
        assert (metadata["labels"]["a"], metadata["labels"]["b"]) == ("resource", "common")
        assert metadata["annotations"]["note"] == ("metrics" if own.get(name) == "metrics" else "common")
    assert [name for name, metadata in found.items() if "lb" in metadata["annotations"]] == ["Service/tiny"]


@pytest.mark.parametrize(
    "key",
    [
        "argocd.argoproj.io/instance",
        "helm.sh/chart",
        "kustomize.toolkit.fluxcd.io/name",
        "moeserving.dev/revision",
        "kubernetes.io/service-name",
        "leaderworkerset.sigs.k8s.io/worker-index",
    ],
)
def test_marks_of_tools_and_labels_that_controllers_read_are_not_passed_on(key):
    for metadata in rows(serving({key: "x", "team": "a"})).values():
        assert metadata["labels"].get(key) != "x"
        assert metadata["labels"]["team"] == "a"


@pytest.mark.parametrize(("nodes", "kind"), [(1, "Deployment"), (2, "LeaderWorkerSet")])
def test_the_queue_of_kueue_is_on_the_engines_workload_alone(nodes, kind):
    shape = {"parallelism": {"tensor": 16, "nodes": nodes}}
    found = rows(serving({"kueue.x-k8s.io/queue-name": "serving"}, engine=shape))
    assert [name for name, row in found.items() if "kueue.x-k8s.io/queue-name" in row["labels"]] == [
        f"{kind}/tiny-engine"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"commonMetadata": {"labels": {"a": "b"}, "annotations": {"c": "d"}}},
        {"metrics": {"labels": {"a": "b"}}},
        {"gateway": {"service": {"annotations": {"a": "b"}, "labels": {"a": "b"}}}},
        {"networkPolicy": {"enabled": False}},
    ],
)
def test_no_pod_restarts_for_another_label(change):
    plain = templates(serving())
    assert templates(serving({"a": "b", "kueue.x-k8s.io/queue-name": "q"}, **change)) == plain


@settings(max_examples=60)
@given(documents())
def test_selectors_and_digests_are_the_same_whatever_labels_are_asked_for(document: Document) -> None:
    labelled = {
        **document,
        "metadata": document["metadata"] | {"labels": {"x": "y"}},
        "spec": document["spec"] | {"commonMetadata": {"labels": {"z": "w"}}},
    }
    parts = ("selector", "podSelector", "template")
    for old, new in zip(plan(document).objects, plan(labelled).objects, strict=True):
        assert [old.get("spec", {}).get(part) for part in parts] == [new.get("spec", {}).get(part) for part in parts]
        own = {key: value for key, value in old["metadata"]["labels"].items() if key in (COMPONENT, REVISION)}
        assert own.items() <= new["metadata"]["labels"].items()
        assert new["metadata"]["labels"]["z"] == "w"


@pytest.mark.parametrize(
    ("section", "error"),
    [
        (
            {"commonMetadata": {"labels": {"moeserving.dev/revision": "a"}}},
            "spec.commonMetadata.labels: 'moeserving.dev/revision' is not yours to set; reserved: moeserving.dev/*, ",
        ),
        (
            {"gateway": {"service": {"labels": {COMPONENT: "a"}}}},
            f"spec.gateway.service.labels: '{COMPONENT}' is not yours to set; reserved: ",
        ),
        (
            {"commonMetadata": {"annotations": {"moeserving.dev/config": "{}"}}},
            "spec.commonMetadata.annotations: 'moeserving.dev/config' is not yours to set; reserved: ",
        ),
        ({"metrics": {"labels": {"a b": "c"}}}, "spec.metrics.labels: a key is up to 63 letters"),
        ({"metrics": {"labels": {"a/b/c": "d"}}}, "spec.metrics.labels: a key is up to 63 letters"),
        ({"metrics": {"labels": {"a\n": "d"}}}, "spec.metrics.labels: a key is up to 63 letters"),
        ({"metrics": {"labels": {"x" * 64: "d"}}}, "spec.metrics.labels: a key is up to 63 letters"),
        ({"metrics": {"labels": {"a": "b c"}}}, "spec.metrics.labels.a: "),
        ({"metrics": {"labels": {"a": True}}}, "spec.metrics.labels.a: "),
        ({"metrics": {"lables": {}}}, "spec.metrics.lables: unknown field; nearest known: labels"),
        (
            {"gateway": {"service": {"loadBalancerClass": "a"}}},
            "spec.gateway.service.loadBalancerClass: a class needs the type LoadBalancer",
        ),
        ({"networkPolicy": {"allowFrom": [{}]}}, "spec.networkPolicy.allowFrom[0].podSelector: a podSelector, "),
        (
            {"networkPolicy": {"allowFrom": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}},
            "spec.networkPolicy.allowFrom[0].ipBlock.cidr: a range such as 10.0.0.0/8 or fd00::/8 is needed, got",
        ),
        (
            {"networkPolicy": {"allowFrom": [{"podSelektor": {}}]}},
            "spec.networkPolicy.allowFrom[0].podSelektor: unknown field; nearest known: podSelector",
        ),
    ],
)
def test_a_mistake_is_named_with_its_path(section, error):
    with pytest.raises(InvalidInput) as caught:
        parse_resource(serving(**section))
    assert any(str(row).startswith(error) for row in caught.value.errors), caught.value


def policies(**section: Any) -> dict[str, list[Document]]:
    """The ingress rules of engines and gateways."""
    planned = plan(serving(networkPolicy=section)).objects
    return {row["metadata"]["name"]: row["spec"]["ingress"] for row in planned if row["kind"] == "NetworkPolicy"}


def test_by_default_vllm_is_open_to_gateways_alone():
    engine, gateway = policies()["tiny-engine"], policies()["tiny-gateway"]
    gateways = {MANAGED_BY: MANAGER, INSTANCE: "tiny", COMPONENT: "gateway"}
    assert engine[0] == {
        "from": [{"podSelector": {"matchLabels": gateways}}],
        "ports": [{"port": "engine", "protocol": "TCP"}],
    }
    assert [rule["ports"][0]["port"] for rule in engine] == ["engine", "agent"]
    assert [rule["ports"][0]["port"] for rule in gateway] == ["http", "admin"]
    assert "from" not in gateway[0]


def test_network_policies_can_be_turned_off():
    assert policies(enabled=False) == {}


def test_further_peers_stand_as_they_were_written_and_add_to_what_was_open():
    peers = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}},
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
    ]
    for name, rules in policies(allowFrom=peers).items():
        assert rules == [*policies()[name], {"from": peers}]


def test_given_scrapers_take_the_place_of_prometheus():
    vmagent = {"podSelector": {"matchLabels": {"app": "vmagent"}}, "namespaceSelector": {}}
    for rules in policies(metricsFrom=[vmagent]).values():
        assert vmagent in rules[1]["from"]
        assert "prometheus" not in str(rules)
    for rules in policies(metricsFrom=[]).values():
        assert "prometheus" not in str(rules)


def test_a_tunnel_is_open_where_another_port_is():
    before, after = policies(), policies(meshPort=15008)
    tunnel = [{"port": 15008, "protocol": "TCP"}]
    assert after["tiny-engine"] == [*before["tiny-engine"], {"from": before["tiny-engine"][1]["from"], "ports": tunnel}]
    assert after["tiny-gateway"] == [*before["tiny-gateway"], {"ports": tunnel}]


@pytest.mark.parametrize(
    ("service", "wanted"),
    [
        ({}, {"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack"}),
        ({"type": "NodePort"}, {"type": "NodePort", "ipFamilyPolicy": "PreferDualStack"}),
        ({"type": "LoadBalancer"}, {"type": "LoadBalancer"}),
        ({"ipFamilyPolicy": "SingleStack"}, {"type": "ClusterIP", "ipFamilyPolicy": "SingleStack"}),
        (
            {"type": "LoadBalancer", "loadBalancerClass": "internal", "ipFamilyPolicy": "RequireDualStack"},
            {"type": "LoadBalancer", "loadBalancerClass": "internal", "ipFamilyPolicy": "RequireDualStack"},
        ),
    ],
)
def test_the_gateways_service_is_as_it_was_asked_for(service, wanted):
    (found,) = (row for row in plan(serving(gateway={"service": service})).objects if row["metadata"]["name"] == "tiny")
    assert {key: value for key, value in found["spec"].items() if key not in ("selector", "ports")} == wanted


def test_what_was_written_is_read_back_equal():
    peers = [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]
    document = serving(networkPolicy={"allowFrom": peers, "metricsFrom": []}, commonMetadata={"labels": {"a": "b"}})
    assert resource_document(parse_resource(document)) == document


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ({}, None),
        ({"hostNetwork": False}, None),
        ({"hostNetwork": True}, "ClusterFirstWithHostNet"),
        ({"hostNetwork": True, "dnsPolicy": "Default"}, "Default"),
    ],
)
def test_a_pod_on_the_hosts_network_asks_the_clusters_dns_unless_it_says_otherwise(spec, policy):
    for nodes in (1, 2):
        document = serving(
            engine={"parallelism": {"tensor": 16, "nodes": nodes}, "podTemplate": {"spec": spec}},
            gateway={"podTemplate": {"spec": spec}},
        )
        assert {template["spec"].get("dnsPolicy") for template in templates(document)} == {policy}


def test_a_template_may_set_what_the_operator_sets_by_default():
    variables = [{"name": "HF_HOME", "value": "/opt/hf"}, {"name": "HOME", "value": "/root"}]
    patch = {
        "enableServiceLinks": True,
        "containers": [{"name": "engine", "env": variables, "volumeMounts": [{"name": "mine", "mountPath": "/tmp"}]}],
        "volumes": [{"name": "mine", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    engine, _ = templates(serving(engine={"podTemplate": {"spec": patch}}))
    (found,) = engine["spec"]["containers"]
    assert {row["name"]: row.get("value") for row in found["env"]}.items() >= {
        "HF_HOME": "/opt/hf",
        "HOME": "/root",
    }.items()
    assert engine["spec"]["enableServiceLinks"] is True
    assert {row["mountPath"]: row["name"] for row in found["volumeMounts"]}["/tmp"] == "mine"

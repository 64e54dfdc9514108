"""Objects of others stay, objects of the resource come back, and strangers of a name are reported and not touched."""

from datetime import timedelta
from typing import Any

import pytest
from cluster_api import ApiCluster
from fresh_operator import change, fetch, fetch_children, fetch_conditions, fetch_serving, served, started, writes
from moe_operator.kubernetes import waits
from moe_operator.kubernetes.kinds import CONFIG_MAP, DEPLOYMENT, SERVING, Kind
from moe_operator.kubernetes.reconciler import REFUSED_S
from moe_operator.kubernetes.store import Key
from serving_documents import serving

Document = dict[str, Any]
SERVICE = Kind("", "v1", "Service", "services")
ROLE_BINDING = Kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings")
NETWORK_POLICY = Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
EXTERNAL = {"mode": "external", "minReplicas": 1, "maxReplicas": 9}


def kubectl_patch(cluster: ApiCluster, key: Key, place: str, patch: str, kind: str = "strategic") -> None:
    cluster.kubectl("patch", "-n", key.namespace, place, "--type", kind, "-p", patch, "--field-manager=someone")


async def test_what_others_add_to_a_child_stays_through_updates(serving_cluster: ApiCluster, namespace: str) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        sidecar = '{"spec":{"template":{"spec":{"containers":[{"name":"mesh","image":"mesh:1"}]}}}}'
        kubectl_patch(serving_cluster, key, "deployment/tiny-engine", sidecar)
        kubectl_patch(
            serving_cluster, key, "deployment/tiny-engine", '{"metadata":{"annotations":{"team.test/a":"1"}}}'
        )
        kubectl_patch(serving_cluster, key, "configmap/tiny-settings", '{"data":{"mine":"1"}}')
        await operator.relist()
        before = writes(operator.api)
        await operator.settle(key)
        assert writes(operator.api) == before
        await change(operator, key, engine={"args": ["--seed=2"]})
        found = await fetch(operator, DEPLOYMENT, key, "tiny-engine")
        assert {row["name"] for row in found["spec"]["template"]["spec"]["containers"]} == {"engine", "mesh"}
        assert found["metadata"]["annotations"]["team.test/a"] == "1"
        assert (await fetch(operator, CONFIG_MAP, key, "tiny-settings"))["data"]["mine"] == "1"


@pytest.mark.parametrize(
    ("kind", "name", "place", "patch", "read"),
    [
        (
            DEPLOYMENT, "tiny-engine", "deployment/tiny-engine",
            '[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"evil:1"}]',
            lambda found: found["spec"]["template"]["spec"]["containers"][0]["image"],
        ),
        (
            SERVICE, "tiny-engine", "service/tiny-engine",
            '[{"op":"add","path":"/spec/selector/mine","value":"1"}]',
            lambda found: found["spec"]["selector"],
        ),
        (
            ROLE_BINDING, "tiny-gateway", "rolebinding/tiny-gateway",
            '[{"op":"add","path":"/subjects/-","value":{"kind":"ServiceAccount","name":"evil"}}]',
            lambda found: [row["name"] for row in found["subjects"]],
        ),
        (
            NETWORK_POLICY, "tiny-engine", "networkpolicy/tiny-engine",
            '[{"op":"add","path":"/spec/ingress/0/ports/-","value":{"port":22,"protocol":"TCP"}}]',
            lambda found: found["spec"]["ingress"][0]["ports"],
        ),
        (
            CONFIG_MAP, "tiny-settings", "configmap/tiny-settings",
            '[{"op":"replace","path":"/data/request.json","value":"{}"}]',
            lambda found: found["data"]["request.json"],
        ),
    ],
    ids=["image", "selector", "subjects", "ports", "settings"],
)  # fmt: skip
async def test_a_field_of_ours_that_is_edited_is_put_back(
    serving_cluster: ApiCluster, namespace: str, kind: Kind, name: str, place: str, patch: str, read: Any
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        before = read(await fetch(operator, kind, key, name))
        kubectl_patch(serving_cluster, key, place, patch, "json")
        assert read(await fetch(operator, kind, key, name)) != before
        await operator.relist()
        await operator.settle(key)
        assert read(await fetch(operator, kind, key, name)) == before


async def test_a_child_that_is_deleted_comes_back(serving_cluster: ApiCluster, namespace: str) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        before = set(await fetch_children(operator.api, namespace))
        names = [f"{kind}/{name}" for kind, name in before]
        serving_cluster.kubectl("delete", "-n", namespace, *names)
        await operator.relist()
        await operator.settle(key)
        assert set(await fetch_children(operator.api, namespace)) == before


async def test_a_child_whose_deletion_is_held_keeps_back_no_other(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finalizer of a load balancer's controller, say, that does not run any more."""
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        held = {"metadata": {"finalizers": ["cloud.example/cleanup"]}}
        await operator.api.server.merge(SERVICE, namespace, "tiny", held, "cloud")
        await operator.api.delete(SERVICE, {"metadata": {"name": "tiny", "namespace": namespace}})
        await change(operator, key, engine={"args": ["--seed=1"]}, disruption={"maxUnavailable": "2"})
        engines = await fetch(operator, DEPLOYMENT, key, "tiny-engine")
        assert "--seed=1" in str(engines["spec"]["template"]["metadata"]["annotations"])
        budget = (await fetch_children(operator.api, namespace))["PodDisruptionBudget", "tiny-engine"]
        assert budget["spec"]["maxUnavailable"] == 2
        found = await fetch_conditions(operator, key)
        assert "waits for Service tiny (held by cloud.example/cleanup)" in found["Progressing"]["message"]
        assert found["Degraded"]["status"] == "False", "it has its time"
        monkeypatch.setattr(waits, "HELD", timedelta())
        await operator.settle(key)
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert (degraded["status"], degraded["reason"]) == ("True", "Refused")
        assert degraded["message"] == (
            f"Service {namespace}/tiny is being deleted, which cloud.example/cleanup holds; once it is gone it is made "
            "anew"
        )
        await operator.api.server.merge(SERVICE, namespace, "tiny", {"metadata": {"finalizers": None}}, "cloud")
        await operator.relist()
        await operator.settle(key)
        assert "deletionTimestamp" not in (await fetch(operator, SERVICE, key, "tiny"))["metadata"]
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


@pytest.mark.parametrize("labels", [{}, {"app.kubernetes.io/managed-by": "moeserving"}, "ours"], ids=str)
async def test_a_stranger_with_the_name_of_a_child_is_reported_and_not_touched(
    serving_cluster: ApiCluster, namespace: str, labels: Any
) -> None:
    if labels == "ours":
        labels = {"app.kubernetes.io/managed-by": "moeserving", "app.kubernetes.io/instance": "tiny"}
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        metadata = {"name": "tiny-settings", "namespace": namespace, "labels": labels}
        stranger = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"a": "precious"}}
        made = await operator.api.create(CONFIG_MAP, stranger)
        await operator.relist()
        key = await served(operator, namespace)
        message = f"ConfigMap {namespace}/tiny-settings exists and is not this resource's own"
        assert (await fetch_conditions(operator, key))["Degraded"]["message"] == message
        assert (await fetch(operator, CONFIG_MAP, key, "tiny-settings")) == made
        children = await fetch_children(operator.api, namespace)
        assert set(children) <= {("ConfigMap", "tiny-settings")}, "nothing is made in part"
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        await operator.relist()
        await operator.settle(key)
        assert await fetch_serving(operator.api, key) is None
        assert (await fetch(operator, CONFIG_MAP, key, "tiny-settings")) == made


async def test_of_two_resources_whose_services_would_be_one_the_second_is_refused(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        first = await served(operator, namespace, serving("tiny-engine"))
        second = await served(operator, namespace, serving("tiny"))
        assert (await fetch_conditions(operator, first))["Degraded"]["status"] == "False"
        message = f"Service {namespace}/tiny-engine exists and is not this resource's own"
        assert (await fetch_conditions(operator, second))["Degraded"]["message"] == message


async def test_an_autoscaler_on_the_deployment_keeps_its_number_in_the_external_mode(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(autoscaling=EXTERNAL))
        serving_cluster.kubectl("scale", "-n", namespace, "deployment/tiny-engine", "--replicas=7")
        await operator.relist()
        await operator.settle(key)
        await change(operator, key, engine={"args": ["--seed=2"]})
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 7


async def test_the_scale_subresource_sets_the_engines(serving_cluster: ApiCluster, namespace: str) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(autoscaling=EXTERNAL))
        serving_cluster.kubectl("scale", "-n", namespace, "moeserving/tiny", "--replicas=5")
        await operator.relist()
        await operator.settle(key)
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 5
        scale = serving_cluster.get(f"/apis/moeserving.dev/v1alpha1/namespaces/{namespace}/moeservings/tiny/scale")
        assert '"selector":"app.kubernetes.io/managed-by=moeserving,app.kubernetes.io/instance=tiny' in scale


async def test_what_a_quota_refuses_is_reported_and_tried_again_until_it_allows_it(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    serving_cluster.kubectl("create", "quota", "none", "-n", namespace, "--hard=services=1")
    # No controller counts here.
    counted = '{"status":{"hard":{"services":"1"},"used":{"services":"0"}}}'
    serving_cluster.kubectl(
        "patch", "quota/none", "-n", namespace, "--subresource=status", "--type=merge", "-p", counted
    )
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        document = serving()
        place = document["metadata"] | {"namespace": namespace}
        operator.store.put(SERVING, await operator.api.create(SERVING, document | {"metadata": place}))
        key = Key(namespace, "tiny")
        assert await operator.reconciler.reconcile(key) == REFUSED_S
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "Refused"
        assert f"Service {namespace}/tiny" in degraded["message"]
        assert "exceeded quota: none" in degraded["message"]
        serving_cluster.kubectl("delete", "quota/none", "-n", namespace)
        await operator.reconciler.reconcile(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"

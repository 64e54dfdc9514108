"""What goes wrong around a resource stands in its conditions and in one line of kubectl, and disappears when it ends.

Against the real controllers of Deployments, quotas, claims and EndpointSlices and the real scheduler. What a kubelet
writes, which is not here, is written as it does: `FailedMount` and the status of pods.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from fresh_operator import FreshOperator, change, fetch_conditions, fetch_serving, started
from managed_cluster import make_ready, managed_cluster, pods_of, says, set_status, start_controllers, until
from moe_operator.kubernetes import scaler_problems
from moe_operator.kubernetes.conditions import read_conditions
from moe_operator.kubernetes.event_recorder import EventRecorder
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key
from operator_process import eventually
from serving_documents import serving

pytestmark = pytest.mark.timeout(600)
Document = dict[str, Any]
CPU = {"runtime": "vllm-cpu", "resources": {"cpu": "1", "memory": "1Gi"}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiCluster]:
    with managed_cluster(tmp_path_factory.mktemp("managed-cluster") / "state") as cluster:
        yield cluster


@pytest.fixture
def place(cluster: ApiCluster) -> str:
    """A namespace of this test's own."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    cluster.kubectl("create", "namespace", name)
    return name


async def begin(operator: FreshOperator, place: str, **sections: Any) -> Key:
    document = serving(**sections)
    made = await operator.api.create(SERVING, document | {"metadata": {"name": "tiny", "namespace": place}})
    operator.store.put(SERVING, made)
    return Key(place, "tiny")


def line(cluster: ApiCluster, place: str) -> str:
    """What `kubectl get moes` shows of the resource."""
    return cluster.kubectl("get", "moes", "tiny", "-n", place, "--no-headers")


def is_ready(cluster: ApiCluster, place: str) -> bool:
    """Whether `kubectl wait` calls the resource ready within a second."""
    try:
        cluster.kubectl("wait", "-n", place, "--for=condition=Ready", "moes/tiny", "--timeout=1s")
    except ClusterProblem:
        return False
    return True


async def test_a_quota_is_reported_and_no_more_once_it_is_raised(cluster: ApiCluster, place: str) -> None:
    cluster.kubectl("create", "quota", "none", "--hard=pods=0", "-n", place)
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place)
        await until(operator, key, says("Degraded", "True", "FailedCreate", "exceeded quota: none"), "the quota")
        await until(operator, key, says("Ready", "False", "FailedCreate", "exceeded quota: none"), "why nobody serves")
        shown = line(cluster, place)
        assert "FailedCreate: pods may not be made; see quotas" in shown
        assert "exceeded quota: none" in shown
        described = cluster.kubectl("describe", "moes", "tiny", "-n", place)
        assert "Warning" in described
        assert "exceeded quota: none" in described
        assert not is_ready(cluster, place)
        cluster.kubectl("delete", "quota", "none", "-n", place)
        gpus = "no node has nvidia.com/gpu: 1 free"
        await until(operator, key, says("Degraded", "True", "Unschedulable", gpus), "the real scheduler's words")
        assert "FailedCreate" not in (await fetch_conditions(operator, key))["Degraded"]["message"]


async def test_a_replica_set_that_may_not_be_made_is_reported(cluster: ApiCluster, place: str) -> None:
    """The controller of Deployments says so in another condition than that of pods."""
    cluster.kubectl("create", "quota", "none", "--hard=count/replicasets.apps=0", "-n", place)
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place)
        await until(operator, key, says("Degraded", "True", "FailedCreate", "exceeded quota: none"), "the quota")
        assert "FailedCreate: pods may not be made" in line(cluster, place)
        cluster.kubectl("delete", "quota", "none", "-n", place)
        await until(operator, key, says("Degraded", "True", "Unschedulable"), "the pods are made")


async def test_pods_that_may_not_be_deleted_are_reported(cluster: ApiCluster, place: str) -> None:
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU | {"replicas": 2})
        await until(operator, key, lambda _: len(pods_of(cluster, place, "engine")) == 2, "two pods of engines")
        with keeping_pods(cluster, place):
            await operator.api.merge(SERVING, *key, {"spec": {"engine": {"replicas": 1}}})
            await until(operator, key, says("Degraded", "True", "FailedDelete", "nothing is deleted"), "the policy")
            assert len(pods_of(cluster, place, "engine")) == 2
        await until(operator, key, says("Degraded", "False", "AsExpected"), "it is deleted")


@contextlib.contextmanager
def keeping_pods(cluster: ApiCluster, place: str) -> Iterator[None]:
    """An admission policy by which no pod of a namespace is deleted."""
    name, group = f"keep-{place}", "admissionregistration.k8s.io/v1"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["DELETE"], "resources": ["pods"]}
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": place}}
    policy: Document = {
        "matchConstraints": {"resourceRules": [rule], "namespaceSelector": namespace},
        "validations": [{"expression": "false", "message": "nothing is deleted"}],
    }
    binding = {"policyName": name, "validationActions": ["Deny"]}
    for kind, spec in (("ValidatingAdmissionPolicy", policy), ("ValidatingAdmissionPolicyBinding", binding)):
        body = {"apiVersion": group, "kind": kind, "metadata": {"name": name}, "spec": spec}
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(body))
    try:
        eventually(lambda: _is_kept(cluster, place), "the policy holds")
        yield
    finally:
        cluster.kubectl("delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", name)


def _is_kept(cluster: ApiCluster, place: str) -> bool:
    name = pods_of(cluster, place, "engine")[0]["metadata"]["name"]
    try:
        cluster.kubectl("delete", "pod", name, "-n", place, "--dry-run=server")
    except ClusterProblem:
        return True
    return False


async def test_gateways_that_their_autoscaler_cannot_scale_are_reported(
    cluster: ApiCluster, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no metrics server, which the real controller says in its own condition alone."""
    monkeypatch.setattr(scaler_problems, "INACTIVE_FOR", timedelta())
    scaling = {"autoscaling": {"minReplicas": 1, "maxReplicas": 3}}
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU, gateway=scaling)
        words = "HorizontalPodAutoscaler tiny-gateway: FailedGetResourceMetric"
        await until(operator, key, says("Degraded", "True", "GatewaysNotScaled", words), "no metrics")
        await operator.api.merge(SERVING, *key, {"spec": {"gateway": {"autoscaling": None}}})
        await until(operator, key, says("Degraded", "False", "AsExpected"), "without an autoscaler")


async def test_pod_security_is_reported_of_the_engines_and_the_gateways_run(cluster: ApiCluster, place: str) -> None:
    cluster.kubectl("label", "namespace", place, "pod-security.kubernetes.io/enforce=restricted")
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place)
        await until(operator, key, says("Degraded", "True", "FailedCreate", "violates PodSecurity"), "the standard")
        make_ready(cluster, place, "gateway")
        await until(operator, key, says("Ready", "False", "FailedCreate", "Deployment tiny-engine"), "of the engines")
        assert pods_of(cluster, place, "engine") == []


async def test_a_pod_that_kueue_holds_back_is_a_wait_and_no_fault(cluster: ApiCluster, place: str) -> None:
    gates = {"spec": {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]}}
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU | {"podTemplate": gates})
        await until(operator, key, says("Progressing", "True", "SchedulingGated", "kueue.x-k8s.io/admission"), "a wait")
        make_ready(cluster, place, "gateway")
        await until(operator, key, says("Ready", "False", "SchedulingGated"), "not ready, for that")
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
        assert "SchedulingGated: pod tiny-engine-" in line(cluster, place)


async def test_a_claim_for_which_no_volume_is_made_is_reported(cluster: ApiCluster, place: str) -> None:
    cache = {"path": "/cache", "size": "1Gi", "storageClass": "absent"}
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, model={"uri": "hf://org/tiny", "cache": cache}, engine=CPU)
        words = "also: VolumeNotProvisioned"
        await until(operator, key, says("Degraded", "True", "Unschedulable", words), "the claim's own event")


def as_kubelet(pod: Document, reason: str, message: str) -> Document:
    metadata = pod["metadata"]
    about = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "namespace": metadata["namespace"]}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": about | {"uid": metadata["uid"]},
        "reason": reason,
        "message": message,
        "type": "Warning",
        "source": {"component": "kubelet", "host": "node1"},
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "count": 3,
    }


async def test_a_volume_that_cannot_be_mounted_is_reported_from_the_kubelets_events(
    cluster: ApiCluster, place: str
) -> None:
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU)
        await until(operator, key, lambda _: pods_of(cluster, place, "engine"), "an engine's pod")
        (pod,) = pods_of(cluster, place, "engine")
        make_ready(cluster, place, "gateway")
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        creating = {"name": "engine", "state": {"waiting": {"reason": "ContainerCreating"}}, "ready": False}
        row = creating | {"image": "x", "imageID": "", "restartCount": 0}
        set_status(cluster, pod, {"conditions": [scheduled], "containerStatuses": [row]})
        words = 'MountVolume.SetUp failed for volume "mine" : secret "mine" not found'
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(as_kubelet(pod, "FailedMount", words)))
        await until(
            operator, key, says("Degraded", "True", "FailedMount", "make the Secret mine"), "the missing Secret"
        )
        make_ready(cluster, place, "engine")
        await until(operator, key, says("Degraded", "False", "AsExpected"), "it runs")


async def test_kubectl_wait_returns_when_clients_are_served_and_not_before(cluster: ApiCluster, place: str) -> None:
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU)
        assert not is_ready(cluster, place), "no status at all yet"
        await until(operator, key, says("Ready", "False", "NoGateway"), "nobody is there")
        make_ready(cluster, place, "engine")
        await until(operator, key, says("Ready", "False", "NoGateway"), "engines alone serve nobody")
        assert not is_ready(cluster, place)

        cluster.processes.stop("kube-controller-manager")
        make_ready(cluster, place, "gateway")
        await until(operator, key, says("Ready", "False", "NoEndpoint"), "a ready pod is not yet an endpoint")
        assert not is_ready(cluster, place)
        start_controllers(cluster)
        await until(operator, key, says("Ready", "True", "Serving"), "the Service has its endpoint")
        assert is_ready(cluster, place)

        await operator.api.merge(SERVING, *key, {"spec": {"engine": {"args": ["--seed=2"]}}})
        assert not is_ready(cluster, place), "what is known is of the generation before"
        await operator.relist()
        await operator.reconciler.reconcile(key)
        assert is_ready(cluster, place), "the old engines serve, and that is of this generation"
        live = await fetch_serving(operator.api, key) or {}
        generation = live["metadata"]["generation"]
        assert live["status"]["observedGeneration"] == generation == 2
        assert {row["observedGeneration"] for row in live["status"]["conditions"]} == {generation}


async def test_a_change_that_comes_again_raises_the_count_of_its_event(cluster: ApiCluster, place: str) -> None:
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU)
        await until(operator, key, says("Ready", "False", "NoGateway"), "a condition")
        make_ready(cluster, place, "engine")
        make_ready(cluster, place, "gateway")
        await until(operator, key, says("Ready", "True", "Serving"), "ready")
        live = await fetch_serving(operator.api, key) or {}
        recorder = EventRecorder(operator.api)
        for _ in range(3):
            await recorder.record(live, read_conditions(live)["Ready"])
        rows = json.loads(cluster.kubectl("get", "events", "-n", place, "-o", "json"))["items"]
        (serving_event,) = [row for row in rows if row["reason"] == "Serving"]
        assert serving_event["count"] == 4
        assert "(x4 over" in cluster.kubectl("describe", "moes", "tiny", "-n", place)


async def test_a_resource_that_is_well_is_not_asked_for_events_or_endpoints(cluster: ApiCluster, place: str) -> None:
    async with started(cluster.kubeconfig, place) as operator:
        key = await begin(operator, place, engine=CPU)
        await until(operator, key, says("Ready", "False", "NoGateway"), "a condition")
        make_ready(cluster, place, "engine")
        make_ready(cluster, place, "gateway")
        await until(operator, key, says("Ready", "True", "Serving"), "ready")
        await change(operator, key)
        before = dict(operator.api.calls)
        for _ in range(5):
            await operator.reconciler.reconcile(key)
        assert dict(operator.api.calls) == before

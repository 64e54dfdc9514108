"""Kinds that a cluster may lack: LeaderWorkerSets, monitors of Prometheus, InferencePools; and an older CRD of ours.

The CRDs of others are in `foreign_kinds`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_api import ApiCluster
from foreign_kinds import INFERENCE_POOLS, LEADER_WORKER_SETS, PROMETHEUS, installed
from fresh_operator import conditions, fetch_children, fetch_conditions, fetch_serving, served, started, writes
from moe_operator.cli.command import app
from moe_operator.kubernetes.kinds import INFERENCE_POOL, LEADER_WORKER_SET, SERVING
from moe_operator.kubernetes.store import Key
from moe_operator.plan.names import LWS_WORKER_INDEX
from operator_process import OperatorProcess, eventually
from serving_documents import CRD, serving
from stand_in_peers import peers_listening
from typer.testing import CliRunner

Document = dict[str, Any]
TWO_NODES = {"parallelism": {"data": 16, "nodes": 2, "expert": True}}


async def test_several_nodes_without_leader_worker_sets_are_reported_with_what_to_do(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine=TWO_NODES))
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert (degraded["status"], degraded["reason"]) == ("True", "LeaderWorkerSetMissing")
        assert degraded["message"] == (
            "the cluster has no LeaderWorkerSet, which engines on several nodes need; install it (lws.sigs.k8s.io) "
            "or set spec.engine.parallelism.nodes to 1"
        )
        await operator.api.merge(SERVING, *key, {"spec": {"engine": {"parallelism": {"nodes": 1}}}})
        await operator.relist()
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


async def test_several_nodes_are_a_leader_worker_set_and_a_replica_is_its_leader(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    with installed(serving_cluster, LEADER_WORKER_SETS):
        async with started(serving_cluster.kubeconfig, namespace) as operator, peers_listening() as peers:
            key = await served(operator, namespace, serving(engine=TWO_NODES | {"replicas": 1}))
            assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
            live = await operator.api.get(LEADER_WORKER_SET, namespace, "tiny-engine")
            assert live is not None
            spec = live["spec"]["leaderWorkerTemplate"]
            assert (spec["size"], spec["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
            leader, worker = spec["leaderTemplate"], spec["workerTemplate"]
            assert leader["spec"]["containers"] == worker["spec"]["containers"]
            for index in range(2):
                await peers.make(
                    operator.api, key, "engine", f"tiny-engine-0-{index}", **{LWS_WORKER_INDEX: str(index)}
                )
            await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
            # As its controller reports one group of one as up to date.
            status = {"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "conditions": [{"type": "Available"}]}
            await operator.api.server.merge(
                LEADER_WORKER_SET, namespace, "tiny-engine", {"status": status}, "lws", subresource="status"
            )
            await operator.relist()
            await operator.settle(key)
            serving_status = (await fetch_serving(operator.api, key) or {})["status"]
            assert [row["name"] for row in serving_status["engines"]] == ["tiny-engine-0-0"]
            assert (serving_status["replicas"], serving_status["readyReplicas"]) == (1, 1)
            assert "tiny-engine" not in (await fetch_conditions(operator, key))["Progressing"]["message"]
            before = writes(operator.api)
            await operator.settle(key)
            assert writes(operator.api) == before


async def test_from_several_nodes_to_one_and_back_the_other_workload_goes(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    with installed(serving_cluster, LEADER_WORKER_SETS):
        async with started(serving_cluster.kubeconfig, namespace) as operator:
            key = await served(operator, namespace, serving(engine=TWO_NODES))
            for nodes, wanted in ((1, "Deployment"), (2, "LeaderWorkerSet")):
                await operator.api.merge(SERVING, *key, {"spec": {"engine": {"parallelism": {"nodes": nodes}}}})
                await operator.relist()
                await operator.settle(key)
                found = await fetch_children(operator.api, namespace)
                assert [
                    kind for kind, name in found if name == "tiny-engine" and kind in ("Deployment", "LeaderWorkerSet")
                ] == [wanted]


async def test_monitors_are_made_where_their_kinds_are_known_and_only_when_wanted(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    with installed(serving_cluster, *PROMETHEUS):
        async with started(serving_cluster.kubeconfig, namespace) as operator:
            key = await served(operator, namespace, serving())
            found = await fetch_children(operator.api, namespace)
            assert {("ServiceMonitor", "tiny-engine"), ("PodMonitor", "tiny-gateway")} <= set(found)
            await operator.api.merge(SERVING, *key, {"spec": {"metrics": {"serviceMonitor": False}}})
            await operator.relist()
            await operator.settle(key)
            left = {kind for kind, _ in await fetch_children(operator.api, namespace)}
            assert not {"ServiceMonitor", "PodMonitor"} & left


async def test_a_pool_without_its_kind_is_reported_and_all_else_is_made(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(gateway={"inferencePool": {}}))
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert (degraded["status"], degraded["reason"]) == ("True", "InferencePoolMissing")
        assert degraded["message"] == (
            "the cluster has no InferencePool, or the operator no right to read it; install the Gateway API Inference "
            "Extension (gateway-api-inference-extension.sigs.k8s.io) or take spec.gateway.inferencePool away"
        )
        found = set(await fetch_children(operator.api, namespace))
        assert {("Deployment", "tiny-gateway"), ("Deployment", "tiny-engine"), ("Service", "tiny-picker")} <= found
        await operator.api.merge(SERVING, *key, {"spec": {"gateway": {"inferencePool": None}}})
        await operator.relist()
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
        assert ("Service", "tiny-picker") not in await fetch_children(operator.api, namespace)


async def test_a_pool_is_made_stays_as_it_is_and_goes(serving_cluster: ApiCluster, namespace: str) -> None:
    with installed(serving_cluster, INFERENCE_POOLS):
        async with started(serving_cluster.kubeconfig, namespace) as operator:
            key = await served(operator, namespace, serving(gateway={"inferencePool": {"failureMode": "FailOpen"}}))
            assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
            live = await operator.api.get(INFERENCE_POOL, namespace, "tiny")
            assert live is not None
            assert live["spec"]["endpointPickerRef"] == {
                "group": "",
                "kind": "Service",
                "name": "tiny-picker",
                "port": {"number": 9002},
                "failureMode": "FailOpen",
            }
            before = writes(operator.api)
            await operator.settle(key)
            assert writes(operator.api) == before
            await operator.api.merge(SERVING, *key, {"spec": {"gateway": {"inferencePool": None}}})
            await operator.relist()
            await operator.settle(key)
            assert await operator.api.get(INFERENCE_POOL, namespace, "tiny") is None


def test_a_kind_that_is_installed_later_is_noticed_by_an_operator_that_runs(
    serving_cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    serving_cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(serving()))
    operator = OperatorProcess(
        serving_cluster.kubeconfig, tmp_path / "log", "--namespace", namespace, "--resync", "2", own_namespace=namespace
    )
    try:
        status = '--for=jsonpath={.status.conditions[?(@.type=="Degraded")].status}=False'
        serving_cluster.kubectl("wait", "-n", namespace, "moes/tiny", status, "--timeout=60s")
        with installed(serving_cluster, *PROMETHEUS):
            eventually(
                lambda: serving_cluster.kubectl("get", "servicemonitors,podmonitors", "-n", namespace, "-o", "name"),
                "monitors",
            )
    finally:
        operator.stop()


def older(document: Document) -> Document:
    """The CRD as an older version had it: without some sections, and with one that is gone since."""
    made = json.loads(json.dumps(document))
    spec = made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    for name in ("disruption", "metrics"):
        del spec[name]
    del spec["gateway"]["properties"]["hold"], spec["gateway"]["default"]
    spec["gateway"]["properties"]["oldTimeout"] = {"type": "string", "default": "1m"}
    spec["engine"]["properties"]["replicas"] |= {"maximum": 100_000}
    return made


@pytest.mark.parametrize("replicas", [3, 3000])
async def test_what_was_stored_under_an_older_crd_goes_on_under_the_newer_one(
    serving_cluster: ApiCluster, namespace: str, replicas: int
) -> None:
    newer = yaml.safe_load(CRD.read_text("utf-8"))
    apply = ("apply", "--server-side", "--force-conflicts", "-f", "-")
    try:
        serving_cluster.kubectl(*apply, stdin=json.dumps(older(newer)))
        document = serving(engine={"replicas": replicas}, gateway={"oldTimeout": "5m"})
        wanted = ("--validate=false", "-n", namespace, "-f", "-")
        eventually(lambda: "oldTimeout" in crd_fields(serving_cluster), "the older schema is in force")
        serving_cluster.kubectl("create", *wanted, stdin=json.dumps(document))
    finally:
        serving_cluster.kubectl(*apply, stdin=json.dumps(newer))
    eventually(lambda: "oldTimeout" not in crd_fields(serving_cluster), "the newer schema is in force")
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = Key(namespace, "tiny")
        await operator.settle(key)
        live = await fetch_serving(operator.api, key) or {}
        assert "oldTimeout" not in live["spec"]["gateway"]
        degraded = conditions(live)["Degraded"]
        if replicas == 3:
            assert degraded["status"] == "False"
            assert len(await fetch_children(operator.api, namespace)) == 14
        else:
            assert degraded["reason"] == "InvalidSpec"
            assert "spec.engine.replicas" in degraded["message"]
            assert await fetch_children(operator.api, namespace) == {}
        before = writes(operator.api)
        await operator.settle(key)
        assert writes(operator.api) == before
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        await operator.relist()
        await operator.settle(key)
        assert await fetch_serving(operator.api, key) is None


def crd_fields(cluster: ApiCluster) -> str:
    """What the API server says that the resource has: published once a schema is in force."""
    return cluster.get("/openapi/v3/apis/moeserving.dev/v1alpha1")


def test_what_the_command_plans_for_every_sample_the_api_server_takes_in_that_order(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    samples = sorted((CRD.parents[1] / "manifests").glob("*.yaml"))
    assert len(samples) >= 6
    with installed(serving_cluster, LEADER_WORKER_SETS):
        for sample in samples:
            planned = CliRunner().invoke(app, ["plan", "-f", str(sample), "--namespace", namespace])
            assert planned.exit_code == 0, planned.output
            # A field that is unknown would be dropped without a word.
            done = serving_cluster.kubectl("apply", "--validate=strict", "-f", "-", stdin=planned.stdout)
            assert len(done.splitlines()) == planned.stdout.count("\nkind: "), sample.name

"""Replicas over several nodes, against a stand-in for the LeaderWorkerSet controller v0.10 on a real API server."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from foreign_kinds import LEADER_WORKER_SETS, installed
from fresh_operator import conditions, fetch, fetch_serving, served, started, writes
from group_controller import SERVICE, resolve
from group_world import ROUNDS, SET, TWO_NODES, World, is_complete, world
from moe_operator.kubernetes.kinds import CONFIG_MAP, DEPLOYMENT, LEADER_WORKER_SET, POD, SERVING
from moe_operator.kubernetes.serving import ENDPOINT_SLICE
from operator_process import eventually
from serving_documents import serving
from stand_in_peers import endpoint_slice

Document = dict[str, Any]


async def test_leader_and_worker_find_each_other_and_the_replica_serves(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made:
        status = await made.status()
        assert (status["replicas"], status["readyReplicas"], status["desiredReplicas"]) == (2, 2, 2)
        assert [row["name"] for row in status["engines"]] == ["tiny-engine-0", "tiny-engine-1"]
        assert await made.serving_pods() == ["tiny-engine-0", "tiny-engine-1"], "leaders alone get requests"
        pods = await made.namespace.pods()
        for index in range(2):
            name = f"tiny-engine-{index}.tiny-engine-{index}.{namespace}"
            assert await resolve(made.namespace, name) == pods[f"tiny-engine-{index}"]["status"]["podIP"]
        before = writes(made.operator.api)
        await made.rounds(3)
        assert writes(made.operator.api) == before, "nothing is written when nothing changed"


async def test_in_the_service_that_all_groups_share_a_leader_would_not_be_found(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    """What stood before: the set as it was made then, and its way to a set that starts."""
    with installed(serving_cluster, LEADER_WORKER_SETS):
        async with started(serving_cluster.kubeconfig, namespace) as operator:
            made = World(operator, namespace)
            await served(operator, namespace, serving(engine=TWO_NODES))
            shared = {"spec": {"networkConfig": {"subdomainPolicy": "Shared"}}}
            await operator.api.server.merge(LEADER_WORKER_SET, namespace, SET, shared, "older")
            for _ in range(5):
                await made.others()
            assert await resolve(made.namespace, f"tiny-engine-0.tiny-engine.{namespace}") is None
            assert await made.serving_pods() == []
            # The operator of today takes over: the set is put right, and so are its groups.
            await operator.api.create(ENDPOINT_SLICE, endpoint_slice(made.key, "tiny-gateway-0", "tiny"))
            await made.until(is_complete, "it serves")
            assert await made.serving_pods() == ["tiny-engine-0"]


@pytest.mark.parametrize("nodes", [1, 2])
async def test_an_autoscaler_counts_engines_alone(serving_cluster: ApiCluster, namespace: str, nodes: int) -> None:
    """A HorizontalPodAutoscaler with a metric of pods: replicas = ceil(mean / target * ready pods of the selector)."""
    parallelism = {"data": 2, "nodes": nodes, "expert": True}
    async with world(serving_cluster, namespace, replicas=1, parallelism=parallelism) as made:
        await made.change(autoscaling={"mode": "external", "minReplicas": 1, "maxReplicas": 12})
        load, target, seen = 16.0, 8.0, []
        for _ in range(4):
            selector = (await made.status())["selector"]
            counted = (await made.operator.api.server.list(POD, namespace, selector)).items
            mean = load / len(counted)
            seen.append(math.ceil(mean / target * len(counted)))
            assert len(counted) == (await made.status())["replicas"]
            await made.change(engine={"replicas": seen[-1]})
            await made.until(is_complete, "it is scaled")
        assert seen == [2, 2, 2, 2], "it stays at what the load asks for"


async def test_from_one_node_to_several_and_back_the_old_serve_until_the_new_are_ready(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    parallelism = {"data": 2, "nodes": 1, "expert": True}
    async with world(serving_cluster, namespace, replicas=2, parallelism=parallelism) as made:
        for nodes, new, other in ((2, LEADER_WORKER_SET, DEPLOYMENT), (1, DEPLOYMENT, LEADER_WORKER_SET)):
            before = set(await made.serving_pods())
            # The new are made, and load; nothing else changes for as long as they do.
            made.kubelet.loads = {*await made.namespace.pods()}.__contains__
            await made.nodes(nodes)
            await made.rounds(5)
            assert set(await made.serving_pods()) == before
            assert (await fetch(made.operator, new, made.key, SET))["spec"]["replicas"] == 1, "one at a time"
            assert (await made.verdict("Ready"))[0] == "True"
            assert (await made.verdict("Progressing")) == ("True", "Updating")
            made.kubelet.loads = lambda _: True
            for _ in range(ROUNDS):
                await made.round()
                now = await made.serving_pods()
                assert len(now) >= 2, "as many serve as before"
                assert not [name for name in now if name.count("-") == 3], "no worker is in the Service"
                if is_complete(await made.status()):
                    break
            await made.round()
            assert len(await made.serving_pods()) == 2
            assert not before & set(await made.serving_pods())
            assert await made.operator.api.get(other, namespace, SET) is None
            assert (await fetch(made.operator, new, made.key, SET))["spec"]["replicas"] == 2


async def test_without_their_kind_in_the_cluster_engines_of_one_node_stay(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        engine = {"parallelism": {"data": 2}, "update": "inPlace"}
        key = await served(operator, namespace, serving(engine=engine))
        await operator.api.merge(SERVING, *key, {"spec": {"engine": {"parallelism": {"nodes": 2}}}})
        await operator.relist()
        await operator.settle(key)
        assert await operator.api.get(DEPLOYMENT, namespace, SET) is not None
        degraded = conditions(await fetch_serving(operator.api, key) or {})["Degraded"]
        assert degraded["reason"] == "LeaderWorkerSetMissing"


async def test_with_in_place_the_old_workload_goes_first(serving_cluster: ApiCluster, namespace: str) -> None:
    async with world(serving_cluster, namespace, replicas=1, update="inPlace") as made:
        await made.nodes(1)
        await made.operator.relist()
        await made.operator.settle(made.key)
        assert await made.operator.api.get(LEADER_WORKER_SET, namespace, SET) is None
        await made.until(is_complete, "it serves")


async def test_a_replica_is_ready_as_a_whole(serving_cluster: ApiCluster, namespace: str) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        ready = {"type": "Ready", "status": "False", "reason": "NodeNotReady"}
        pod = (await made.namespace.pods())["tiny-engine-0-1"]
        await made.namespace.put_status(POD, "tiny-engine-0-1", pod["status"] | {"conditions": [ready]})
        await made.operator.relist()
        await made.operator.reconciler.reconcile(made.key)
        assert (await made.verdict("Ready")) == ("False", "NoEngine")
        assert (await made.verdict("Progressing")) == ("True", "EnginesStarting")
        assert (await made.status())["readyReplicas"] == 0
        await made.until(is_complete, "it is whole again")


async def test_a_worker_that_no_node_can_take_is_reported(serving_cluster: ApiCluster, namespace: str) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        made.kubelet.loads = lambda name: name != "tiny-engine-1-1"
        await made.change(engine={"replicas": 2})
        await made.rounds(4)
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        row = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        pod = (await made.namespace.pods())["tiny-engine-1-1"]
        await made.namespace.put_status(POD, "tiny-engine-1-1", pod["status"] | {"conditions": [row]})
        await made.operator.relist()
        await made.operator.reconciler.reconcile(made.key)
        assert (await made.verdict("Degraded")) == ("True", "Unschedulable")
        assert (await made.verdict("Progressing"))[0] == "True"
        assert (await made.status())["readyReplicas"] == 1


async def test_a_worker_that_is_killed_for_its_memory_again_and_again_is_reported(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        for life in range(3):
            before = (await made.namespace.pods())["tiny-engine-0"]["metadata"]["uid"]
            pod = (await made.namespace.pods())["tiny-engine-0-1"]
            killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
            row = {"name": "engine", "image": "i", "imageID": "", "ready": False, "restartCount": 1}
            states = {"lastState": killed, "state": {"running": {}}}
            await made.namespace.put_status(
                POD, "tiny-engine-0-1", pod["status"] | {"containerStatuses": [row | states]}
            )
            await made.operator.relist()
            await made.operator.reconciler.reconcile(made.key)
            await made.rounds(3)
            pods = await made.namespace.pods()
            assert pods["tiny-engine-0"]["metadata"]["uid"] != before, "the whole group is new"
            assert not pods["tiny-engine-0-1"]["status"].get("containerStatuses"), "and has no restarts"
            row = conditions({"status": await made.status()})["Degraded"]
            assert (row["status"], row["reason"]) == ("True", "OutOfMemory")
            assert f"the group tiny-engine-0 was made anew {life + 1} times" in row["message"]


async def test_a_surge_is_complete_when_its_last_group_is(serving_cluster: ApiCluster, namespace: str) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made:
        old = {name: pod["metadata"]["uid"] for name, pod in (await made.namespace.pods()).items()}
        await made.change(engine={"args": ["--max-model-len=2048"]})
        for _ in range(ROUNDS):
            await made.round()
            assert len(await made.serving_pods()) >= 2, "as many serve as before"
            pods = await made.namespace.pods()
            groups = {name for name in pods if name.startswith(SET)}
            done = len(groups) == 4 and not old.items() & {(n, pods[n]["metadata"]["uid"]) for n in groups}
            if is_complete(await made.status()):
                assert done, "all groups are new, and the surplus is gone"
                return
        raise AssertionError("never complete")


@contextlib.contextmanager
def webhook_away(cluster: ApiCluster, namespace: str) -> Iterator[None]:
    """The webhook of LeaderWorkerSet, of which nobody answers, as while its controller is down."""
    rule = {
        "apiGroups": ["leaderworkerset.x-k8s.io"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["leaderworkersets"],
    }
    webhook = {
        "name": "vleaderworkerset.kb.io",
        "clientConfig": {"url": "https://127.0.0.1:1/validate"},
        "rules": [rule],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
    }
    kind = "ValidatingWebhookConfiguration"
    name = f"away-{namespace}"
    configuration = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(configuration | {"webhooks": [webhook]}))
    try:
        eventually(lambda: is_refused(cluster, namespace), "the webhook is asked")
        yield
    finally:
        cluster.kubectl("delete", f"{kind}/{name}")


def is_refused(cluster: ApiCluster, namespace: str) -> bool:
    template = {"metadata": {}, "spec": {"containers": []}}
    body = {
        "apiVersion": LEADER_WORKER_SET.api_version,
        "kind": LEADER_WORKER_SET.name,
        "metadata": {"name": "probe", "namespace": namespace},
        "spec": {"leaderWorkerTemplate": {"workerTemplate": template}},
    }
    try:
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
    except ClusterProblem as problem:
        return "failed calling webhook" in str(problem)
    return False


async def test_while_the_webhook_of_the_sets_is_away_all_else_goes_on(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        with webhook_away(serving_cluster, namespace):
            before = await fetch(made.operator, LEADER_WORKER_SET, made.key, SET)
            await made.change(
                engine={"args": ["--max-model-len=2048"]},
                gateway={"replicas": 2},
                scheduling={"request": {"policy": "fcfs"}},
            )
            await made.rounds(2)
            live = await fetch(made.operator, LEADER_WORKER_SET, made.key, SET)
            assert live["spec"] == before["spec"]
            gateways = await fetch(made.operator, DEPLOYMENT, made.key, "tiny-gateway")
            assert gateways["spec"]["replicas"] == 2
            settings = await fetch(made.operator, CONFIG_MAP, made.key, "tiny-settings")
            assert '"policy": "fcfs"' in settings["data"]["request.json"]
            row = conditions({"status": await made.status()})["Degraded"]
            assert (row["status"], row["reason"]) == ("True", "Refused")
            assert row["message"].startswith(f"LeaderWorkerSet {namespace}/{SET}: ")
            assert "failed calling webhook" in row["message"]
            assert (await made.status())["observedGeneration"] == 2
            assert (await made.verdict("Ready"))[0] == "True", "what ran goes on"
        await made.until(is_complete, "it is updated once the webhook answers")
        live = await fetch(made.operator, LEADER_WORKER_SET, made.key, SET)
        assert live["spec"] != before["spec"]


async def test_while_the_webhook_is_away_one_node_serves_on_instead_of_several(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    parallelism = {"data": 2, "nodes": 1, "expert": True}
    async with world(serving_cluster, namespace, replicas=1, parallelism=parallelism, update="inPlace") as made:
        before = await made.serving_pods()
        with webhook_away(serving_cluster, namespace):
            await made.nodes(2)
            await made.rounds(3)
            assert await made.serving_pods() == before
            assert (await made.verdict("Degraded")) == ("True", "Refused")
        await made.until(is_complete, "the group has taken over")
        assert await made.serving_pods() == ["tiny-engine-0"]


async def test_scale_in_takes_the_highest_numbers(serving_cluster: ApiCluster, namespace: str) -> None:
    async with world(serving_cluster, namespace, replicas=3) as made:
        await made.change(engine={"replicas": 1})
        await made.until(is_complete, "it is scaled in")
        assert await made.serving_pods() == ["tiny-engine-0"]


async def test_a_resource_with_groups_is_deleted_to_the_last_object(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        await made.operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        for _ in range(ROUNDS):
            await made.round()
            if await fetch_serving(made.operator.api, made.key) is None:
                break
        await made.others()
        assert await made.namespace.pods() == {}
        assert await made.namespace.list(SERVICE) == []

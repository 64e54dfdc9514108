"""The end of a resource beside the real garbage collector, whatever propagation policy its deletion asks for."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from controlled import ControlledCluster, Node
from fresh_operator import FreshOperator, conditions, fetch_children, fetch_serving, served, started
from moe_operator.kubernetes import waits
from moe_operator.kubernetes.kinds import DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.store import Key
from operator_process import TIMEOUT_S, eventually
from serving_documents import serving

Document = dict[str, Any]
SENTINELS = {("PodDisruptionBudget", "tiny-engine"), ("PodDisruptionBudget", "tiny-gateway")}
CACHE = {"path": "/cache", "size": "1Gi", "whenDeleted": "Delete"}


async def passes(operator: FreshOperator, key: Key, holds: Callable[[set[tuple[str, str]]], bool], what: str) -> None:
    """Passes until the objects of the namespace are as wanted."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while True:
        await operator.relist()
        await operator.reconciler.reconcile(key)
        left = {place for place, row in (await fetch_children(operator.api, key.namespace)).items() if lives(row)}
        if holds(left):
            return
        assert time.monotonic() < give_up_s, f"{what}: {left}"
        await asyncio.sleep(0.1)


def lives(document: Document) -> bool:
    return "deletionTimestamp" not in document["metadata"]


def names_resource(cluster: ControlledCluster, namespace: str) -> bool:
    """Whether a child still has the resource for an owner."""
    words = ("get", "deployments,services,secrets,configmaps,poddisruptionbudgets", "-n", namespace, "-o", "json")
    rows = json.loads(cluster.kubectl(*words))["items"]
    kinds = {owner["kind"] for row in rows for owner in row["metadata"].get("ownerReferences", [])}
    return "MoEServing" in kinds


def delete(cluster: ControlledCluster, namespace: str, cascade: str) -> None:
    cluster.kubectl("delete", "moes/tiny", "-n", namespace, f"--cascade={cascade}", "--wait=false")


@pytest.mark.parametrize("cascade", ["background", "foreground"])
async def test_gateways_then_engines_then_all_else_with_either_propagation(
    controlled_cluster: ControlledCluster, place: str, cascade: str
) -> None:
    node = Node(controlled_cluster, place)
    async with started(controlled_cluster.kubeconfig, place) as operator:
        key = await served(operator, place, serving(engine={"replicas": 2}))
        node.wait_for_pods(3)
        before = set(await fetch_children(operator.api, place))
        delete(controlled_cluster, place, cascade)
        if cascade == "foreground":
            eventually(lambda: not names_resource(controlled_cluster, place), "the garbage collector has acted")
        kept = before - SENTINELS if cascade == "foreground" else before
        assert {name for name, row in (await fetch_children(operator.api, place)).items() if lives(row)} == kept

        without_gateway = kept - {("Deployment", "tiny-gateway")}
        await passes(operator, key, lambda left: left == without_gateway, "the gateways go first")
        eventually(lambda: not any(map(lives, node.pods("gateway"))), "the gateways drain")
        await passes(operator, key, lambda left: left == without_gateway, "what they need stays")
        assert all(map(lives, node.pods("engine")))

        node.remove_ended("gateway")
        without_engines = without_gateway - {("Deployment", "tiny-engine")}
        await passes(operator, key, lambda left: left == without_engines, "then the engines")
        eventually(lambda: not any(map(lives, node.pods("engine"))), "the engines drain")
        await passes(operator, key, lambda left: left == without_engines, "their settings stay")

        node.remove_ended("engine")
        await passes(operator, key, lambda left: not left, "then all else")
        assert await fetch_serving(operator.api, key) is None


@pytest.mark.parametrize("is_away", [False, True], ids=["operator there", "operator away"])
async def test_children_that_are_to_stay_run_on_and_a_resource_of_the_name_adopts_them(
    controlled_cluster: ControlledCluster, place: str, is_away: bool
) -> None:
    node = Node(controlled_cluster, place)
    document = serving(model={"uri": "hf://org/tiny", "cache": CACHE})
    async with started(controlled_cluster.kubeconfig, place) as operator:
        key = await served(operator, place, document)
        node.wait_for_pods(2)
        before, pods = await fetch_children(operator.api, place), uids(node.pods())
        delete(controlled_cluster, place, "orphan")
        if is_away:
            eventually(lambda: not names_resource(controlled_cluster, place), "the garbage collector has acted")
        await passes(operator, key, set(before).__eq__, "all of them stay")
        eventually(lambda: gone(controlled_cluster, place), "the resource goes")
        await operator.relist()
        assert await operator.reconciler.reconcile(key) is None
        assert set(await fetch_children(operator.api, place)) == set(before)

        again = await served(operator, place, document)
        after = await fetch_children(operator.api, place)
        assert uids(after.values()) == uids(before.values()), "the same objects"
        assert uids(node.pods()) == pods, "no pod was made anew"
        assert after["Secret", "tiny-control"]["data"] == before["Secret", "tiny-control"]["data"]
        assert conditions(await fetch_serving(operator.api, again) or {})["Degraded"]["status"] == "False"


def uids(documents: Any) -> set[str]:
    return {row["metadata"]["uid"] for row in documents}


def gone(cluster: ControlledCluster, namespace: str) -> bool:
    return not cluster.kubectl("get", "moes", "-n", namespace, "-o", "name")


async def test_what_a_resource_left_behind_without_its_finalizer_is_ended_in_order(
    controlled_cluster: ControlledCluster, place: str
) -> None:
    node = Node(controlled_cluster, place)
    async with started(controlled_cluster.kubeconfig, place) as operator:
        key = await served(operator, place, serving())
        node.wait_for_pods(2)
        await operator.api.merge(SERVING, *key, {"metadata": {"finalizers": None}})
        delete(controlled_cluster, place, "background")
        eventually(lambda: gone(controlled_cluster, place), "the resource goes")
        await passes(operator, key, lambda left: ("Deployment", "tiny-gateway") not in left, "the gateways go first")
        assert await operator.api.get(DEPLOYMENT, place, "tiny-engine") is not None
        eventually(lambda: not any(map(lives, node.pods("gateway"))), "they drain")
        node.remove_ended("gateway")
        await passes(operator, key, lambda left: ("Deployment", "tiny-engine") not in left, "then the engines")
        eventually(lambda: not any(map(lives, node.pods("engine"))), "they drain")
        node.remove_ended("engine")
        await passes(operator, key, lambda left: not left, "then all else")


async def condition_after(operator: FreshOperator, key: Key, kind: str, reason: str) -> str:
    """The message of a condition once it has this reason."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while True:
        await operator.relist()
        await operator.reconciler.reconcile(key)
        live = await fetch_serving(operator.api, key)
        assert live is not None, "the resource is still there"
        row = conditions(live)[kind]
        if row["reason"] == reason:
            return str(row["message"])
        assert time.monotonic() < give_up_s, row
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("lost", ["gateway", "engine"])
async def test_a_pod_on_a_lost_node_is_named_and_holds_the_deletion_no_longer_than_it_may_take(
    controlled_cluster: ControlledCluster, place: str, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(controlled_cluster, place)
    other = {"gateway": "engine", "engine": "gateway"}[lost]
    async with started(controlled_cluster.kubeconfig, place) as operator:
        document = serving(model={"uri": "hf://org/tiny", "cache": CACHE})
        key = await served(operator, place, document)
        node.wait_for_pods(2)
        (stuck,) = node.pods(lost)
        delete(controlled_cluster, place, "background")
        if lost == "engine":
            await condition_after(operator, key, "Progressing", "Deleting")
            eventually(lambda: not any(map(lives, node.pods("gateway"))), "the gateway drains")
            node.remove_ended("gateway")
        await condition_after(operator, key, "Progressing", "Deleting")
        eventually(lambda: not any(map(lives, node.pods(lost))), "it is marked")
        message = await settled_message(operator, key)
        assert message.startswith(f"ends {lost}s; waits for pod {stuck['metadata']['name']} on node node-1, until 20")
        before = await fetch_serving(operator.api, key)
        await operator.reconciler.reconcile(key)
        assert await fetch_serving(operator.api, key) == before, "a wait writes nothing"

        monkeypatch.setattr(waits, "POD_MARGIN", timedelta(days=-1))
        if lost == "gateway":
            message = await condition_after(operator, key, "Degraded", "NotEnding")
            assert f"pod {stuck['metadata']['name']} on node node-1" in message
            eventually(lambda: not any(map(lives, node.pods(other))), "the others drain")
            node.remove_ended(other)
        monkeypatch.setattr(waits, "HELD", timedelta(days=-1))
        await passes(operator, key, lambda left: not left, "all else goes")
        assert await fetch_serving(operator.api, key) is None
        assert [pod["metadata"]["name"] for pod in node.pods()] == [stuck["metadata"]["name"]]


async def settled_message(operator: FreshOperator, key: Key) -> str:
    """What the resource says that it waits for, once the marks of its pods were seen."""
    await operator.relist()
    await operator.reconciler.reconcile(key)
    return str(conditions(await fetch_serving(operator.api, key) or {})["Progressing"]["message"])


async def test_a_claim_that_its_protection_holds_is_named(controlled_cluster: ControlledCluster, place: str) -> None:
    async with started(controlled_cluster.kubeconfig, place) as operator:
        key = await served(operator, place, serving(model={"uri": "hf://org/tiny", "cache": CACHE}))
        metadata = {"name": "user", "namespace": place}
        volume = {"name": "v", "persistentVolumeClaim": {"claimName": "tiny-cache"}}
        spec = {"containers": [{"name": "c", "image": "none"}], "volumes": [volume], "nodeName": "node-1"}
        await operator.api.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        delete(controlled_cluster, place, "background")
        await passes(operator, key, lambda left: not left, "all of them are deleted")
        message = await condition_after(operator, key, "Progressing", "Deleting")
        assert "PersistentVolumeClaim tiny-cache (held by kubernetes.io/pvc-protection)" in message

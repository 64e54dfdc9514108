"""What holds downloaded weights is not deleted unasked."""

from pathlib import Path
from typing import Any

from cluster_api import ApiCluster
from fresh_operator import (
    FreshOperator,
    change,
    fetch,
    fetch_conditions,
    fetch_serving,
    let_go_of_claims,
    served,
    started,
)
from moe_operator.kubernetes.kinds import CLAIM, DEPLOYMENT, EVENT, SECRET, SERVING
from moe_operator.kubernetes.store import Key
from serving_documents import serving

Document = dict[str, Any]
CACHE = {"path": "/cache", "size": "1Gi"}


def cached(**cache: Any) -> Document:
    return serving(model={"uri": "hf://org/tiny", "cache": CACHE | cache})


async def delete(operator: FreshOperator, key: Key) -> None:
    await operator.api.delete(SERVING, {"metadata": {"name": key.name, "namespace": key.namespace}})
    await operator.relist()
    await operator.settle(key)
    assert await fetch_serving(operator.api, key) is None


async def kept_claims(operator: FreshOperator, namespace: str) -> list[str]:
    """Messages of the events about claims that are kept."""
    listing = await operator.api.server.list(EVENT, namespace, "")
    return [row["message"] for row in listing.items if row["reason"] == "ClaimKept"]


async def test_a_claim_that_is_named_instead_of_sized_is_kept_and_used(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached())
        before = await fetch(operator, CLAIM, key, "tiny-cache")
        await change(operator, key, model={"cache": {"size": None, "claim": "tiny-cache"}})
        after = await fetch(operator, CLAIM, key, "tiny-cache")
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert "deletionTimestamp" not in after["metadata"]
        assert "ownerReferences" not in after["metadata"]
        engines = await fetch(operator, DEPLOYMENT, key, "tiny-engine")
        claims = [
            row["persistentVolumeClaim"]
            for row in engines["spec"]["template"]["spec"]["volumes"]
            if row["name"] == "cache"
        ]
        assert claims == [{"claimName": "tiny-cache"}]
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
        await change(operator, key, model={"cache": {"size": "2Gi", "claim": None}})
        assert (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]["uid"] == before["metadata"]["uid"]


async def test_without_its_section_a_claim_is_kept_and_said_so_once(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached(whenDeleted="Delete"))
        assert (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]["ownerReferences"]
        await change(operator, key, model={"cache": None})
        assert "ownerReferences" not in (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]
        await change(operator, key, engine={"args": ["--seed=1"]})
        message = "PersistentVolumeClaim tiny-cache is kept; when what it holds is of no more use: "
        assert await kept_claims(operator, namespace) == [f"{message}kubectl delete pvc tiny-cache -n {namespace}"]
        await delete(operator, key)
        assert "deletionTimestamp" not in (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]


async def test_a_claim_outlives_its_resource_and_the_next_of_that_name_takes_it_up(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached())
        before = await fetch(operator, CLAIM, key, "tiny-cache")
        await delete(operator, key)
        assert len(await kept_claims(operator, namespace)) == 1
        async with started(kubeconfig, namespace) as another:
            await served(another, namespace, cached())
            assert (await fetch_conditions(another, key))["Degraded"]["status"] == "False"
            assert (await fetch(another, CLAIM, key, "tiny-cache"))["metadata"]["uid"] == before["metadata"]["uid"]


async def test_a_claim_that_is_asked_to_ends_with_its_resource(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached())
        await change(operator, key, model={"cache": {"whenDeleted": "Delete"}})
        owners = (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]["ownerReferences"]
        assert [(row["kind"], row["name"]) for row in owners] == [("MoEServing", "tiny"), ("Namespace", namespace)]
        await delete(operator, key)
        assert await operator.api.get(CLAIM, namespace, "tiny-cache") is None


async def test_a_claim_of_an_earlier_operator_which_owned_it_is_kept_too(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached())
        uid = (await fetch_serving(operator.api, key) or {})["metadata"]["uid"]
        owner = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "name": "tiny", "uid": uid}
        await operator.api.merge(CLAIM, namespace, "tiny-cache", {"metadata": {"ownerReferences": [owner]}})
        await operator.relist()
        await delete(operator, key)
        left = (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]
        assert "deletionTimestamp" not in left
        assert "ownerReferences" not in left


async def test_a_claim_of_somebody_else_is_not_taken(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        metadata = {"name": "tiny-cache", "namespace": namespace}
        made = await operator.api.create(
            CLAIM, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}
        )
        key = await served(operator, namespace, cached())
        message = (await fetch_conditions(operator, key))["Degraded"]["message"]
        assert message.endswith("exists and is not this resource's own; to use it, set spec.model.cache.claim")
        await delete(operator, key)
        assert (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]["uid"] == made["metadata"]["uid"]


async def test_a_secret_that_a_pod_refers_to_is_not_pruned(kubeconfig: Path, namespace: str) -> None:
    """A copy of a child under another name carries its labels and its owner."""
    volume = {"name": "copy", "secret": {"secretName": "copied"}}
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        original = await fetch(operator, SECRET, key, "tiny-control")
        for name in ("copied", "other"):
            metadata = {part: original["metadata"][part] for part in ("labels", "ownerReferences")}
            copy = {**original, "metadata": metadata | {"name": name, "namespace": namespace}}
            await operator.api.create(SECRET, copy)
        await change(operator, key, engine={"podTemplate": {"spec": {"volumes": [volume]}}})
        assert (await fetch(operator, SECRET, key, "copied"))["metadata"]["name"] == "copied"
        assert await operator.api.get(SECRET, namespace, "other") is None


async def test_a_claim_that_is_deleted_while_pods_use_it_is_reported_and_keeps_back_nothing(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, cached())
        await operator.api.delete(CLAIM, {"metadata": {"name": "tiny-cache", "namespace": namespace}})
        await operator.api.merge(SERVING, *key, {"spec": {"engine": {"replicas": 3}}})
        await operator.relist()
        await operator.reconciler.reconcile(key)
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "Refused"
        assert "tiny-cache is being deleted, which waits for the pods that use it" in degraded["message"]
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 3
        await let_go_of_claims(operator.api, operator.store, key)
        await operator.settle(key)
        assert "deletionTimestamp" not in (await fetch(operator, CLAIM, key, "tiny-cache"))["metadata"]
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"

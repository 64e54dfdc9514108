"""Who sets the number of replicas, by managed fields: a real API server, and a second manager through /scale."""

import json
from typing import Any

import pytest
from cluster_api import ApiCluster
from fresh_operator import FreshOperator, change, fetch, fetch_children, fetch_serving, served, started, writes
from moe_operator.kubernetes.kinds import AUTOSCALER, DEPLOYMENT
from moe_operator.kubernetes.store import Key
from serving_documents import serving

Document = dict[str, Any]
TWO_OF_EACH = {"engine": {"replicas": 2}, "gateway": {"replicas": 2}}
# Where the resource says the number of a workload.
SECTIONS = {"tiny-engine": "engine", "tiny-gateway": "gateway"}


def scale(cluster: ApiCluster, namespace: str, name: str, count: int) -> None:
    """As a HorizontalPodAutoscaler does: an update of the subresource by a manager of its own."""
    patch = json.dumps({"spec": {"replicas": count}})
    words = ("patch", f"deployment/{name}", "-n", namespace, "--subresource=scale", "--type=merge", "-p", patch)
    cluster.kubectl(*words, "--field-manager=autoscaler")


async def replicas(operator: FreshOperator, key: Key, name: str) -> int:
    return int((await fetch(operator, DEPLOYMENT, key, name))["spec"]["replicas"])


async def look(operator: FreshOperator, key: Key) -> None:
    await operator.relist()
    await operator.settle(key)


@pytest.mark.parametrize("name", SECTIONS)
async def test_a_number_set_through_scale_stays_until_the_resource_says_another(
    serving_cluster: ApiCluster, namespace: str, name: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(**TWO_OF_EACH))
        for count in (7, 2, 0, 3, 0, 1):
            scale(serving_cluster, namespace, name, count)
            await look(operator, key)
            assert await replicas(operator, key, name) == count
        scale(serving_cluster, namespace, name, 7)
        await change(operator, key, engine={"args": ["--seed=2"]}, gateway={"hold": {"requests": 9}})
        assert await replicas(operator, key, name) == 7, "another change of the workload leaves it"
        before = writes(operator.api)
        await look(operator, key)
        assert writes(operator.api) == before, "nothing is fought over"
        if name == "tiny-engine":
            status = (await fetch_serving(operator.api, key) or {})["status"]
            assert status["desiredReplicas"] == 7

        await change(operator, key, **{SECTIONS[name]: {"replicas": 3}})
        assert await replicas(operator, key, name) == 3
        scale(serving_cluster, namespace, name, 5)
        await look(operator, key)
        assert await replicas(operator, key, name) == 5


@pytest.mark.parametrize("name", SECTIONS)
async def test_the_number_of_the_resource_is_taken_back_by_a_word(
    serving_cluster: ApiCluster, namespace: str, name: str
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(**TWO_OF_EACH))
        scale(serving_cluster, namespace, name, 7)
        await look(operator, key)
        words = ("annotate", f"deployment/{name}", "-n", namespace, "moeserving.dev/replicas=ours", "--overwrite")
        serving_cluster.kubectl(*words)
        await look(operator, key)
        assert await replicas(operator, key, name) == 2


async def test_under_internal_autoscaling_the_operator_is_the_autoscaler_and_takes_a_number_as_present(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    bounds = {"minReplicas": 1, "maxReplicas": 4}
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(autoscaling=bounds))
        scale(serving_cluster, namespace, "tiny-engine", 9)
        await look(operator, key)
        assert await replicas(operator, key, "tiny-engine") == 4


async def test_gateways_scale_by_an_autoscaler_of_their_own(serving_cluster: ApiCluster, namespace: str) -> None:
    bounds = {"minReplicas": 2, "maxReplicas": 6}
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(gateway={"autoscaling": bounds}))
        assert await replicas(operator, key, "tiny-gateway") == 2
        spec = (await fetch(operator, AUTOSCALER, key, "tiny-gateway"))["spec"]
        assert (spec["scaleTargetRef"]["name"], spec["minReplicas"], spec["maxReplicas"]) == ("tiny-gateway", 2, 6)
        scale(serving_cluster, namespace, "tiny-gateway", 5)
        await look(operator, key)
        before = writes(operator.api)
        await look(operator, key)
        assert (await replicas(operator, key, "tiny-gateway"), writes(operator.api)) == (5, before)
        await change(operator, key, gateway={"autoscaling": None, "replicas": 3})
        assert await replicas(operator, key, "tiny-gateway") == 3
        assert ("HorizontalPodAutoscaler", "tiny-gateway") not in await fetch_children(operator.api, namespace)

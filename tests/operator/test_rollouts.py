"""How far workloads are with the newest template of their pods, and why one does not go on."""

from typing import Any

from moe_operator.kubernetes.kinds import DEPLOYMENT
from moe_operator.kubernetes.rollouts import find_rollouts
from moe_operator.kubernetes.store import Key, Store
from pods import NAMES

Document = dict[str, Any]
KEY = Key("ns", "tiny")


def rollouts(**spec: Any) -> list[str]:
    store = Store()
    metadata = {"name": "tiny-gateway", "namespace": "ns", "labels": NAMES.labels("gateway"), "uid": "1"}
    status = {"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1}
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata | {"generation": 2, "resourceVersion": "1"},
        "spec": {"replicas": 2} | spec,
        "status": status,
    }
    store.put(DEPLOYMENT, workload)
    return find_rollouts(store, KEY)


def test_a_rollout_says_how_many_pods_are_up_to_date() -> None:
    assert rollouts() == ["tiny-gateway: 1 of 2 pods are up to date"]


def test_a_rollout_that_a_person_has_paused_says_how_it_goes_on() -> None:
    assert rollouts(paused=True) == [
        "tiny-gateway: 1 of 2 pods are up to date "
        "(its rollout is paused: kubectl rollout resume deployment/tiny-gateway -n ns)"
    ]

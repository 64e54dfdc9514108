"""An autoscaler for each fixed role on a real API server: numbers, limits, victims and status by role."""

from pathlib import Path
from typing import Any

from fresh_operator import FreshOperator, change, fetch, fetch_all, fetch_conditions, fetch_serving, served, started
from moe_operator.kubernetes.kinds import AUTOSCALER, DEPLOYMENT, POD
from moe_operator.kubernetes.store import Key
from serving_documents import serving
from stand_in_peers import Peers, peers_listening

Document = dict[str, Any]
ROLE, COST = "moeserving.dev/role", "controller.kubernetes.io/pod-deletion-cost"
FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}
SCALED = {
    "roles": {
        "prefill": {"maxReplicas": 2},
        "decode": {"minReplicas": 2, "maxReplicas": 3, "targets": {"kvUsage": 0.5}},
    },
    "scaleDown": {"stabilizationWindow": "0s"},
}


async def numbers(operator: FreshOperator, key: Key) -> tuple[int, ...]:
    """The replicas of prefill and decode engines."""
    found = {row["metadata"]["name"]: row for row in await fetch_all(operator.api, DEPLOYMENT, key.namespace)}
    return tuple(found[f"tiny-engine-{role}"]["spec"]["replicas"] for role in ("prefill", "decode"))


async def look(operator: FreshOperator, key: Key) -> None:
    operator.reconciler._streams.forget(key)
    await operator.relist()
    await operator.settle(key)


def say_kv_usage(peers: Peers, names: set[str], kv_usage: float) -> None:
    for address, pod in peers.pods.items():
        if pod["name"] in names:
            rank = {"rank": 0, "running": 1, "waiting": 0, "kv_usage": kv_usage, "computed_tokens": 0}
            peers.further[address]["ranks"] = [rank]


async def test_each_role_is_scaled_by_its_own_load(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving(engine={"roles": FIXED}, autoscaling=SCALED))
        assert await numbers(operator, key) == (1, 2)
        await peers.make(operator.api, key, "gateway", "g")
        await peers.make(operator.api, key, "engine", "p", **{ROLE: "prefill"})
        for name in ("d", "e", "f"):
            await peers.make(operator.api, key, "engine", name, **{ROLE: "decode"})
        say_kv_usage(peers, {"p", "d", "e", "f"}, 0.9)
        await look(operator, key)
        assert await numbers(operator, key) == (1, 3)
        limited = (await fetch_conditions(operator, key))["AutoscalingLimited"]
        assert (limited["status"], limited["reason"]) == ("True", "TooFewReplicas")
        assert "more decode engines than autoscaling.roles.decode.maxReplicas" in limited["message"]
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert status["roles"] == [
            {"role": "prefill", "replicas": 1, "readyReplicas": 1, "desiredReplicas": 1},
            {"role": "decode", "replicas": 3, "readyReplicas": 3, "desiredReplicas": 3},
        ]

        say_kv_usage(peers, {"d", "e", "f"}, 0.01)
        await look(operator, key)
        assert await numbers(operator, key) == (1, 2)
        marked = {name: await fetch(operator, POD, key, name) for name in ("p", "d", "e", "f")}
        costs = {name: COST in row["metadata"].get("annotations", {}) for name, row in marked.items()}
        assert costs == {"p": False, "d": True, "e": True, "f": True}

        await change(operator, key, autoscaling=None)
        await look(operator, key)
        assert await numbers(operator, key) == (1, 2)
        await change(operator, key, engine={"roles": {**FIXED, "decode": 4}})
        assert await numbers(operator, key) == (1, 4)


def autoscaler_of(key: Key, target: str) -> Document:
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "left-over", "namespace": key.namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target},
            "maxReplicas": 9,
        },
    }


async def test_an_autoscaler_of_others_that_is_left_on_a_role_is_reported(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"roles": FIXED}, autoscaling=SCALED))
        left = await operator.api.create(AUTOSCALER, autoscaler_of(key, "tiny-engine-decode"))
        operator.reconciler._others.forget(namespace)
        await look(operator, key)
        limited = (await fetch_conditions(operator, key))["AutoscalingLimited"]
        assert (limited["status"], limited["reason"]) == ("True", "OtherAutoscaler")
        assert "left-over scales Deployment tiny-engine-decode too" in limited["message"]

        await operator.api.delete(AUTOSCALER, left)
        operator.reconciler._others.forget(namespace)
        await look(operator, key)
        assert (await fetch_conditions(operator, key))["AutoscalingLimited"]["reason"] != "OtherAutoscaler"

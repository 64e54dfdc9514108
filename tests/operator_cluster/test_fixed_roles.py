"""Prefill and decode apart on a real API server: what it refuses, and how engines of other roles take over."""

from pathlib import Path
from typing import Any

import pytest
from fresh_operator import (
    FreshOperator,
    change,
    fetch,
    fetch_all,
    fetch_conditions,
    fetch_serving,
    served,
    started,
    writes,
)
from moe_contract.api_server import ApiError
from moe_operator.kubernetes.kinds import DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.store import Key
from serving_documents import serving
from stand_in_peers import Peers, peers_listening

Document = dict[str, Any]
FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}
ROLE = "moeserving.dev/role"


async def numbers(operator: FreshOperator, key: Key) -> dict[str, int]:
    """The replicas of the Deployments of engines."""
    found = await fetch_all(operator.api, DEPLOYMENT, key.namespace)
    return {row["metadata"]["name"]: row["spec"]["replicas"] for row in found if "engine" in row["metadata"]["name"]}


async def look_again(operator: FreshOperator, key: Key) -> None:
    await operator.relist()
    await operator.settle(key)


async def make_engines(peers: Peers, operator: FreshOperator, key: Key, role: str, *names: str) -> None:
    for name in names:
        labels = {ROLE: role} if role else {}
        address = await peers.make(operator.api, key, "engine", name, **labels)
        transfer = {"role": role or "unified", "peers": "one", "transfers": 0}
        peers.further[address] = {"kv_transfer": transfer}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"roles": "auto"}, "roles"),
        ({"roles": {"mode": "split"}}, "Unsupported value"),
        ({"roles": {"mode": "fixed", "prefill": 1}}, "needs prefill and decode"),
        ({"roles": {"mode": "auto", "prefill": 1}}, "no other mode has them"),
        ({"roles": FIXED, "replicas": 2}, "leave replicas out"),
        ({"roles": {"mode": "auto", "overrides": {}}}, "need the mode fixed"),
        ({"roles": {**FIXED, "overrides": {"decode": {"args": ["--port=1"]}}}}, "an option that the deployment sets"),
        ({"roles": {**FIXED, "overrides": {"decode": {"args": ["--kv_transfer_config={}"]}}}}, "own KV connector"),
        ({"roles": {**FIXED, "overrides": {"decode": {"resources": {"memory": "lots"}}}}}, "memory"),
        ({"roles": {**FIXED, "overrides": {"prefill": {"env": {"1": "x"}}}}}, "a variable's name"),
        ({"kvOffload": {"cpu": "4Gi"}, "args": ["--kv_transfer_config={}"]}, "no argument beside roles or kvOffload"),
        ({"kvOffload": {"cpu": "1Mi"}}, "from 64Mi to 100Ti"),
        ({"kvOffload": {"cpu": "64Gi"}, "runtime": "vllm-cpu"}, "GPUs alone"),
        ({"kvOffload": {"cpu": "64Gi"}, "resources": {"memory": "0.0625Ti"}}, "has to be less"),
        (
            {
                "kvOffload": {"cpu": 2147483648},
                "resources": {"memory": "4Gi"},
                "roles": {**FIXED, "overrides": {"decode": {"resources": {"memory": "1Gi"}}}},
            },
            "has to be less",
        ),
        ({"kvOffload": {"cpu": "1Gi"}, "parallelism": {"tensor": 8, "nodes": 2}}, "must divide by the nodes"),
        ({"roles": {"mode": "auto"}, "parallelism": {"data": 2, "nodes": 2}}, "takes part in no transfer"),
        ({"roles": {"mode": "auto"}, "args": ["--kv_transfer_config={}"]}, "no argument beside roles"),
    ],
)
async def test_the_api_server_refuses_what_cannot_be(
    kubeconfig: Path, namespace: str, engine: Document, message: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        document = serving(engine=engine)
        document["metadata"]["namespace"] = namespace
        with pytest.raises(ApiError, match=message):
            await operator.api.create(SERVING, document)


async def test_a_canary_of_fixed_roles_is_made_and_takes_the_place_of_the_old_engines(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        engine: Document = {"roles": FIXED, "kvOffload": {"cpu": "4Gi"}, "runtime": "vllm"}
        key = await served(operator, namespace, serving(engine=engine))
        canary = {"weight": 20, "replicas": 2}
        await change(operator, key, engine=engine | {"args": ["--seed=2"], "canary": canary})
        old = {"tiny-engine-prefill": 1, "tiny-engine-decode": 2}
        new = {"tiny-engine-canary-prefill": 2, "tiny-engine-canary-decode": 2}
        assert await numbers(operator, key) == old | new
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert [row["desiredReplicas"] for row in status["roles"]] == [1, 2]
        await change(operator, key, engine={"canary": None})
        assert await numbers(operator, key) == old


async def test_engines_of_fixed_roles_take_over_one_by_one_and_give_back(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving(engine={"replicas": 2}))
        await make_engines(peers, operator, key, "", "old-a", "old-b")
        await change(operator, key, engine={"replicas": 1, "roles": FIXED})
        await look_again(operator, key)
        assert await numbers(operator, key) == {"tiny-engine": 2, "tiny-engine-prefill": 1, "tiny-engine-decode": 0}

        await make_engines(peers, operator, key, "prefill", "new-p")
        await look_again(operator, key)
        await make_engines(peers, operator, key, "decode", "new-d")
        await look_again(operator, key)
        assert await numbers(operator, key) == {"tiny-engine": 1, "tiny-engine-prefill": 1, "tiny-engine-decode": 2}
        marked = await fetch(operator, POD, key, "old-a")
        assert "controller.kubernetes.io/pod-deletion-cost" in marked["metadata"].get("annotations", {})

        await make_engines(peers, operator, key, "decode", "new-e")
        await look_again(operator, key)
        assert await numbers(operator, key) == {"tiny-engine-prefill": 1, "tiny-engine-decode": 2}
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert status["desiredReplicas"] == 3
        assert {row["name"]: row.get("role") for row in status["engines"]}["new-p"] == "prefill"

        for name in ("old-a", "old-b"):
            await operator.api.delete(POD, {"metadata": {"name": name, "namespace": namespace}})
        await change(operator, key, engine={"roles": None, "replicas": 3})
        await look_again(operator, key)
        assert await numbers(operator, key) == {
            "tiny-engine": 1,
            "tiny-engine-prefill": 1,
            "tiny-engine-decode": 2,
        }


async def test_the_condition_follows_what_arrives_and_costs_no_writes(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving(engine={"roles": FIXED}))
        assert await numbers(operator, key) == {"tiny-engine-prefill": 1, "tiny-engine-decode": 2}
        assert (await fetch_conditions(operator, key))["Disaggregated"]["reason"] == "NoPeers"
        await make_engines(peers, operator, key, "prefill", "p")
        await make_engines(peers, operator, key, "decode", "d", "e")
        await look_again(operator, key)
        assert (await fetch_conditions(operator, key))["Disaggregated"]["reason"] == "NoTransfers"
        for address, pod in peers.pods.items():
            peers.further[address]["kv_transfer"]["transfers"] = 7 if pod["name"] == "d" else 0
        operator.reconciler._streams.forget(key)
        await look_again(operator, key)
        found = (await fetch_conditions(operator, key))["Disaggregated"]
        assert (found["status"], found["reason"]) == ("True", "Transferring")
        before = writes(operator.api)
        await operator.reconciler.reconcile(key)
        assert writes(operator.api) == before


async def test_what_a_role_has_for_itself_changes_its_deployment_alone(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        overrides = {"prefill": {"resources": {"memory": "96Gi"}}}
        key = await served(operator, namespace, serving(engine={"roles": {**FIXED, "overrides": overrides}}))
        before = {row["metadata"]["name"]: row for row in await fetch_all(operator.api, DEPLOYMENT, namespace)}
        assert memory_of(before["tiny-engine-prefill"]) == "96Gi"
        assert memory_of(before["tiny-engine-decode"]) is None
        await change(operator, key, engine={"roles": {"overrides": {"prefill": {"resources": {"memory": "48Gi"}}}}})
        after = {row["metadata"]["name"]: row for row in await fetch_all(operator.api, DEPLOYMENT, namespace)}
        assert memory_of(after["tiny-engine-prefill"]) == "48Gi"
        assert {name for name in after if after[name]["spec"] != before[name]["spec"]} == {"tiny-engine-prefill"}


def memory_of(workload: Document) -> Any:
    (engine,) = (row for row in workload["spec"]["template"]["spec"]["containers"] if row["name"] == "engine")
    return engine.get("resources", {}).get("limits", {}).get("memory")


async def test_a_number_of_a_role_changes_its_deployment_alone(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"roles": FIXED}))
        before = {row["metadata"]["name"]: row for row in await fetch_all(operator.api, DEPLOYMENT, namespace)}
        await change(operator, key, engine={"roles": {**FIXED, "decode": 4}})
        after = {row["metadata"]["name"]: row for row in await fetch_all(operator.api, DEPLOYMENT, namespace)}
        assert after["tiny-engine-decode"]["spec"]["replicas"] == 4
        changed = {name for name in after if after[name]["spec"] != before[name]["spec"]}
        assert changed == {"tiny-engine-decode"}


async def say_rolled(operator: FreshOperator, key: Key, name: str) -> None:
    """As the Deployment's controller does once all engines are new and ready."""
    live = await fetch(operator, DEPLOYMENT, key, name)
    numbers = dict.fromkeys(
        ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), live["spec"]["replicas"]
    )
    status = {"observedGeneration": live["metadata"]["generation"]} | numbers
    said = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": key.namespace}}
    await operator.api.server.apply(DEPLOYMENT, said | {"status": status}, "controller", subresource="status")


# The API server writes this quantity as `1e3`, so that the live template never has the words of the plan.
IN_OTHER_WORDS = {
    "spec": {"containers": [{"name": "engine", "resources": {"limits": {"example.com/link": "10e2"}}}]},
}


@pytest.mark.parametrize("template", [{}, IN_OTHER_WORDS], ids=["as planned", "in other words"])
async def test_in_place_the_decode_engines_roll_after_the_prefill_engines(
    kubeconfig: Path, namespace: str, template: Document
) -> None:
    async def is_paused(role: str) -> bool:
        return bool((await fetch(operator, DEPLOYMENT, key, f"tiny-engine-{role}"))["spec"].get("paused", False))

    async with started(kubeconfig, namespace) as operator:
        engine: Document = {"roles": FIXED, "update": "inPlace", "podTemplate": template}
        key = await served(operator, namespace, serving(engine=engine))
        await look_again(operator, key)
        assert not await is_paused("decode")
        await change(operator, key, engine={"args": ["--seed=2"]})
        assert await is_paused("decode")
        assert not await is_paused("prefill")
        progress = (await fetch_conditions(operator, key))["Progressing"]
        assert "tiny-engine-decode: 0 of 2 pods are up to date, and it is paused until" in progress["message"]
        await say_rolled(operator, key, "tiny-engine-prefill")
        await look_again(operator, key)
        assert not await is_paused("decode")
        before = writes(operator.api)
        await look_again(operator, key)
        assert writes(operator.api) == before


async def test_an_operator_that_starts_while_engines_wait_lets_them_go_on(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"roles": FIXED, "update": "inPlace"}))
        await change(operator, key, engine={"args": ["--seed=2"]})
    async with started(kubeconfig, namespace) as operator:
        await operator.settle(key)
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine-decode"))["spec"]["paused"]
        await say_rolled(operator, key, "tiny-engine-prefill")
        await look_again(operator, key)
        assert "paused" not in (await fetch(operator, DEPLOYMENT, key, "tiny-engine-decode"))["spec"]


@pytest.mark.parametrize(
    ("engine", "left"),
    [
        ({"update": "surge"}, {"tiny-engine-prefill", "tiny-engine-decode"}),
        ({"args": []}, {"tiny-engine-prefill", "tiny-engine-decode"}),
        ({"roles": None, "replicas": 2}, {"tiny-engine"}),
    ],
    ids=["room for more", "reverted", "no roles"],
)
async def test_another_change_ends_the_wait_of_the_decode_engines(
    kubeconfig: Path, namespace: str, engine: Document, left: set[str]
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"roles": FIXED, "update": "inPlace"}))
        await change(operator, key, engine={"args": ["--seed=2"]})
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine-decode"))["spec"]["paused"]
        await change(operator, key, engine=engine)
        if "args" in engine:
            await say_rolled(operator, key, "tiny-engine-prefill")
            await look_again(operator, key)
        assert (await numbers(operator, key)).keys() == left
        for name in left:
            assert "paused" not in (await fetch(operator, DEPLOYMENT, key, name))["spec"]

"""Addresses that belong to another pod by now: not accepted, no token; and gateways that see no engine."""

from pathlib import Path
from typing import Any

import pytest
from cluster_api import ApiCluster
from fresh_operator import fetch_conditions, fetch_serving, served, started
from moe_operator.kubernetes.kinds import POD
from serving_documents import serving
from stand_in_peers import peers_listening

Document = dict[str, Any]


@pytest.mark.parametrize(
    ("phase", "reason"),
    [("Failed", "Evicted"), ("Failed", "NodeLost"), ("Failed", "UnexpectedAdmissionError"), ("Succeeded", "")],
)
async def test_a_pod_that_is_over_counts_nowhere_and_its_address_is_not_called(
    kubeconfig: Path, namespace: str, phase: str, reason: str
) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        address = await peers.make(operator.api, key, "engine", "tiny-engine-a")
        front = await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
        status = {"phase": phase, "reason": reason, "message": "gone"}
        for name in ("tiny-engine-a", "tiny-gateway-a"):
            await operator.api.server.merge(POD, namespace, name, {"status": status}, "kubelet", subresource="status")
        await operator.relist()
        await operator.settle(key)
        live = (await fetch_serving(operator.api, key) or {})["status"]
        assert (live["replicas"], live["readyReplicas"], live.get("engines", [])) == (0, 0, [])
        assert (await fetch_conditions(operator, key))["Ready"]["status"] == "False"
        assert peers.calls[address] == peers.calls[front] == []
        assert address not in peers.settings, "it is not even asked for its state"


@pytest.mark.parametrize("stranger", [{"name": "tiny-engine-a", "uid": "another"}, {}], ids=["another pod", "no agent"])
async def test_an_address_of_another_tenant_gets_no_token_and_is_not_accepted(
    kubeconfig: Path, namespace: str, stranger: Document
) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        address = await peers.make(operator.api, key, "engine", "tiny-engine-a")
        peers.pods[address] = stranger
        await operator.relist()
        await operator.settle(key)
        assert peers.calls[address] == []
        (engine,) = (await fetch_serving(operator.api, key) or {})["status"]["engines"]
        assert (engine["name"], engine["phase"]) == ("tiny-engine-a", "unknown")
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert (degraded["status"], degraded["reason"]) == ("True", "IdentityMismatch")


async def test_the_right_pod_gets_the_token_of_its_deployment_alone(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        tokens = {}
        for name in ("tiny", "other"):
            key = await served(operator, namespace, serving(name))
            address = await peers.make(operator.api, key, "engine", f"{name}-engine-a")
            await operator.relist()
            await operator.settle(key)
            tokens[name] = set(peers.calls[address])
        assert len(tokens["tiny"]) == len(tokens["other"]) == 1
        assert tokens["tiny"] != tokens["other"]


async def test_engines_that_no_gateway_sees_are_not_ready(serving_cluster: ApiCluster, namespace: str) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        await peers.make(operator.api, key, "engine", "tiny-engine-a")
        await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
        peers.accepting = False
        await operator.relist()
        await operator.settle(key)
        ready = (await fetch_conditions(operator, key))["Ready"]
        assert (ready["status"], ready["reason"]) == ("False", "EnginesNotSeen")
        assert await operator.reconciler.reconcile(key) == 2.0, "no event tells when a gateway sees one"
        peers.accepting = True
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Ready"]["status"] == "True"

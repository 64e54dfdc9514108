"""Whatever goes wrong in a pass stands in the status, and keeps back nothing that can go on."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from faulty_server import FaultyServer, fail, no_fault
from fresh_operator import (
    FreshOperator,
    change,
    conditions,
    connect,
    fetch,
    fetch_children,
    fetch_conditions,
    fetch_serving,
    served,
    started,
)
from moe_contract.api_server import ApiError, Kind
from moe_operator.kubernetes import reconciler as reconciler_module
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.failure import PassFailed
from moe_operator.kubernetes.kinds import CONFIG_MAP, DEPLOYMENT, POD, SERVING
from moe_operator.kubernetes.reconciler import REFUSED_S
from moe_operator.kubernetes.state_streams import StateStreams
from moe_operator.kubernetes.store import Key
from moe_operator.plan.names import LWS_GROUP_INDEX, LWS_SIZE, LWS_WORKER_INDEX, Names
from serving_documents import serving
from stand_in_peers import peers_listening

Document = dict[str, Any]
SERVICE = Kind("", "v1", "Service", "services")
ROLE = Kind("rbac.authorization.k8s.io", "v1", "Role", "roles")
WEBHOOK = ApiError(500, 'Internal error occurred: failed calling webhook "v.test": connect: connection refused')


@contextlib.asynccontextmanager
async def faulty(kubeconfig: Path, namespace: str) -> AsyncIterator[tuple[FreshOperator, FaultyServer]]:
    """An operator behind a server without faults yet."""
    async with connect(kubeconfig) as server, aiohttp.ClientSession() as session:
        front = FaultyServer(server, no_fault)
        operator = FreshOperator(Api(front), session, [namespace])  # type: ignore[arg-type]
        await operator.relist()
        yield operator, front


async def made(operator: FreshOperator, namespace: str, document: Document) -> Key:
    """Creates a resource without a pass."""
    place = document["metadata"] | {"namespace": namespace}
    operator.store.put(SERVING, await operator.api.create(SERVING, document | {"metadata": place}))
    return Key(namespace, document["metadata"]["name"])


async def reports_its_generation(operator: FreshOperator, key: Key) -> bool:
    live = await fetch_serving(operator.api, key) or {}
    return bool(live["status"]["observedGeneration"] == live["metadata"]["generation"])


async def test_an_unexpected_error_of_the_plan_stands_in_the_status_and_ends_with_its_cause(
    kubeconfig: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("startupProbe")

    async with started(kubeconfig, namespace) as operator:
        key = await made(operator, namespace, serving())
        with monkeypatch.context() as patched:
            patched.setattr(reconciler_module, "plan_cluster", broken)
            for _ in range(2):
                with pytest.raises(PassFailed):
                    await operator.reconciler.reconcile(key)
        found = await fetch_conditions(operator, key)
        assert (found["Degraded"]["status"], found["Degraded"]["reason"]) == ("True", "ReconcileError")
        assert found["Degraded"]["message"] == (
            "planning: an error in the operator itself, KeyError: 'startupProbe' "
            "(it is tried again; the operator's log has more)"
        )
        assert found["Ready"]["status"] == "False"
        assert (found["Progressing"]["status"], found["Progressing"]["reason"]) == ("False", "ReconcileError")
        assert await reports_its_generation(operator, key)
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


async def test_an_error_of_the_status_itself_stands_in_the_conditions(
    kubeconfig: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("odd pod")

    async with started(kubeconfig, namespace) as operator:
        key = await made(operator, namespace, serving())
        with monkeypatch.context() as patched:
            patched.setattr(reconciler_module, "build_status", broken)
            with pytest.raises(ValueError, match="odd pod"):
                await operator.reconciler.reconcile(key)
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert (degraded["status"], degraded["reason"]) == ("True", "ReconcileError")
        assert "an error in the operator itself, ValueError: odd pod" in degraded["message"]
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


@pytest.mark.parametrize(
    "labels",
    [{LWS_WORKER_INDEX: "0", LWS_GROUP_INDEX: "x"}, {LWS_WORKER_INDEX: "x"}, {LWS_WORKER_INDEX: "0"}],
    ids=str,
)
async def test_a_pod_of_somebody_with_the_labels_of_an_engine_fails_no_pass(
    kubeconfig: Path, namespace: str, labels: dict[str, str]
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace)
        own = Names("tiny").labels("engine", "stable") | labels
        metadata = {"name": "stray", "namespace": namespace, "labels": own, "annotations": {LWS_SIZE: "big"}}
        spec = {"containers": [{"name": "a", "image": "a"}]}
        await operator.api.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        await operator.relist()
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


async def test_an_error_before_the_plan_stands_in_the_status(kubeconfig: Path, namespace: str) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front):
        key = await made(operator, namespace, serving())
        front.fault = fail("apply", "MoEServing", ApiError(500, "etcdserver: leader changed"))
        with pytest.raises(ApiError):
            await operator.reconciler.reconcile(key)
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "ReconcileError"
        assert degraded["message"].startswith("the API server answered 500: etcdserver: leader changed")


@pytest.mark.parametrize(
    "error", [WEBHOOK, ApiError(403, "denied"), ApiError(500, "duplicate entries"), ApiError(404, "?")]
)
async def test_an_object_that_is_refused_keeps_back_no_other(kubeconfig: Path, namespace: str, error: ApiError) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front):
        key = await made(operator, namespace, serving())
        front.fault = fail("apply", "NetworkPolicy", error, "tiny-engine")
        assert await operator.reconciler.reconcile(key) == REFUSED_S
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "Refused"
        assert degraded["message"] == f"NetworkPolicy {namespace}/tiny-engine: {error.message}"
        there = await fetch_children(operator.api, namespace)
        assert ("NetworkPolicy", "tiny-gateway") in there
        assert {("Deployment", "tiny-engine"), ("Deployment", "tiny-gateway")} <= there.keys()
        front.fault = no_fault
        await operator.settle(key)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


async def test_a_refused_change_of_pods_is_held_back_as_a_whole_and_the_rest_goes_on(
    kubeconfig: Path, namespace: str
) -> None:
    """What runs goes on; a lost object comes back, and another number of engines is taken."""
    async with faulty(kubeconfig, namespace) as (operator, front):
        key = await served(operator, namespace, serving(gateway={"replicas": 1}))
        settings = await fetch(operator, CONFIG_MAP, key, "tiny-settings")
        front.fault = fail("apply", "Deployment", WEBHOOK, "tiny-gateway")
        await operator.api.delete(SERVICE, {"metadata": {"name": "tiny", "namespace": namespace}})
        spec = {"engine": {"replicas": 4}, "gateway": {"podTemplate": {"spec": {"priorityClassName": "none"}}}}
        await change(operator, key, **spec)
        assert (await fetch_conditions(operator, key))["Degraded"]["message"].startswith(
            f"Deployment {namespace}/tiny-gateway: {WEBHOOK.message}"
        )
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 4
        assert ("Service", "tiny") in await fetch_children(operator.api, namespace)
        await change(operator, key, engine={"args": ["--seed=1"]})
        engines = await fetch(operator, DEPLOYMENT, key, "tiny-engine")
        assert "--seed=1" not in str(engines["spec"]["template"]["metadata"]["annotations"])
        assert (await fetch(operator, CONFIG_MAP, key, "tiny-settings"))["data"] == settings["data"]


async def test_settings_reach_what_runs_though_an_object_is_refused(kubeconfig: Path, namespace: str) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front), peers_listening() as peers:
        key = await served(operator, namespace)
        address = await peers.make(operator.api, key, "engine", "tiny-engine-0")
        await operator.relist()
        front.fault = fail("apply", "Deployment", WEBHOOK)
        await change(operator, key, engine={"replicas": 3}, scheduling={"request": {"policy": "fcfs"}})
        assert peers.settings[address]["request"]["policy"] == "fcfs"
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert status["readyReplicas"] == 1
        assert conditions({"status": status})["Degraded"]["reason"] == "Refused"


async def test_a_part_that_fails_unexpectedly_is_named_and_the_others_go_on(
    kubeconfig: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise ValueError("odd pod")

    async with started(kubeconfig, namespace) as operator:
        key = await made(operator, namespace, serving())
        monkeypatch.setattr(reconciler_module, "mark_victims", broken)
        monkeypatch.setattr(StateStreams, "fetch", broken)
        with pytest.raises(PassFailed):
            await operator.reconciler.reconcile(key)
        assert ("Deployment", "tiny-engine") in await fetch_children(operator.api, namespace)
        message = (await fetch_conditions(operator, key))["Degraded"]["message"]
        assert "asking engines and gateways: an error in the operator itself, ValueError: odd pod" in message
        assert "marking engines that may go: an error in the operator itself, ValueError: odd pod" in message


async def test_a_mistake_that_the_api_server_alone_finds_has_its_words(kubeconfig: Path, namespace: str) -> None:
    template = {"spec": {"resourceClaims": [{"name": "gpus"}]}}
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"podTemplate": template}))
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "Refused"
        assert f"Deployment {namespace}/tiny-engine: " in degraded["message"]
        assert "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`" in degraded["message"]
        there = await fetch_children(operator.api, namespace)
        assert ("Service", "tiny") in there
        assert not {kind for kind, _ in there} & {"Deployment", "ConfigMap"}, "nothing starts in part"
        await change(operator, key, engine={"podTemplate": {"spec": {"toleration": []}}})
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "InvalidSpec"
        assert degraded["message"].startswith(
            "spec.engine.podTemplate.spec.toleration: unknown field; nearest known: t"
        )
        await change(operator, key, engine={"podTemplate": None})
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"


async def test_where_the_api_server_is_away_amid_a_pass_the_status_says_so(kubeconfig: Path, namespace: str) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front), peers_listening() as peers:
        key = await served(operator, namespace)
        await peers.make(operator.api, key, "engine", "tiny-engine-0")
        await operator.relist()
        front.fault = fail("apply", "Deployment", ApiError(503, "apiserver is shutting down"))
        await operator.api.merge(SERVING, *key, {"spec": {"engine": {"replicas": 3}}})
        await operator.relist()
        with pytest.raises(PassFailed):
            await operator.reconciler.reconcile(key)
        status = (await fetch_serving(operator.api, key) or {})["status"]
        degraded = conditions({"status": status})["Degraded"]
        assert degraded["reason"] == "ReconcileError"
        assert degraded["message"].startswith("the API server answered 503: apiserver is shutting down")
        assert [row["phase"] for row in status["engines"]] == ["ready"], "what engines say is still reported"


async def test_an_object_that_exists_and_cannot_be_looked_at_keeps_back_no_other(
    kubeconfig: Path, namespace: str
) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front):
        key = await made(operator, namespace, serving())
        metadata = {"name": "tiny-gateway", "namespace": namespace}
        role = {"apiVersion": ROLE.api_version, "kind": ROLE.name, "metadata": metadata, "rules": []}
        await operator.api.create(ROLE, role)
        front.fault = fail("get", "Role", ApiError(403, "roles is forbidden"))
        assert await operator.reconciler.reconcile(key) == REFUSED_S
        message = (await fetch_conditions(operator, key))["Degraded"]["message"]
        assert message == f"Role {namespace}/tiny-gateway: roles is forbidden"
        assert ("Deployment", "tiny-engine") in await fetch_children(operator.api, namespace)
        front.fault = no_fault
        assert not (await operator.api.get(ROLE, namespace, "tiny-gateway") or {}).get("rules"), "it is left as it is"


async def test_an_event_that_is_refused_fails_no_pass(kubeconfig: Path, namespace: str) -> None:
    async with faulty(kubeconfig, namespace) as (operator, front):
        front.fault = fail("create", "Event", ApiError(403, "events is forbidden"))
        key = await served(operator, namespace)
        assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"

"""The life of a resource, pass by pass: changes in place and by new pods, pause, canary, rotation, the end."""

import json
from pathlib import Path
from typing import Any

import pytest
from cluster_api import ApiCluster
from cluster_problem import ClusterProblem
from fresh_operator import (
    FreshOperator,
    change,
    fetch,
    fetch_all,
    fetch_children,
    fetch_conditions,
    fetch_serving,
    served,
    started,
    writes,
)
from moe_operator.kubernetes import observed
from moe_operator.kubernetes.ending import FINALIZER
from moe_operator.kubernetes.kinds import CLAIM, CONFIG_MAP, DEPLOYMENT, POD, SECRET, SERVING
from moe_operator.kubernetes.store import Key
from moe_operator.plan.names import INSTANCE
from serving_documents import serving
from stand_in_peers import peers_listening

Document = dict[str, Any]
CACHE = {"path": "/cache", "size": "1Gi", "storageClass": "fast"}


async def templates(operator: FreshOperator, key: Key) -> dict[str, Document]:
    found = await fetch_all(operator.api, DEPLOYMENT, key.namespace)
    return {row["metadata"]["name"]: row["spec"]["template"] for row in found}


async def test_a_policy_reaches_what_runs_and_what_starts_and_no_pod_template_changes(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        engine = await peers.make(operator.api, key, "engine", "tiny-engine-a")
        gateway = await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
        before = await templates(operator, key)
        scheduling = {
            "request": {"policy": "sjf", "ageingRate": 123.0},
            "engine": {"policy": "leastRequests", "staleAfter": "5s"},
        }
        await change(operator, key, scheduling=scheduling)
        assert peers.settings[engine]["request"]["ageing_rate"] == 123.0
        assert peers.settings[gateway]["request"]["ageing_rate"] == 123.0
        assert peers.settings[gateway]["dispatch"]["policy"] == "leastRequests"
        assert peers.settings[gateway]["dispatch"]["stale_after_s"] == 5.0
        files = (await fetch(operator, CONFIG_MAP, key, "tiny-settings"))["data"]
        assert json.loads(files["request.json"])["request"]["ageing_rate"] == 123.0
        assert json.loads(files["gateway.json"])["dispatch"]["policy"] == "leastRequests"
        assert await templates(operator, key) == before
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert status["policies"] == {"request": "sjf", "engine": "leastRequests"}


async def test_a_peer_that_will_not_take_its_settings_is_asked_again_soon(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        engine = await peers.make(operator.api, key, "engine", "tiny-engine-a")
        peers.tokens = {"another"}
        await operator.relist()
        assert await operator.reconciler.reconcile(key) == 2.0
        assert "request" not in peers.settings[engine]
        peers.tokens = None
        await operator.reconciler.reconcile(key)
        assert peers.settings[engine]["request"]["policy"] == "sjf"


@pytest.mark.parametrize(
    ("update", "rolling"),
    [("surge", {"maxSurge": 1, "maxUnavailable": 0}), ("inPlace", {"maxSurge": 0, "maxUnavailable": 1})],
)
async def test_what_only_a_start_can_change_rolls_the_engines_and_not_the_gateways(
    kubeconfig: Path, namespace: str, update: str, rolling: Document
) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"update": update}))
        before = await templates(operator, key)
        await change(operator, key, engine={"args": ["--seed=7"]})
        after = await templates(operator, key)
        assert after["tiny-gateway"] == before["tiny-gateway"]
        assert after["tiny-engine"] != before["tiny-engine"]
        config = json.loads(after["tiny-engine"]["metadata"]["annotations"]["moeserving.dev/config"])
        assert config["engine"]["args"] == ["--seed=7"]
        deployment = await fetch(operator, DEPLOYMENT, key, "tiny-engine")
        assert deployment["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": rolling}
        progress = (await fetch_conditions(operator, key))["Progressing"]
        assert (progress["status"], progress["reason"]) == ("True", "Updating")
        assert "tiny-engine: 0 of 1 pods are up to date" in progress["message"]


async def test_the_mode_of_updating_itself_rolls_nothing(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving())
        before = await templates(operator, key)
        await change(operator, key, engine={"update": "inPlace", "replicas": 5})
        assert await templates(operator, key) == before
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 5


@pytest.mark.parametrize("field", [{"storageClass": "slow"}, {"accessMode": "ReadWriteOnce"}], ids=str)
async def test_a_field_that_cannot_change_is_refused_with_a_message(
    serving_cluster: ApiCluster, namespace: str, field: Document
) -> None:
    async with started(serving_cluster.kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(model={"uri": "hf://org/tiny", "cache": CACHE}))
        patch = json.dumps({"spec": {"model": {"cache": field}}})
        with pytest.raises(ClusterProblem, match=rf"spec\.model\.cache\.{next(iter(field))}.*cannot change"):
            serving_cluster.kubectl("patch", "-n", namespace, "moes/tiny", "--type=merge", "-p", patch)
        assert (await fetch(operator, CLAIM, key, "tiny-cache"))["spec"]["storageClassName"] == "fast"


async def test_a_claim_that_would_shrink_is_reported_and_the_rest_stays(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(model={"uri": "hf://org/tiny", "cache": CACHE}))
        before = await templates(operator, key)
        await operator.api.merge(
            SERVING, *key, {"spec": {"model": {"cache": {"size": "1Mi"}}, "engine": {"args": ["-x"]}}}
        )
        await operator.relist()
        await operator.settle(key)
        degraded = (await fetch_conditions(operator, key))["Degraded"]
        assert degraded["reason"] == "Refused"
        assert f"PersistentVolumeClaim {namespace}/tiny-cache" in degraded["message"]
        assert await templates(operator, key) == before


async def test_while_it_is_paused_nothing_changes_and_then_all_does(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving())
        before = await fetch_children(operator.api, namespace)
        await change(operator, key, paused=True, engine={"args": ["--seed=7"], "replicas": 3})
        await operator.api.delete(CONFIG_MAP, before["ConfigMap", "tiny-settings"])
        await operator.relist()
        await operator.settle(key)
        paused = (await fetch_conditions(operator, key))["Paused"]
        assert (paused["status"], paused["reason"]) == ("True", "Paused")
        status = (await fetch_serving(operator.api, key) or {})["status"]
        assert status["desiredReplicas"] == 1, "what is left as it is, not what the resource says by now"
        after = await fetch_children(operator.api, namespace)
        assert after == {place: row for place, row in before.items() if place != ("ConfigMap", "tiny-settings")}
        await change(operator, key, paused=False)
        assert (await fetch_conditions(operator, key))["Paused"]["status"] == "False"
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine"))["spec"]["replicas"] == 3
        assert ("ConfigMap", "tiny-settings") in await fetch_children(operator.api, namespace)


async def test_what_is_paused_can_be_deleted(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving())
        await change(operator, key, paused=True)
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        await operator.relist()
        await operator.settle(key)
        assert await fetch_serving(operator.api, key) is None
        assert await fetch_children(operator.api, namespace) == {}


def engine_arguments(template: Document) -> list[str]:
    config: Document = json.loads(template["metadata"]["annotations"]["moeserving.dev/config"])
    return list(config["engine"].get("args", []))


async def groups(operator: FreshOperator, key: Key) -> list[Document]:
    files = (await fetch(operator, CONFIG_MAP, key, "tiny-settings"))["data"]
    return list(json.loads(files["gateway.json"])["groups"])


async def test_a_canary_stands_beside_the_old_revision_and_takes_its_place_when_it_has_all(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving(engine={"args": ["--seed=1"], "canary": {"weight": 20}}))
        assert set(await templates(operator, key)) == {"tiny-engine", "tiny-gateway"}, "nothing differs yet"
        gateway = await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
        old = (await templates(operator, key))["tiny-engine"]

        await change(operator, key, engine={"args": ["--seed=2"], "canary": {"weight": 20, "replicas": 2}})
        both = await templates(operator, key)
        assert both["tiny-engine"] == old
        assert engine_arguments(both["tiny-engine-canary"]) == ["--seed=2"]
        assert (await fetch(operator, DEPLOYMENT, key, "tiny-engine-canary"))["spec"]["replicas"] == 2
        weights = [{"service": "tiny-engine", "weight": 80}, {"service": "tiny-engine-canary", "weight": 20}]
        assert await groups(operator, key) == weights == peers.settings[gateway]["groups"]

        await change(operator, key, engine={"canary": {"weight": 60}})
        assert await templates(operator, key) == both, "a weight restarts nothing"
        assert [row["weight"] for row in peers.settings[gateway]["groups"]] == [40, 60]

        await change(operator, key, engine={"canary": {"weight": 100}})
        after = await templates(operator, key)
        assert set(after) == {"tiny-engine", "tiny-gateway"}
        assert engine_arguments(after["tiny-engine"]) == ["--seed=2"]
        assert await groups(operator, key) == [{"service": "tiny-engine", "weight": 100}]


async def test_putting_the_old_values_back_ends_a_canary_and_rolls_nothing(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving(engine={"args": ["--seed=1"], "canary": {"weight": 20}}))
        before = await templates(operator, key)
        await change(operator, key, engine={"args": ["--seed=2"]})
        assert "tiny-engine-canary" in await templates(operator, key)
        await change(operator, key, engine={"args": ["--seed=1"]})
        assert await templates(operator, key) == before


async def test_the_end_takes_the_gateway_then_the_engines_then_all_else(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        await peers.make(operator.api, key, "engine", "tiny-engine-a")
        await peers.make(operator.api, key, "gateway", "tiny-gateway-a")
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        kinds = {kind for kind, _ in await fetch_children(operator.api, namespace)}

        async def pass_again() -> set[tuple[str, str]]:
            await operator.relist()
            await operator.reconciler.reconcile(key)
            return set(await fetch_children(operator.api, namespace))

        left = await pass_again()
        assert ("Deployment", "tiny-gateway") not in left
        assert ("Deployment", "tiny-engine") in left, "an engine serves the gateways' streams until these are gone"
        assert await pass_again() == left
        await operator.api.delete(POD, {"metadata": {"name": "tiny-gateway-a", "namespace": namespace}})
        left = await pass_again()
        assert ("Deployment", "tiny-engine") not in left
        assert {kind for kind, _ in left} == kinds - {"Deployment"}, "a pod that ends still needs its settings"
        assert await pass_again() == left
        await operator.api.delete(POD, {"metadata": {"name": "tiny-engine-a", "namespace": namespace}})
        await operator.settle(key)
        await operator.relist()
        await operator.settle(key)
        assert await fetch_children(operator.api, namespace) == {}
        assert await fetch_serving(operator.api, key) is None


async def test_what_was_deleted_and_made_anew_at_once_becomes_real_anew(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving())
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        await operator.relist()
        await operator.settle(key)
        again = await served(operator, namespace, serving(engine={"replicas": 2}))
        uid = (await fetch_serving(operator.api, again) or {})["metadata"]["uid"]
        owners = {
            row["metadata"]["ownerReferences"][0]["uid"]
            for row in (await fetch_children(operator.api, namespace)).values()
        }
        assert owners == {uid}


def tokens(secret: Document) -> list[str]:
    return str(observed.base64.b64decode(secret["data"]["token"]).decode()).split()


async def rotate(operator: FreshOperator, key: Key, value: str) -> list[str]:
    """The tokens after a word to the resource, as docs/operations.md has it."""
    await operator.api.merge(SERVING, *key, {"metadata": {"annotations": {"moeserving.dev/rotate-token": value}}})
    await operator.relist()
    await operator.settle(key)
    return tokens(await fetch(operator, SECRET, key, "tiny-control"))


async def test_another_control_token_is_made_on_demand_and_the_old_one_serves_until_all_have_the_new(
    kubeconfig: Path, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(kubeconfig, namespace) as operator, peers_listening() as peers:
        key = await served(operator, namespace, serving())
        engine = await peers.make(operator.api, key, "engine", "tiny-engine-a")
        (first,) = tokens(await fetch(operator, SECRET, key, "tiny-control"))
        peers.tokens = {first}
        before = await templates(operator, key)
        second, old = await rotate(operator, key, "2026-01-01")
        assert old == first != second
        assert await rotate(operator, key, "2026-01-01") == [second, first], "one word makes one token"
        assert await templates(operator, key) == before, "no pod restarts for it"

        await change(operator, key, scheduling={"request": {"policy": "fcfs"}})
        assert peers.settings[engine]["request"]["policy"] == "fcfs", "a pod that knows the old one alone"
        peers.tokens = {second, first}
        await change(operator, key, scheduling={"request": {"policy": "sjf"}})
        assert peers.settings[engine]["request"]["policy"] == "sjf"

        monkeypatch.setattr(observed, "TOKEN_OVERLAP", -observed.TOKEN_OVERLAP)
        await operator.settle(key)
        assert tokens(await fetch(operator, SECRET, key, "tiny-control")) == [second]
        monkeypatch.undo()
        third, last = await rotate(operator, key, "2026-02-01")
        assert last == second
        assert third not in (first, second)


async def test_a_token_that_someone_emptied_is_made_anew(kubeconfig: Path, namespace: str) -> None:
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, serving())
        await operator.api.merge(SECRET, namespace, "tiny-control", {"data": {"token": ""}})
        await operator.relist()
        await operator.settle(key)
        (token,) = tokens(await fetch(operator, SECRET, key, "tiny-control"))
        assert len(token) > 40


async def test_names_of_63_characters_that_differ_at_their_end_alone_have_children_of_their_own(
    kubeconfig: Path, namespace: str
) -> None:
    async with started(kubeconfig, namespace) as operator:
        names = ["n" * 62 + last for last in "ab"]
        for name in names:
            canary = {"args": ["--seed=1"], "canary": {"weight": 5}}
            key = await served(
                operator, namespace, serving(name, engine=canary, model={"uri": "hf://org/t", "cache": CACHE})
            )
            await change(operator, key, engine={"args": ["--seed=2"]})
            assert (await fetch_conditions(operator, key))["Degraded"]["status"] == "False"
        found = await fetch_children(operator.api, namespace)
        owned = {name: [] for name in names}
        for (kind, child), document in found.items():
            owned[document["metadata"]["labels"][INSTANCE]].append(kind)
            assert len(child) <= (46 if kind == "Deployment" else 63)
        first, second = (sorted(kinds) for kinds in owned.values())
        assert first == second
        assert first.count("Deployment") == 3
        before = writes(operator.api)
        for name in names:
            await operator.settle(Key(namespace, name))
        assert writes(operator.api) == before


async def test_two_of_one_name_in_two_namespaces_do_not_meet(serving_cluster: ApiCluster, namespace: str) -> None:
    other = f"{namespace}-b"
    serving_cluster.kubectl("create", "namespace", other)
    async with started(serving_cluster.kubeconfig, namespace, other) as operator:
        here = await served(operator, namespace, serving(engine={"replicas": 1}))
        there = await served(operator, other, serving(engine={"replicas": 2}))
        await operator.api.delete(SERVING, {"metadata": {"name": "tiny", "namespace": namespace}})
        await operator.relist()
        for key in (here, there):
            await operator.settle(key)
        assert await fetch_children(operator.api, namespace) == {}
        assert (await fetch(operator, DEPLOYMENT, there, "tiny-engine"))["spec"]["replicas"] == 2
    serving_cluster.kubectl("delete", "namespace", other, "--wait=false")


async def test_a_finalizer_that_came_with_the_resource_goes_with_it_and_one_of_others_stays(
    kubeconfig: Path, namespace: str
) -> None:
    """As of a backup that was restored: the operator does not own that field."""
    document = serving()
    document = document | {"metadata": document["metadata"] | {"finalizers": [FINALIZER, "other.test/hold"]}}
    async with started(kubeconfig, namespace) as operator:
        key = await served(operator, namespace, document)
        await operator.api.delete(SERVING, {"metadata": {"name": key.name, "namespace": namespace}})
        await operator.relist()
        await operator.settle(key)
        left = await fetch_serving(operator.api, key)
        assert left is not None
        assert left["metadata"]["finalizers"] == ["other.test/hold"]
        assert await fetch_children(operator.api, namespace) == {}
        await operator.api.merge(SERVING, namespace, key.name, {"metadata": {"finalizers": []}})
        assert await fetch_serving(operator.api, key) is None

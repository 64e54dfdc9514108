"""Seams of the operator: numbers in a takeover, remains of earlier resources, rights and objects that lack."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from moe_contract.api_server import FORBIDDEN, ApiError
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.kinds import CONFIG_MAP, DEPLOYMENT, LEADER_WORKER_SET
from moe_operator.kubernetes.observed import read_observed
from moe_operator.kubernetes.operator import Operator
from moe_operator.kubernetes.presence import Role
from moe_operator.kubernetes.rivals import FORMER_LEASE, Rival, Rivals
from moe_operator.kubernetes.serving import GatewayEndpoints
from moe_operator.kubernetes.store import Key
from moe_operator.kubernetes.takeover import read_takeover
from moe_operator.kubernetes.victims import mark_victims
from moe_operator.plan import Observed
from moe_operator.plan.names import OWNER
from moe_operator.plan.owners import SENTINEL, is_orphaned
from moe_operator.plan.replicas import Scaled
from moe_operator.plan.revision import build_revision
from pods import pod

Document = dict[str, Any]
KEY = Key("ns", "tiny")


def serving(**spec: Any) -> Any:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return parse_resource(header | {"spec": {"model": {"uri": "hf://org/tiny"}} | spec})


class Objects:
    """Stands in for the store: objects by kind and name."""

    def __init__(self, *objects: tuple[Any, Document]) -> None:
        self.objects = {(kind.name, row["metadata"]["name"]): row for kind, row in objects}

    def get(self, key: Key, kind: Any, name: str) -> Document | None:
        return self.objects.get((kind.name, name))

    def children(self, key: Key, kinds: Any) -> list[Any]:
        return [(kind, row) for kind in kinds for (name, _), row in self.objects.items() if name == kind.name]

    def put(self, kind: Any, document: Document) -> None:
        raise AssertionError("nothing was changed")


class Refusing:
    """Stands in for the API: refuses every call."""

    def __init__(self, status: int) -> None:
        self.status = status

    async def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ApiError(self.status, "no")

    merge = select = list = _refuse

    async def get(self, *_: Any) -> None:
        return None


def test_a_takeover_keeps_the_number_that_another_manager_set():
    old = {"metadata": {"name": "tiny-engine"}, "spec": {"replicas": 10}}
    resource = serving(engine={"replicas": 2, "parallelism": {"tensor": 16, "nodes": 2}})
    observed = Observed(uid="u", tokens=("t",), scaled={("Deployment", "tiny-engine"): Scaled(count=10)})
    store: Any = Objects((DEPLOYMENT, old))
    ready = [{"type": "Ready", "status": "True"}]
    labels = {"moeserving.dev/revision": "stable", "app.kubernetes.io/component": "engine"}
    pods = [
        {"metadata": {"name": f"e-{at}", "labels": labels}, "spec": {}, "status": {"conditions": ready}}
        for at in range(10)
    ]
    found = read_takeover(store, KEY, resource, observed, pods, {DEPLOYMENT, LEADER_WORKER_SET})
    assert found is not None
    assert (found.wanted, found.old_replicas, found.new_replicas) == (10, 10, 1)


def test_a_canary_does_not_take_the_place_of_a_revision_that_this_release_cannot_use():
    settings = {"metadata": {"name": "tiny-settings"}, "data": {"revision.json": '{"model": {"unknown": 1}}'}}
    document = {"metadata": {"name": "tiny", "namespace": "ns", "uid": "u"}}
    store: Any = Objects((CONFIG_MAP, settings))

    def read(**engine: Any) -> Observed:
        return read_observed(store, KEY, document, serving(engine=engine), frozenset(), datetime.now(UTC))

    with pytest.raises(InvalidInput, match=r"spec\.engine\.canary: .* set weight to 100"):
        read(canary={"weight": 5})
    assert read(canary={"weight": 100}).stable is None
    assert read().stable is None


def test_the_end_of_the_claim_is_no_part_of_a_revision():
    cache = {"path": "/cache", "size": "1Gi"}
    kept, ended = (
        serving(model={"uri": "hf://a/b", "cache": cache | more}) for more in ({}, {"whenDeleted": "Delete"})
    )
    assert build_revision(kept).digest == build_revision(ended).digest


def test_remains_of_an_earlier_resource_say_nothing_of_the_deletion_of_this_one():
    def budget(owner: str, *uids: str) -> Document:
        owners = [{"kind": "MoEServing", "uid": uid} for uid in uids]
        return {"kind": SENTINEL, "metadata": {"annotations": {OWNER: owner}, "ownerReferences": owners}}

    resource = {"metadata": {"uid": "new", "finalizers": []}}
    assert not is_orphaned(resource, [budget("old", "old"), budget("new", "new")])
    assert is_orphaned(resource, [budget("new")])


async def test_endpoints_that_cannot_be_read_fail_no_status():
    endpoints = GatewayEndpoints(Refusing(FORBIDDEN))  # type: ignore[arg-type]
    assert await endpoints.has_ready(KEY, "tiny", [pod("tiny-gateway-0", "gateway")]) is False


async def test_an_engine_that_ends_while_it_is_marked_fails_no_pass():
    store: Any = Objects((DEPLOYMENT, {"metadata": {"name": "tiny-engine"}, "spec": {"replicas": 2}}))
    plan: Any = SimpleNamespace(replicas=1, roles=())
    pods = [pod(f"tiny-engine-{at}", "engine") for at in range(2)]
    await mark_victims(Refusing(404), store, KEY, plan, pods, States())  # type: ignore[arg-type]
    with pytest.raises(ApiError):
        await mark_victims(Refusing(500), store, KEY, plan, pods, States())  # type: ignore[arg-type]


async def test_without_the_right_to_list_leases_an_operator_leads_all_the_same():
    rivals = Rivals(Refusing(FORBIDDEN), "here", "own", "a")  # type: ignore[arg-type]
    assert await rivals.find() == []


@pytest.mark.parametrize(
    ("place", "role"),
    [("here/own", Role.STANDS_BY), (f"here/{FORMER_LEASE}", Role.STANDS_BY), ("there/own", Role.RIVALLED)],
)
def test_the_pod_that_a_rollout_replaces_is_no_rival(place: str, role: Role):
    synced = asyncio.Event()
    synced.set()
    operator: Any = SimpleNamespace(
        _settings=SimpleNamespace(own_namespace="here", lease="own"),
        _election=SimpleNamespace(rivals=[Rival(place=place, scope="a")], leading=asyncio.Event()),
        _watches=SimpleNamespace(synced=synced, sight=SimpleNamespace(unreadable=list)),
    )
    assert Operator._describe(operator).role is role

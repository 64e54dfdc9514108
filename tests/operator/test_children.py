"""What is applied and what is held back when objects are refused, against an API server in memory."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.api_server import CONFLICT, NOT_FOUND, ApiError, Kind
from moe_operator.api import parse_resource
from moe_operator.kubernetes.children import Applied, Children
from moe_operator.kubernetes.kinds import CHILDREN, CLAIM, SERVING, kind_of
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.names import KEPT
from moe_operator.plan.owners import is_child

Document = dict[str, Any]
Place = tuple[str, str]
KEY, UID = Key("ns", "tiny"), "u"
CACHE = {"path": "/cache", "size": "1Gi"}
REFUSAL = ApiError(422, "must not be")


class MemoryApi:
    """Keeps what is applied; `refuses` says which place is refused with which error."""

    def __init__(self) -> None:
        self.objects: dict[Place, Document] = {}
        self.refuses: Callable[[Place], ApiError | None] = lambda _place: None
        self.unreadable: set[Place] = set()
        self.undeletable: set[Place] = set()
        self.unreadable_status = 403
        self.reads = self.writes = self.dry_runs = 0
        self._version = 0

    async def apply(
        self, kind: Kind, document: Document, *, dry_run: bool = False, create_only: bool = False
    ) -> Document:
        place = kind.name, document["metadata"]["name"]
        self.dry_runs += dry_run
        if create_only and place in self.objects:
            raise ApiError(CONFLICT, "exists")
        if (error := self.refuses(place)) is not None:
            raise error
        self.writes += not dry_run
        return document if dry_run else self._keep(place, document)

    async def get(self, kind: Kind, _namespace: str, name: str) -> Document | None:
        self.reads += 1
        if (kind.name, name) in self.unreadable:
            raise ApiError(self.unreadable_status, "forbidden")
        return self.objects.get((kind.name, name))

    async def merge(self, kind: Kind, _namespace: str, name: str, patch: Document) -> Document:
        if (live := self.objects.get((kind.name, name))) is None:
            raise ApiError(NOT_FOUND, "gone")
        metadata = live["metadata"] | patch["metadata"]
        return self._keep((kind.name, name), live | {"metadata": metadata})

    async def delete(self, kind: Kind, document: Document) -> None:
        place = kind.name, document["metadata"]["name"]
        if place in self.undeletable:
            raise ApiError(503, "away")
        self.objects.pop(place, None)

    def _keep(self, place: Place, document: Document) -> Document:
        self._version += 1
        uid = self.objects.get(place, {}).get("metadata", {}).get("uid", f"{self._version}")
        metadata = document["metadata"] | {"resourceVersion": f"{self._version}", "uid": uid}
        self.objects[place] = document | {"metadata": metadata}
        return self.objects[place]


class Cluster:
    """One resource's children over that server."""

    def __init__(self) -> None:
        self.api, self.store, self.kept = MemoryApi(), Store(), list[str]()
        self.children = Children(self.api, self.store, self._say_kept)  # type: ignore[arg-type]

    async def _say_kept(self, _key: Key, name: str) -> None:
        self.kept.append(name)

    def apply(self, *, has_templates: bool = True, **spec: Any) -> Applied:
        applying = self.children.apply(KEY, plan(**spec), frozenset(CHILDREN), UID, has_templates=has_templates)
        return asyncio.run(applying)

    def prune(self, objects: tuple[Document, ...]) -> bool:
        return asyncio.run(self.children.prune(KEY, objects, UID))

    def release_claims(self) -> None:
        asyncio.run(self.children.release_claims(KEY))

    def refuse(self, *places: Place, error: ApiError = REFUSAL) -> None:
        self.api.refuses = lambda place: error if place in places else None

    def serve(self, *, ends: bool, **cache: Any) -> None:
        """Puts the resource itself into the store."""
        deleted = {"deletionTimestamp": "now"} if ends else {}
        metadata = {"name": "tiny", "namespace": "ns", "uid": UID, "resourceVersion": "1", **deleted}
        self.store.put(SERVING, {"metadata": metadata, "spec": {"model": {"cache": CACHE | cache}}})


def plan(**spec: Any) -> tuple[Document, ...]:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    resource = parse_resource(header | {"spec": {"model": {"uri": "hf://org/a", "cache": CACHE}, **spec}})
    return plan_cluster(resource, "ns", Observed(uid=UID, tokens=("t",)), Defaults()).objects


def places(objects: tuple[Document, ...]) -> set[Place]:
    return {(kind_of(entry).name, entry["metadata"]["name"]) for entry in objects}


ENGINES, GATEWAYS, SETTINGS = (
    ("Deployment", "tiny-engine"),
    ("Deployment", "tiny-gateway"),
    ("ConfigMap", "tiny-settings"),
)
CACHE_CLAIM = ("PersistentVolumeClaim", "tiny-cache")
OF_A_REVISION = {ENGINES, GATEWAYS, SETTINGS, CACHE_CLAIM}
ALL = sorted(places(plan()))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(ALL)))
def test_the_first_workloads_without_a_users_part_are_not_tried(refused: set[Place]) -> None:
    cluster = Cluster()
    cluster.refuse(*refused)
    result = cluster.apply(has_templates=False)
    held = OF_A_REVISION if CACHE_CLAIM in refused else set()
    assert cluster.api.objects.keys() == set(ALL) - refused - held
    assert {text.split(":")[0] for text in result.refused} >= {
        f"Deployment ns/{name}" for _, name in refused & {ENGINES, GATEWAYS} - held
    }
    cluster.refuse()
    assert cluster.apply(has_templates=False).refused == []
    assert cluster.api.objects.keys() == set(ALL)


def test_workloads_that_follow_others_are_tried_and_claims_always_are() -> None:
    cluster = Cluster()
    cluster.apply(has_templates=False)
    assert cluster.api.dry_runs == 1
    changed = {"engine": {"args": ["--max-model-len=64"]}}
    cluster.refuse(ENGINES)
    before = dict(cluster.api.objects)
    assert cluster.apply(has_templates=False, **changed).refused
    assert cluster.api.objects == before
    assert cluster.api.dry_runs > 1


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(ALL)), st.sampled_from([REFUSAL, ApiError(500, "webhook away"), ApiError(403, "quota")]))
def test_of_a_new_resource_all_is_made_but_what_is_refused_and_what_belongs_to_it(
    refused: set[Place], error: ApiError
) -> None:
    cluster = Cluster()
    cluster.refuse(*refused, error=error)
    result = cluster.apply()
    is_held = refused & {ENGINES, GATEWAYS, CACHE_CLAIM}
    wanted = set(ALL) - refused - (OF_A_REVISION if is_held else set())
    assert cluster.api.objects.keys() == wanted
    reported = {text.split(":")[0] for text in result.refused}
    assert {f"{kind} ns/{name}" for kind, name in refused - ({SETTINGS} if is_held else set())} == reported
    assert all(text.endswith(error.message) for text in result.refused)
    cluster.refuse()
    assert cluster.apply().refused == []
    assert cluster.api.objects.keys() == set(ALL)


@pytest.mark.parametrize("status", [0, 401, 429, 503, 504])
def test_an_api_server_that_is_away_ends_the_pass(status: int) -> None:
    cluster = Cluster()
    cluster.refuse(("Service", "tiny"), error=ApiError(status, "away"))
    with pytest.raises(ApiError):
        cluster.apply()


@pytest.mark.parametrize(
    ("refused", "spec", "engines", "gateway_rolls"),
    [
        (GATEWAYS, {"engine": {"replicas": 4}, "gateway": {"image": "x:2"}}, (4, False), False),
        (GATEWAYS, {"engine": {"args": ["--seed=1"]}, "gateway": {"image": "x:2"}}, (1, False), False),
        (ENGINES, {"engine": {"args": ["--seed=1"]}, "gateway": {"image": "x:2"}}, (1, False), False),
        (ENGINES, {"engine": {"replicas": 4}, "gateway": {"image": "x:2"}}, (1, False), True),
        (ENGINES, {"engine": {"args": ["--seed=1"]}, "gateway": {"replicas": 3}}, (1, False), False),
        (None, {"engine": {"args": ["--seed=1"], "replicas": 4}, "gateway": {"image": "x:2"}}, (4, True), True),
    ],
)
def test_a_refused_change_of_pods_leaves_all_pods_and_another_number_is_taken(
    refused: Place | None, spec: Document, engines: tuple[int, bool], gateway_rolls: bool
) -> None:
    cluster = Cluster()
    cluster.apply()
    before = dict(cluster.api.objects)
    if refused is not None:
        cluster.refuse(refused)
    assert len(cluster.apply(**spec).refused) == (refused is not None)
    after = cluster.api.objects
    replicas, rolls = engines
    assert after[ENGINES]["spec"]["replicas"] == replicas
    assert (after[ENGINES]["spec"]["template"] != before[ENGINES]["spec"]["template"]) is rolls
    assert (after[GATEWAYS]["spec"]["template"] != before[GATEWAYS]["spec"]["template"]) is gateway_rolls
    if spec["gateway"].get("replicas"):
        assert after[GATEWAYS]["spec"]["replicas"] == 3


def test_a_new_resource_costs_no_look_at_what_may_exist() -> None:
    cluster = Cluster()
    cluster.apply()
    assert cluster.api.reads == 0


def test_what_exists_and_cannot_be_read_is_held_back_alone() -> None:
    cluster = Cluster()
    cluster.api.unreadable = {("Role", "tiny-gateway")}
    cluster.api.objects["Role", "tiny-gateway"] = {"kind": "Role", "metadata": {"name": "tiny-gateway"}}
    assert cluster.apply().refused == ["Role ns/tiny-gateway: forbidden"]
    assert cluster.api.objects.keys() == set(ALL)
    assert "rules" not in cluster.api.objects["Role", "tiny-gateway"]


@pytest.mark.parametrize("place", ALL, ids="/".join)
def test_a_stranger_holds_back_all_until_it_is_gone(place: Place) -> None:
    cluster = Cluster()
    kind, name = place
    metadata = {"name": name, "namespace": "ns", "labels": {}}
    cluster.api.objects[place] = {"kind": kind, "metadata": metadata}
    for _ in range(2):
        result = cluster.apply()
        assert result.foreign
        assert [text.split(";")[0] for text in result.refused] == [
            f"{kind} ns/{name} exists and is not this resource's own"
        ]
        assert cluster.api.objects.keys() == {place}
    del cluster.api.objects[place]
    assert not cluster.apply().refused
    assert cluster.api.objects.keys() == set(ALL)


STRANGER = {"kind": SETTINGS[0], "metadata": {"name": SETTINGS[1], "namespace": "ns", "labels": {}}}


@pytest.mark.parametrize("status", [0, 429, 503])
def test_a_pass_that_meets_a_stranger_and_an_api_server_that_goes_away_leaves_nothing(status: int) -> None:
    cluster = Cluster()
    cluster.api.objects[SETTINGS] = STRANGER
    cluster.refuse(("Service", "tiny"), error=ApiError(status, "away"))
    with pytest.raises(ApiError, match="away"):
        cluster.apply()
    assert cluster.api.objects.keys() == {SETTINGS}
    cluster.refuse()
    before = cluster.api.writes
    assert cluster.apply().foreign
    assert cluster.api.objects.keys() == {SETTINGS}
    assert cluster.api.writes == before, "the next pass looks first"


@pytest.mark.parametrize("fault", ["the deletion fails", "the stranger cannot be read"])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_an_error_leaves_of_a_refused_resource_goes_in_the_next_pass(fault: str, is_replaced: bool) -> None:
    cluster, role = Cluster(), ("Role", "tiny-gateway")
    cluster.api.objects[SETTINGS] = STRANGER
    if fault == "the deletion fails":
        cluster.api.undeletable = set(ALL)
    else:
        cluster.api.unreadable, cluster.api.unreadable_status = {SETTINGS}, 429
    with pytest.raises(ApiError):
        cluster.apply()
    assert role in cluster.api.objects
    cluster.api.undeletable, cluster.api.unreadable = set(), set()
    others = {SETTINGS}
    if is_replaced:
        (kind,) = (kind for kind in CHILDREN if kind.name == "Role")
        cluster.store.remove(kind, cluster.api.objects[role])
        cluster.api.objects[role] = {"kind": "Role", "metadata": {"name": role[1], "namespace": "ns", "labels": {}}}
        others.add(role)
    assert cluster.apply().foreign
    assert cluster.api.objects.keys() == others


def test_an_object_of_its_own_that_is_not_known_yet_is_applied() -> None:
    cluster = Cluster()
    cluster.apply()
    late = Cluster()
    late.api = late.children._api = cluster.api  # type: ignore[assignment]
    assert late.apply(engine={"replicas": 3}).refused == []
    assert cluster.api.objects[ENGINES]["spec"]["replicas"] == 3


@pytest.mark.parametrize("kept", [{}, {"app.kubernetes.io/managed-by": "moeserving"}])
def test_a_child_whose_labels_somebody_took_away_is_no_strangers(kept: dict[str, str]) -> None:
    cluster = Cluster()
    cluster.apply()
    live = cluster.api.objects[GATEWAYS]
    cluster.api.objects[GATEWAYS] = live | {"metadata": live["metadata"] | {"labels": kept}}
    later = Cluster()
    later.api = later.children._api = cluster.api  # type: ignore[assignment]
    assert later.apply().refused == []
    assert cluster.api.objects[GATEWAYS]["metadata"]["labels"] == live["metadata"]["labels"]


def test_a_strangers_object_with_the_labels_of_a_child_is_left_alone() -> None:
    cluster = Cluster()
    cluster.apply()
    live = cluster.api.objects[GATEWAYS]
    metadata = {name: live["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion", "labels")}
    cluster.api.objects[GATEWAYS] = stranger = live | {"metadata": metadata}
    later = Cluster()
    later.api = later.children._api = cluster.api  # type: ignore[assignment]
    assert len(later.apply().refused) == 1
    assert cluster.api.objects[GATEWAYS] == stranger


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "spec: Forbidden: is immutable after creation\n\u00a0\u00a0core.PersistentVolumeClaimSpec{\n"
            "\u00a0\u00a0\t... // 2 identical fields\n-\u00a0\tStorageClassName: nil,\n  }\n",
            "spec: Forbidden: is immutable after creation",
        ),
        ("spec: Forbidden\n  v1.Service{\n+ \tPorts: nil,\n", "spec: Forbidden"),
        ("blocked by\n\nrequire-labels:\n  check: a label {\n", "blocked by require-labels: check: a label {"),
        ("plain", "plain"),
    ],
)
def test_a_refusal_is_one_line_without_both_objects(message: str, said: str) -> None:
    cluster = Cluster()
    cluster.refuse(CACHE_CLAIM, error=ApiError(422, message))
    assert cluster.apply().refused == [f"PersistentVolumeClaim ns/tiny-cache: {said}"]


def claim_of(cluster: Cluster) -> Document | None:
    return cluster.api.objects.get(CACHE_CLAIM)


@pytest.mark.parametrize(
    ("ends", "when_deleted", "is_kept"),
    [(False, "Retain", True), (False, "Delete", True), (True, "Retain", True), (True, "Delete", False)],
)
def test_a_claim_stays_a_child_only_of_a_resource_that_ends_and_says_that_its_claim_does_too(
    ends: bool, when_deleted: str, is_kept: bool
) -> None:
    cluster = Cluster()
    model = {"uri": "hf://org/a", "cache": CACHE | {"whenDeleted": when_deleted}}
    cluster.apply(model=model)
    cluster.serve(ends=ends, whenDeleted=when_deleted)
    for _ in range(2):
        if ends:
            cluster.release_claims()
        else:
            cluster.prune(plan(model={"uri": "hf://org/a"}))
    left = claim_of(cluster)
    assert left is not None
    assert cluster.kept == (["tiny-cache"] if is_kept else []), "once"
    assert is_child(left) is not is_kept
    assert (KEPT in left["metadata"]["annotations"]) is is_kept


def test_a_kept_claim_is_taken_up_again_and_a_strangers_is_not() -> None:
    cluster = Cluster()
    cluster.apply()
    cluster.prune(plan(model={"uri": "hf://org/a"}))
    uid = (claim_of(cluster) or {})["metadata"]["uid"]
    assert cluster.apply(engine={"replicas": 2}).refused == []
    assert (claim_of(cluster) or {})["metadata"]["uid"] == uid
    other = Cluster()
    other.api.objects[CACHE_CLAIM] = {
        "kind": CLAIM.name,
        "metadata": {"name": "tiny-cache", "namespace": "ns", "labels": {"app.kubernetes.io/instance": "tiny"}},
    }
    (refused,) = other.apply().refused
    assert refused.endswith("is not this resource's own; to use it, set spec.model.cache.claim")

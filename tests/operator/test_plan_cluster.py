"""The plan for a cluster: the samples against goldens, its order, and what must hold of any plan.

`python tests/operator/test_plan_cluster.py` writes the goldens anew.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.api.units import duration_s
from moe_operator.cli.command import app
from moe_operator.kubernetes.kinds import CHILDREN, kind_of
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.names import COMPONENT, INSTANCE, MANAGED_BY, MANAGER, OWNER
from moe_operator.plan.references import find_references
from moe_operator.plan.replicas import Scaled
from resource_strategies import documents
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "manifests").glob("*.yaml"))
GOLDENS = Path(__file__).parent / "goldens" / "cluster"
WORKLOADS = ("Deployment", "LeaderWorkerSet")
Document = dict[str, Any]


def render_sample(path: Path) -> str:
    """What `moeserving plan` prints, but for the token, and for what of it depends on where the repository lies."""
    done = CliRunner().invoke(app, ["plan", "-f", str(path), "--namespace", "serving"])
    assert done.exit_code == 0, done.output
    text = re.sub(r"(?m)^(  token: )\S+$", r"\1VE9LRU4=", done.stdout)
    # Where lines are folded also depends on the length of that place.
    text = yaml.safe_dump_all(yaml.safe_load_all(text), sort_keys=False, width=10_000)
    if str(ROOT) in text:
        text = re.sub(r"(revision-digest: )\S+", r"\1DIGEST", text)
    return text.replace(str(ROOT), "/repository")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_plan_of_a_sample_is_its_golden(path: Path) -> None:
    assert render_sample(path) == (GOLDENS / path.name).read_text(encoding="utf-8")


def test_the_samples_and_their_goldens_are_the_same_set() -> None:
    assert [path.name for path in SAMPLES] == sorted(path.name for path in GOLDENS.iterdir())


def plan(document: Document, one_node_claims: frozenset[str] = frozenset()) -> ClusterPlan:
    observed = Observed(uid="u", tokens=("a", "b"), one_node_claims=one_node_claims)
    return plan_cluster(parse_resource(document), "ns", observed, Defaults())


def templates(planned: ClusterPlan) -> list[Document]:
    """The pod templates of all workloads, by none twice."""
    found = []
    for entry in planned.objects:
        if entry["kind"] == "Deployment":
            found.append(entry["spec"]["template"])
        elif entry["kind"] == "LeaderWorkerSet":
            found += [entry["spec"]["leaderWorkerTemplate"][f"{role}Template"] for role in ("leader", "worker")]
    return found


def container(template: Document) -> Document:
    names = ("engine", "gateway")
    return next(row for row in template["spec"]["containers"] if row["name"] in names)


def ends_with_claim(document: Document) -> bool:
    return bool(document["spec"]["model"]["cache"].get("whenDeleted") == "Delete")


@settings(max_examples=60)
@given(documents())
def test_every_object_of_a_plan_is_known_owned_labelled_and_there_once(document: Document) -> None:
    planned = plan(document)
    assert planned == plan(document), "equal arguments give equal plans"
    places = [(entry["kind"], entry["metadata"]["name"]) for entry in planned.objects]
    assert len(set(places)) == len(places)
    for entry in planned.objects:
        assert kind_of(entry) in CHILDREN
        metadata = entry["metadata"]
        assert metadata["namespace"] == "ns"
        assert metadata["labels"][MANAGED_BY] == MANAGER
        assert metadata["labels"][INSTANCE] == document["metadata"]["name"]
        if entry["kind"] == "PersistentVolumeClaim" and not ends_with_claim(document):
            assert "ownerReferences" not in metadata
            assert OWNER not in metadata.get("annotations", {})
            continue
        assert metadata["annotations"][OWNER] == "u"


@settings(max_examples=60)
@given(documents())
def test_what_pods_need_stands_before_them(document: Document) -> None:
    seen: set[tuple[str, str]] = set()
    kinds = [entry["kind"] for entry in plan(document).objects]
    assert kinds[-1] == "Deployment", "the gateway comes last"
    for entry in plan(document).objects:
        if entry["kind"] in WORKLOADS:
            for template in templates(ClusterPlan(objects=(entry,), replicas=0, groups=())):
                spec = template["spec"]
                assert ("ServiceAccount", spec["serviceAccountName"]) in seen
                for volume in spec["volumes"]:
                    secret = volume.get("secret", {}).get("secretName", "licence")
                    settings_map = volume.get("configMap", {}).get("name")
                    assert secret == "licence" or ("Secret", secret) in seen
                    assert settings_map is None or ("ConfigMap", settings_map) in seen
        seen.add((entry["kind"], entry["metadata"]["name"]))


@settings(max_examples=60)
@given(documents())
def test_selectors_find_the_pods_that_they_are_for_and_no_others(document: Document) -> None:
    planned = plan(document)
    labels = [template["metadata"]["labels"] for template in templates(planned)]
    for entry in planned.objects:
        selector = entry.get("spec", {}).get("selector") or entry.get("spec", {}).get("podSelector")
        if selector is None or entry["kind"] in ("ServiceMonitor", "PodMonitor"):
            continue
        wanted = selector.get("matchLabels", selector)
        wanted = {name: value for name, value in wanted.items() if not name.startswith("leaderworkerset")}
        found = [row for row in labels if wanted.items() <= row.items()]
        assert found, entry
        assert len({row[COMPONENT] for row in found}) == 1


@settings(max_examples=60)
@given(documents())
def test_an_engines_pod_has_the_time_to_start_and_to_end_and_memory_to_share(document: Document) -> None:
    resource = parse_resource(document)
    engine = resource.spec.engine
    if engine.pod_template:
        return
    for template in templates(plan(document)):
        if template["metadata"]["labels"][COMPONENT] != "engine":
            continue
        spec, found = template["spec"], container(template)
        probe = found["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] > duration_s(engine.startup_timeout)
        pause_s = found["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] > pause_s + duration_s(engine.drain_timeout)
        assert spec["automountServiceAccountToken"] is False
        (shared,) = (row for row in spec["volumes"] if row["name"] == "shm")
        assert shared["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in found["volumeMounts"]
        assert found["command"][:2] == ["moeserving", "agent"], "the agent is the first process"


def test_the_secret_holds_all_tokens_the_newest_first() -> None:
    secret = plan({**serving(), "spec": {"model": {"uri": "hf://org/a"}}}).objects[0]
    assert secret["kind"] == "Secret"
    assert base64.b64decode(secret["data"]["token"]) == b"a\nb\n"


def serving(**spec: Any) -> Document:
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return {**header, "spec": {"model": {"uri": "hf://org/a"}, **spec}}


@pytest.mark.parametrize(
    ("autoscaling", "live", "wanted"),
    [
        (None, 9, 2),
        ({"minReplicas": 1, "maxReplicas": 4}, None, 2),
        ({"minReplicas": 1, "maxReplicas": 4}, 3, 3),
        ({"minReplicas": 1, "maxReplicas": 4}, 9, 4),
        ({"minReplicas": 0, "maxReplicas": 4}, 0, 0),
        ({"mode": "external", "minReplicas": 3, "maxReplicas": 4}, 1, 3),
        ({"mode": "external", "minReplicas": 1, "maxReplicas": 4}, 4, 2),
    ],
)
def test_the_number_of_engines(autoscaling: Document | None, live: int | None, wanted: int) -> None:
    spec: Document = {"engine": {"replicas": 2}} | ({} if autoscaling is None else {"autoscaling": autoscaling})
    observed = Observed(tokens=("t",), replicas=live)
    planned = plan_cluster(parse_resource(serving(**spec)), "ns", observed, Defaults())
    (engines,) = (
        row for row in planned.objects if row["metadata"]["name"] == "tiny-engine" and row["kind"] in WORKLOADS
    )
    assert planned.replicas == engines["spec"]["replicas"] == wanted


def test_a_number_that_another_manager_owns_is_not_in_the_plan() -> None:
    observed = Observed(tokens=("t",), scaled={("Deployment", "tiny-engine"): Scaled(count=7, note="1")})
    planned = plan_cluster(parse_resource(serving()), "ns", observed, Defaults())
    numbers = {
        row["metadata"]["name"]: row["spec"].get("replicas") for row in planned.objects if row["kind"] == "Deployment"
    }
    assert numbers == {"tiny-engine": None, "tiny-gateway": 1}
    assert planned.replicas == 7


def test_a_pod_template_is_merged_but_selectors_and_the_configuration_stay_ours() -> None:
    patch = {
        "metadata": {
            "labels": {COMPONENT: "mine", "team": "a"},
            "annotations": {"moeserving.dev/config": "mine", "note": "b"},
        },
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "containers": [
                {"name": "engine", "env": [{"name": "A", "value": "1"}], "resources": {"requests": {"cpu": "7"}}},
                {"name": "mesh", "image": "mesh:1"},
            ],
        },
    }
    planned = plan(serving(engine={"podTemplate": patch}))
    template = next(row for row in templates(planned) if row["metadata"]["labels"][COMPONENT] == "engine")
    assert template["metadata"]["labels"]["team"] == "a"
    assert template["metadata"]["annotations"]["note"] == "b"
    assert json.loads(template["metadata"]["annotations"]["moeserving.dev/config"])["engine"]["model"] == "org/a"
    engine, mesh = template["spec"]["containers"]
    assert (engine["name"], mesh["name"]) == ("engine", "mesh")
    assert engine["env"][-1] == {"name": "A", "value": "1"}
    assert engine["resources"]["requests"]["cpu"] == "7"
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert engine["command"][0] == "moeserving"


def cached(**cache: Any) -> Document:
    return {"uri": "hf://org/a", "cache": {"path": "/cache"} | cache}


ONCE = {"accessMode": "ReadWriteOnce"}


@pytest.mark.parametrize(
    ("model", "update", "on_one_node"),
    [
        (cached(size="1Gi"), "surge", False),
        (cached(size="1Gi", **ONCE), "surge", True),
        (cached(size="1Gi", **ONCE), "inPlace", True),
        (cached(claim="mine", **ONCE), "surge", True),
        (cached(claim="mine"), "surge", False),
        (cached(**ONCE), "surge", False),
    ],
)
def test_engines_share_a_node_where_they_share_a_disk_of_one(model: Document, update: str, on_one_node: bool) -> None:
    planned = plan(serving(model=model, engine={"update": update, "replicas": 2}))
    (engines,) = (
        row for row in planned.objects if row["metadata"]["name"] == "tiny-engine" and row["kind"] in WORKLOADS
    )
    assert ("affinity" in engines["spec"]["template"]["spec"]) is on_one_node
    surges = update == "surge" and not on_one_node
    assert engines["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == int(surges)


MOUNTED = {"podTemplate": {"spec": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "mine"}}]}}}


@pytest.mark.parametrize(
    ("model", "engine", "on_one_node"),
    [
        (cached(claim="mine"), {}, True),
        (cached(claim="mine", **ONCE), {}, True),
        (cached(claim="other"), {}, False),
        (cached(size="1Gi"), {}, False),
        ({"uri": "pvc://mine/folder"}, {}, True),
        ({"uri": "pvc://other/mine"}, {}, False),
        ({"uri": "hf://org/a"}, MOUNTED, True),
    ],
)
def test_engines_share_a_node_where_a_claim_of_the_user_is_for_one(
    model: Document, engine: Document, on_one_node: bool
) -> None:
    planned = plan(serving(model=model, engine={"update": "surge", "replicas": 2, **engine}), frozenset({"mine"}))
    (engines,) = (
        row for row in planned.objects if row["metadata"]["name"] == "tiny-engine" and row["kind"] in WORKLOADS
    )
    terms = engines["spec"]["template"]["spec"].get("affinity", {}).get("podAffinity", {}).values()
    assert [len(rows) for rows in terms] == [1] * on_one_node
    assert engines["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == int(not on_one_node)


def test_a_claim_for_one_node_is_refused_for_a_replica_of_several() -> None:
    engine, mine = {"parallelism": {"tensor": 16, "nodes": 2}}, frozenset({"mine"})
    assert plan(serving(model=cached(claim="other"), engine=engine), mine).objects
    with pytest.raises(InvalidInput, match=r"spec\.engine\.parallelism\.nodes: one node .* the claim mine"):
        plan(serving(model=cached(claim="mine"), engine=engine), mine)


def test_a_disk_of_one_node_is_refused_for_a_replica_of_several() -> None:
    shape = {"tensor": 16, "nodes": 2}
    assert plan(serving(model=cached(**ONCE), engine={"parallelism": shape})).objects
    with pytest.raises(InvalidInput, match=r"spec\.model\.cache\.accessMode: .*ReadWriteMany"):
        plan(serving(model=cached(size="1Gi", **ONCE), engine={"parallelism": shape}))


@pytest.mark.parametrize(("value", "planned_value"), [(1, 1), ("1", 1), (0, 0), ("25%", "25%"), ("100%", "100%")])
def test_a_number_or_a_percentage_may_be_away(value: Any, planned_value: Any) -> None:
    budgets = [row for row in plan(serving(disruption={"maxUnavailable": value})).objects if "Budget" in row["kind"]]
    assert [row["spec"]["maxUnavailable"] for row in budgets] == [planned_value] * 2


@pytest.mark.parametrize("value", [-1, 1000, True, 1.0, "101%", "x", ""])
def test_what_is_neither_a_number_nor_a_percentage_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.disruption\.maxUnavailable: a number of at most 3 digits, or a per"):
        plan(serving(disruption={"maxUnavailable": value}))


def test_references_of_pods_are_found_wherever_they_stand() -> None:
    env = [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s1", "key": "k"}}},
        {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "c1", "key": "k"}}},
    ]
    projected = [{"secret": {"name": "s2", "items": [{"key": "a", "path": "b"}]}}, {"configMap": {"name": "c2"}}]
    volumes = [
        {"name": "v", "persistentVolumeClaim": {"claimName": "p1"}},
        {"name": "w", "secret": {"secretName": "s3"}},
        {"name": "x", "configMap": {"name": "c3"}},
        {"name": "y", "projected": {"sources": projected}},
    ]
    container = {"name": "n", "env": env, "envFrom": [{"secretRef": {"name": "s4"}}, {"configMapRef": {"name": "c4"}}]}
    spec = {"containers": [container], "volumes": volumes, "imagePullSecrets": [{"name": "s5"}]}
    found = find_references(
        [{"kind": "Deployment", "spec": {"template": {"spec": spec}}}, {"kind": "Secret", "data": {}}]
    )
    assert found == {
        ("PersistentVolumeClaim", "p1"),
        *(("Secret", f"s{number}") for number in range(1, 6)),
        *(("ConfigMap", f"c{number}") for number in range(1, 5)),
    }


def test_the_order_survives_yaml() -> None:
    rows = [*yaml.safe_load_all(render_sample(ROOT / "manifests" / "minimal.yaml"))]
    assert [row["kind"] for row in rows][:2] == ["Secret", "ConfigMap"]
    assert all("ownerReferences" not in row["metadata"] for row in rows), "there is no resource to own them yet"


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        (GOLDENS / sample.name).write_text(render_sample(sample), encoding="utf-8")

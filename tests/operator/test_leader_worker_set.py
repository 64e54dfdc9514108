"""The plan of replicas over several nodes: labels find what serves, and evictions are counted by group.

Pods carry here the labels that the LeaderWorkerSet controller v0.10 (lws.sigs.k8s.io) adds to those of the templates.
"""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.engine_process import engine_grace_s, worker_grace_s
from moe_operator.api import parse_resource
from moe_operator.plan import ClusterPlan, Defaults, Observed, plan_cluster
from moe_operator.plan.leader_worker_set import groups_away
from moe_operator.plan.names import LWS_GROUP_INDEX, LWS_NAME, LWS_WORKER_INDEX
from moe_operator.plan.revision import parse_revision
from resource_strategies import documents

Document = dict[str, Any]
SIZE = 2


def document(**spec: Any) -> Document:
    engine = {"replicas": 2, "parallelism": {"data": 4, "nodes": SIZE}} | spec.pop("engine", {})
    return {
        "apiVersion": "moeserving.dev/v1alpha1",
        "kind": "MoEServing",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"uri": "hf://org/tiny"}, "engine": engine} | spec,
    }


def plan(body: Document, **observed: Any) -> ClusterPlan:
    return plan_cluster(parse_resource(body), "ns", Observed(uid="u", tokens=("a",), **observed), Defaults())


def objects(planned: ClusterPlan, kind: str) -> list[Document]:
    return [entry for entry in planned.objects if entry["kind"] == kind]


def the_set(planned: ClusterPlan) -> Document:
    (found,) = objects(planned, "LeaderWorkerSet")
    return found


def group_pods(live: Document) -> dict[str, Document]:
    """The labels of the pods that the controller makes of a set."""
    parts, name = live["spec"]["leaderWorkerTemplate"], live["metadata"]["name"]
    made = {}
    for index in range(live["spec"].get("replicas", 1)):
        for worker in range(parts["size"]):
            template = parts["workerTemplate" if worker else "leaderTemplate"]
            own = {LWS_NAME: name, LWS_GROUP_INDEX: str(index), LWS_WORKER_INDEX: str(worker)}
            pod = f"{name}-{index}" + (f"-{worker}" if worker else "")
            made[pod] = template["metadata"]["labels"] | own
    return made


def selects(selector: Document, labels: Document) -> bool:
    """A selector of labels, as the API machinery reads it."""
    for row in selector.get("matchExpressions", []):
        value, operator = labels.get(row["key"]), row["operator"]
        if operator == "Exists" and value is None:
            return False
        if operator == "DoesNotExist" and value is not None:
            return False
        assert operator in ("Exists", "DoesNotExist")
    return selector.get("matchLabels", {}).items() <= labels.items()


def selected(selector: Document, pods: dict[str, Document]) -> list[str]:
    return [name for name, labels in pods.items() if selects(selector, labels)]


def budgets(planned: ClusterPlan) -> dict[str, Document]:
    return {entry["metadata"]["name"]: entry["spec"] for entry in objects(planned, "PodDisruptionBudget")}


def test_each_group_has_a_service_of_its_own_in_which_a_leader_is_found_before_it_is_ready():
    assert the_set(plan(document()))["spec"]["networkConfig"] == {"subdomainPolicy": "UniquePerReplica"}


def test_leaders_alone_stand_in_the_service():
    planned = plan(document())
    (service,) = (row for row in objects(planned, "Service") if row["spec"].get("clusterIP") == "None")
    pods = group_pods(the_set(planned))
    assert selected({"matchLabels": service["spec"]["selector"]}, pods) == ["tiny-engine-0", "tiny-engine-1"]
    # During a change of the number of nodes engines of one node stand in it too.
    single = objects(plan(document(engine={"parallelism": {"data": 4}})), "Deployment")[0]
    assert service["spec"]["selector"].items() <= single["spec"]["template"]["metadata"]["labels"].items()


def test_a_canary_over_several_nodes_has_a_service_and_budgets_of_its_own():
    stable = plan(document()).objects
    (settings,) = (row for row in stable if row["kind"] == "ConfigMap")
    changed = document(engine={"args": ["--max-model-len=2048"], "canary": {"weight": 10, "replicas": 1}})
    planned = plan(changed, stable=parse_revision(settings["data"]["revision.json"]))
    pods = {name: labels for live in objects(planned, "LeaderWorkerSet") for name, labels in group_pods(live).items()}
    found = {name: selected(spec["selector"], pods) for name, spec in budgets(planned).items()}
    assert found["tiny-engine"] == found["tiny-engine-canary"] == [], "these are of engines of one node"
    assert sorted(found["tiny-engine-groups"]) == [
        "tiny-engine-0",
        "tiny-engine-0-1",
        "tiny-engine-1",
        "tiny-engine-1-1",
    ]
    assert sorted(found["tiny-engine-canary-groups"]) == ["tiny-engine-canary-0", "tiny-engine-canary-0-1"]


@pytest.mark.parametrize(
    ("limit", "replicas", "away"),
    [("1", 2, 1), ("0", 9, 0), ("50%", 2, 1), ("25%", 4, 1), ("25%", 5, 2), ("1%", 1, 1), ("0%", 5, 0), ("100%", 3, 3)],
)
def test_a_share_is_of_groups_and_rounded_up_as_kubernetes_does(limit, replicas, away):
    assert groups_away(limit, replicas) == away
    if not limit.endswith("%"):
        assert groups_away(int(limit), replicas) == away


def budget_of(spec: Document, pods: dict[str, Document]) -> int:
    """Evictions that a budget lets through at once: a share is of the pods that it selects, rounded up."""
    limit = spec["maxUnavailable"]
    if isinstance(limit, str):
        return math.ceil(int(limit[:-1]) * len(selected(spec["selector"], pods)) / 100)
    return int(limit)


@given(st.sampled_from(["1", "2", "25%", "34%", "50%", "100%"]), st.integers(1, 9), st.integers(2, 4))
def test_evictions_of_leaders_and_workers_together_take_no_more_groups_than_the_limit_says(limit, replicas, size):
    engine = {"replicas": replicas, "parallelism": {"data": 12, "nodes": size}}
    planned = plan(document(engine=engine, disruption={"maxUnavailable": limit}))
    pods, found = group_pods(the_set(planned)), budgets(planned)
    groups = found["tiny-engine-groups"]
    # In the worst case each of the evicted pods is of another group.
    assert budget_of(groups, pods) == groups_away(limit, replicas)
    assert set(selected(groups["selector"], pods)) == set(pods), "every pod has a budget"
    assert not selected(found["tiny-engine"]["selector"], pods), "a pod with two budgets cannot be evicted at all"


def test_while_groups_take_over_from_engines_of_one_node_each_pod_has_one_budget():
    single = objects(plan(document(engine={"parallelism": {"data": 4}})), "Deployment")[0]
    labels = single["spec"]["template"]["metadata"]["labels"]
    for planned in (plan(document()), plan(document(engine={"parallelism": {"data": 4}}), has_groups=True)):
        of_single = [name for name, spec in budgets(planned).items() if selects(spec["selector"], labels)]
        assert of_single == ["tiny-engine"]


def test_groups_have_a_budget_until_engines_of_one_node_have_taken_over():
    pods = group_pods(the_set(plan(document())))
    one_node = document(engine={"parallelism": {"data": 4}})
    found = budgets(plan(one_node, has_groups=True, first_replicas=1))
    assert set(selected(found["tiny-engine-groups"]["selector"], pods)) == set(pods)
    assert found["tiny-engine-groups"]["maxUnavailable"] == 1
    assert "tiny-engine-groups" not in budgets(plan(one_node))


@given(documents())
def test_no_pod_of_any_plan_has_two_budgets(body):
    planned = plan(body)
    for live in objects(planned, "LeaderWorkerSet"):
        for labels in group_pods(live).values():
            assert sum(selects(spec["selector"], labels) for spec in budgets(planned).values()) == 1


def test_a_worker_has_more_time_to_end_than_its_leader_unless_the_template_says_so():
    spec = the_set(plan(document(engine={"drainTimeout": "5m"})))["spec"]["leaderWorkerTemplate"]
    graces = [spec[part]["spec"]["terminationGracePeriodSeconds"] for part in ("leaderTemplate", "workerTemplate")]
    assert graces == [engine_grace_s(300.0), worker_grace_s(300.0)]
    own = {"podTemplate": {"spec": {"terminationGracePeriodSeconds": 7}}}
    spec = the_set(plan(document(engine=own)))["spec"]["leaderWorkerTemplate"]
    assert spec["workerTemplate"]["spec"]["terminationGracePeriodSeconds"] == 7


def test_engines_reach_each_other_while_groups_exist_also_when_the_plan_has_none():
    single = document(engine={"parallelism": {"data": 4}})

    def rules(planned: ClusterPlan) -> list[Document]:
        (policy,) = (row for row in objects(planned, "NetworkPolicy") if row["metadata"]["name"] == "tiny-engine")
        return [rule for rule in policy["spec"]["ingress"] if "ports" not in rule]

    assert (len(rules(plan(document()))), len(rules(plan(single)))) == (1, 0)
    assert len(rules(plan(single, has_groups=True))) == 1


def test_while_another_workload_serves_the_new_one_has_the_replicas_that_it_is_given():
    assert the_set(plan(document(), first_replicas=1))["spec"]["replicas"] == 1
    assert plan(document(), first_replicas=1).replicas == 2

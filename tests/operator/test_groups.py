"""Engines over several nodes: when a group serves, when a rollout is over, and how another kind of workload takes over.

The status of a LeaderWorkerSet stands here as its controller v0.10 (lws.sigs.k8s.io) writes it.
"""

from typing import Any

import pytest
from group_pods import SET, group, group_pod
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.api.pods import Update
from moe_operator.kubernetes.groups import describe_rollout, read_groups, read_nodes, whole_replicas
from moe_operator.kubernetes.kinds import DEPLOYMENT, LEADER_WORKER_SET
from moe_operator.kubernetes.takeover import Takeover, plan_takeover
from moe_operator.plan.names import LWS_GROUP_INDEX, LWS_NAME, LWS_SIZE, LWS_WORKER_INDEX, REVISION_DIGEST
from pods import pod

Document = dict[str, Any]
LEADER, WORKER = "tiny-engine-0", "tiny-engine-0-1"
AVAILABLE = [{"type": "Available", "status": "True"}, {"type": "Progressing", "status": "False"}]
PROGRESSING = [
    {"type": "Available", "status": "False"},
    {"type": "Progressing", "status": "True", "reason": "GroupsProgressing"},
]


def lost(made: Document) -> Document:
    """The pod as the node controller leaves it on a node that does not answer."""
    made["status"]["conditions"][0] = {"type": "Ready", "status": "False", "reason": "NodeNotReady"}
    return made


def without_labels(made: Document) -> Document:
    """A pod that says only its place in the group."""
    labels, annotations = made["metadata"]["labels"], made["metadata"]["annotations"]
    del labels[LWS_NAME], labels[LWS_GROUP_INDEX], annotations[LWS_SIZE]
    return made


@pytest.mark.parametrize(
    ("pods", "whole"),
    [
        (group(0), {LEADER}),
        ([group_pod(0, 0)], set()),
        ([group_pod(0, 1)], set()),
        ([group_pod(0, 0), group_pod(0, 1, ready=False)], set()),
        ([group_pod(0, 0, ready=False), group_pod(0, 1)], set()),
        ([group_pod(0, 0), lost(group_pod(0, 1))], set()),
        ([group_pod(0, 0), group_pod(0, 1, ending=True)], set()),
        (group(0, size=4)[:3], set()),
        (group(0, size=4), {LEADER}),
        ([*group(0), group_pod(1, 0)], {LEADER}),
        ([*group(0), *group(1)], {LEADER, "tiny-engine-1"}),
        ([group_pod(0, 0), group_pod(1, 1)], set()),
        (list(map(without_labels, group(0))), {LEADER}),
        ([without_labels(group_pod(0, 0))], set()),
        (
            [pod("tiny-engine-a"), pod("tiny-engine-b", ready=False), pod("tiny-gateway-a", "gateway")],
            {"tiny-engine-a"},
        ),
    ],
)
def test_an_engine_over_several_nodes_is_ready_as_a_whole(pods, whole):
    assert whole_replicas(pods, 2) == whole
    assert whole_replicas(pods[::-1], 2) == whole


def test_a_pod_that_is_over_makes_no_group_whole():
    ended = group_pod(0, 1)
    ended["status"]["phase"] = "Failed"
    assert whole_replicas([group_pod(0, 0), ended], 2) == set()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), unique_by=lambda row: row[:2]))
def test_a_group_is_whole_exactly_when_all_its_pods_are_ready(rows):
    pods = [group_pod(index, worker, size=4, ready=ready) for index, worker, ready in rows]
    for found in read_groups(pods, 2):
        ready = {worker for index, worker, is_ready in rows if index == found.index and is_ready}
        assert found.is_whole == (ready == {0, 1, 2, 3})


@pytest.mark.parametrize(
    ("document", "nodes"),
    [
        ({"spec": {"engine": {"parallelism": {"nodes": 4}}}}, 4),
        ({"spec": {"engine": {"parallelism": {}}}}, 1),
        ({"spec": {"engine": {"parallelism": None}}}, 1),
        ({"spec": {"engine": {"parallelism": {"nodes": "4"}}}}, 1),
        ({"spec": "none"}, 1),
        ({}, 1),
    ],
)
def test_the_nodes_of_a_resource_are_one_where_it_does_not_say(document, nodes):
    assert read_nodes(document) == nodes


def live_set(replicas: int = 1, observed: int | None = None, **status: Any) -> Document:
    """A LeaderWorkerSet of the newest template, with a number of observed groups."""
    template = {"metadata": {"annotations": {REVISION_DIGEST: "new"}}}
    return {
        "kind": "LeaderWorkerSet",
        "metadata": {"name": SET},
        "spec": {"replicas": replicas, "leaderWorkerTemplate": {"size": 2, "leaderTemplate": template}},
        "status": {"conditions": AVAILABLE, "replicas": observed or replicas, "updatedReplicas": replicas} | status,
    }


OLD = {"digest": "old"}


@pytest.mark.parametrize(
    ("live", "pods", "text"),
    [
        (live_set(), group(0), ""),
        (live_set(0, conditions=AVAILABLE), [], ""),
        # Not ready is no rollout: readiness says so.
        (live_set(conditions=PROGRESSING), [group_pod(0, 0)], ""),
        # A surge, step by step: the group beyond the number is new, then group 0 is made anew, then the surplus goes.
        (live_set(replicas=1), group(0, **OLD), "0 of 1 groups are up to date"),
        (live_set(updatedReplicas=0, conditions=PROGRESSING), group(0, **OLD), "0 of 1 groups are up to date"),
        (
            live_set(conditions=PROGRESSING, observed=2),
            [*group(0, **OLD), *group(1)],
            "1 of 1 groups are up to date",
        ),
        (
            live_set(conditions=PROGRESSING, observed=2, updatedReplicas=2),
            [group_pod(0, 0), *group(1)],
            "1 of 1 groups are up to date",
        ),
        (
            live_set(conditions=PROGRESSING, observed=2, updatedReplicas=2),
            [*group(0), *group(1)],
            "1 of 1 groups are up to date",
        ),
        # One leader is new, its worker is still the old one.
        (live_set(), [group_pod(0, 0), group_pod(0, 1, **OLD)], "0 of 1 groups are up to date"),
        (live_set(conditions=PROGRESSING), group(0), "its controller is at work (GroupsProgressing)"),
        (
            live_set(conditions=[{"type": "UpdateInProgress", "status": "True", "reason": "GroupsUpdating"}]),
            group(0),
            "its controller is at work (GroupsUpdating)",
        ),
        (live_set(conditions=[{"type": "Available"}]), group(0), ""),
        (live_set(2, updatedReplicas=1), [*group(0), *group(1, **OLD)], "1 of 2 groups are up to date"),
    ],
)
def test_a_rollout_is_over_when_groups_and_controller_say_so(live, pods, text):
    assert describe_rollout(live, pods) == (f"{SET}: {text}" if text else "")


def workload(replicas: int) -> Document:
    return {"metadata": {"name": SET}, "spec": {"replicas": replicas}}


def singles(ready: int, starting: int = 0) -> list[Document]:
    return [pod(f"tiny-engine-s{number}", ready=number < ready) for number in range(ready + starting)]


def groups_of(ready: int, starting: int = 0) -> list[Document]:
    return [made for index in range(ready) for made in group(index)] + [
        group_pod(ready + index, 0) for index in range(starting)
    ]


@pytest.mark.parametrize("kind", [DEPLOYMENT, LEADER_WORKER_SET])
@pytest.mark.parametrize(
    ("wanted", "old", "old_ready", "new_ready", "replicas"),
    [
        (1, 1, 1, 0, (1, 1)),
        (2, 2, 2, 0, (1, 2)),
        (2, 2, 2, 1, (2, 1)),
        (4, 4, 4, 3, (4, 1)),
        (4, 2, 2, 0, (1, 2)),
        (1, 3, 3, 0, (1, 1)),
        (1, 1, 1, 1, None),
        (2, 1, 1, 2, None),
        (1, 1, 0, 0, None),
        (0, 1, 1, 0, None),
    ],
)
def test_the_old_serve_until_the_new_are_ready(kind, wanted, old, old_ready, new_ready, replicas):
    of_one, of_several = (old_ready, new_ready) if kind == DEPLOYMENT else (new_ready, old_ready)
    pods = [*singles(of_one, 1), *groups_of(of_several, 1)]
    found = plan_takeover(kind, workload(old), Update.SURGE, wanted, 2, pods)
    assert (None if found is None else (found.new_replicas, found.old_replicas)) == replicas
    assert plan_takeover(kind, workload(old), Update.IN_PLACE, wanted, 2, pods) is None


@given(st.integers(1, 8), st.data())
def test_a_takeover_keeps_the_number_that_serves_and_asks_for_one_engine_more(wanted, data):
    """From any number of ready new engines, each of which starts in the end, to the end."""
    old, ready, steps = wanted, 0, 0
    while ready < wanted:
        step = Takeover(kind=DEPLOYMENT, old=workload(old), wanted=wanted, ready=ready)
        assert ready + step.old_replicas >= wanted, "as many serve as before"
        assert step.new_replicas + step.old_replicas <= wanted + 1, "one engine more than wanted"
        assert step.new_replicas > ready, "it goes on"
        old, ready = step.old_replicas, data.draw(st.integers(ready + 1, step.new_replicas))
        steps += 1
    assert steps <= wanted


def test_canary_engines_are_no_part_of_a_takeover():
    pods = [*singles(1), *(group_pod(0, worker, revision="canary") for worker in range(2))]
    found = plan_takeover(DEPLOYMENT, workload(1), Update.SURGE, 1, 2, pods)
    assert found is not None
    assert found.ready == 0


def test_labels_that_the_controller_sets_have_the_names_of_its_documentation():
    assert LWS_WORKER_INDEX == "leaderworkerset.sigs.k8s.io/worker-index"
    assert LWS_GROUP_INDEX == "leaderworkerset.sigs.k8s.io/group-index"

"""Pods that Kubernetes takes away, and lost nodes: what is reported, and while what is missing."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_operator.kubernetes.disruptions import find_disrupted, find_lost
from moe_operator.kubernetes.waits import POD_MARGIN
from pods import pod

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TARGET = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}


def workload(component: str = "engine", replicas: int = 1) -> Document:
    labels = pod("x", component)["metadata"]["labels"]
    return {"metadata": {"name": f"tiny-{component}", "labels": labels}, "spec": {"replicas": replicas}}


def on_node(name: str, component: str = "engine", *, ready: bool = False, ends: datetime | None = None) -> Document:
    found = pod(name, component, ready=ready)
    found["spec"]["nodeName"] = "node-7"
    if ends is not None:
        found["metadata"]["deletionTimestamp"] = ends.isoformat()
    return found


def with_conditions(found: Document, *rows: Document) -> Document:
    found["status"]["conditions"] = [*found["status"]["conditions"], *rows]
    return found


CONTAINERS_READY = {"type": "ContainersReady", "status": "True"}


@pytest.mark.parametrize("component", ["engine", "gateway"])
@pytest.mark.parametrize(
    ("made", "signs"),
    [
        (lambda name, part: with_conditions(on_node(name, part), CONTAINERS_READY), "though its containers were"),
        (lambda name, part: with_conditions(on_node(name, part, ends=NOW), TARGET), "DeletionByTaintManager"),
        (
            lambda name, part: on_node(name, part, ready=True, ends=NOW - POD_MARGIN - timedelta(seconds=1)),
            "it should have ended by 2026-01-02T03:03:04",
        ),
    ],
    ids=["not ready", "deleted", "overdue"],
)
def test_a_pod_whose_node_does_not_answer_is_reported_while_its_place_is_empty(
    component: str, made: Any, signs: str
) -> None:
    lost = made("a", component)
    (finding,) = find_lost([lost], [workload(component)], 1, NOW)
    assert (finding.reason, finding.pod, finding.component) == ("NodeNotReady", "a", component)
    assert finding.message.startswith("node node-7 does not answer")
    assert signs in finding.message
    assert find_lost([lost, on_node("b", component, ready=True)], [workload(component)], 1, NOW) == []
    assert find_lost([lost], [workload(component, replicas=0)], 1, NOW) == []
    other = "gateway" if component == "engine" else "engine"
    assert find_lost([lost], [workload(other)], 1, NOW) == []


@pytest.mark.parametrize(
    "found",
    [
        on_node("a"),
        with_conditions(on_node("a"), {"type": "ContainersReady", "status": "False"}),
        on_node("a", ends=NOW),
        on_node("a", ends=NOW - POD_MARGIN),
        with_conditions(pod("a", ready=False), CONTAINERS_READY),
        with_conditions(on_node("a", ends=NOW), TARGET | {"reason": "EvictionByEvictionAPI"}),
        with_conditions(on_node("a", ends=NOW), TARGET | {"status": "False"}),
        with_conditions(on_node("a", ready=True, ends=NOW), CONTAINERS_READY, TARGET),
        on_node("a") | {"status": {"phase": "Failed"}},
        {
            **with_conditions(on_node("a"), CONTAINERS_READY),
            "spec": {"nodeName": "n", "readinessGates": [{}], "containers": []},
        },
    ],
    ids=[
        "starts",
        "is starting",
        "ends",
        "ends still",
        "has no node",
        "is evicted",
        "was to be evicted",
        "drains on a node with a taint",
        "is over",
        "has gates",
    ],
)
def test_other_pods_that_are_not_ready_say_nothing_of_their_node(found: Document) -> None:
    assert find_lost([found], [workload()], 1, NOW) == []


def test_a_lost_worker_takes_its_group_along() -> None:
    labels = {"leaderworkerset.sigs.k8s.io/group-index": "0", "leaderworkerset.sigs.k8s.io/name": "tiny-engine"}
    leader = on_node("tiny-engine-0", ready=True)
    leader["metadata"]["labels"] |= {**labels, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    worker = with_conditions(on_node("tiny-engine-0-1"), CONTAINERS_READY)
    worker["metadata"]["labels"] |= {**labels, "leaderworkerset.sigs.k8s.io/worker-index": "1"}
    del worker["metadata"]["labels"]["moeserving.dev/revision"]
    (finding,) = find_lost([leader, worker], [workload()], 2, NOW)
    assert finding.pod == "tiny-engine-0-1"
    worker["status"]["conditions"] = [{"type": "Ready", "status": "True"}, CONTAINERS_READY]
    assert find_lost([leader, worker], [workload()], 2, NOW) == []


def test_pods_that_are_taken_away_are_named_with_the_reason() -> None:
    pods = [
        pod("a"),
        with_conditions(on_node("c", ends=NOW), TARGET | {"reason": "EvictionByEvictionAPI"}),
        with_conditions(on_node("b", ready=True), TARGET | {"reason": "PreemptionByScheduler"}),
        with_conditions(on_node("d", ends=NOW), TARGET | {"status": "False"}),
        with_conditions(on_node("e", ends=NOW), TARGET) | {"status": {"phase": "Failed", "conditions": [TARGET]}},
    ]
    assert find_disrupted(pods) == [
        "pod b is taken away (PreemptionByScheduler)",
        "pod c is taken away (EvictionByEvictionAPI)",
    ]

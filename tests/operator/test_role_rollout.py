"""Fixed roles that are replaced in place roll one after the other."""

from copy import deepcopy
from typing import Any

import pytest
from moe_operator.kubernetes.difference import with_digest
from moe_operator.kubernetes.role_rollout import describe_wait, roll_in_turn
from moe_operator.plan import ClusterPlan
from moe_operator.plan.names import COMPONENT, ROLE
from moe_operator.plan.pod_status import ENGINE
from test_roles import Document, of_kind, plan, resource

FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}
BEFORE, AFTER = {"args": ["--seed=1"]}, {"args": ["--seed=2"]}
PREFILL, DECODE = "a-engine-prefill", "a-engine-decode"


def planned(engine: Document, **roles: Any) -> ClusterPlan:
    return plan(resource(FIXED | roles, {"update": "inPlace"} | engine))


def live(*documents: Document, **status: Any) -> list[Document]:
    """Deployments as their controllers left them: all engines are there, but for what `status` says."""
    found = []
    for document in deepcopy(documents):
        number = document["spec"]["replicas"]
        numbers = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), number)
        document["metadata"]["generation"] = 3
        document["status"] = {"observedGeneration": 3} | numbers | status
        found.append(document)
    return found


def paused(found: ClusterPlan) -> dict[str, bool]:
    workloads = of_kind(found, "Deployment")
    return {name: row["spec"].get("paused", False) for name, row in workloads.items() if name in (PREFILL, DECODE)}


def engines(found: ClusterPlan) -> tuple[Document, Document]:
    workloads = of_kind(found, "Deployment")
    return workloads[PREFILL], workloads[DECODE]


def test_a_change_of_both_reaches_the_prefill_engines_first():
    old, new = engines(planned(BEFORE)), planned(AFTER)
    assert paused(roll_in_turn(new, live(*old))) == {PREFILL: False, DECODE: True}


@pytest.mark.parametrize(
    "status",
    [{"updatedReplicas": 0}, {"availableReplicas": 0}, {"replicas": 2}, {"observedGeneration": 2}],
    ids=["old ones", "not ready", "one too many", "not seen"],
)
def test_the_decode_engines_wait_until_the_prefill_engines_are_there(status):
    new = planned(AFTER)
    prefill, decode = engines(roll_in_turn(new, live(*engines(planned(BEFORE)))))
    rolling, rolled = live(prefill, **status), live(prefill)
    assert paused(roll_in_turn(new, [*rolling, *live(decode)]))[DECODE]
    assert not paused(roll_in_turn(new, [*rolled, *live(decode)]))[DECODE]


def test_numbers_change_while_a_role_waits():
    new = planned(AFTER, decode=5)
    prefill, decode = engines(planned(BEFORE))
    found = roll_in_turn(new, live(prefill, decode))
    assert of_kind(found, "Deployment")[DECODE]["spec"]["replicas"] == 5
    assert paused(found)[DECODE]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        (BEFORE, BEFORE),
        (BEFORE | {"update": "surge"}, AFTER | {"update": "surge"}),
    ],
)
def test_without_a_change_or_with_room_for_more_none_waits(before, after):
    old, new = engines(planned(before)), planned(after)
    assert roll_in_turn(new, live(*old, availableReplicas=0)) is new


def test_a_change_of_the_decode_engines_alone_waits_for_nobody():
    new = planned({}, overrides={"decode": {"args": ["--max-num-seqs=8"]}})
    assert paused(roll_in_turn(new, live(*engines(planned({}))))) == {PREFILL: False, DECODE: False}


def test_new_deployments_and_engines_of_all_roles_are_left_alone():
    new = planned(AFTER)
    prefill, _ = engines(planned(BEFORE))
    assert roll_in_turn(new, []) is new
    assert roll_in_turn(new, live(prefill)) is new
    unified = plan(resource(None, {"update": "inPlace"}))
    assert roll_in_turn(unified, live(of_kind(unified, "Deployment")["a-engine"])) is unified


def in_other_words(*documents: Document) -> list[Document]:
    """Deployments as they are where a webhook of the cluster writes another image into every template."""
    found = live(*map(with_digest, documents))
    for document in found:
        document["spec"]["template"]["spec"]["containers"][0]["image"] = "mirror.example/engine"
    return found


def test_a_template_that_the_cluster_words_otherwise_counts_as_taken():
    new = planned(BEFORE)
    assert roll_in_turn(new, in_other_words(*engines(new))) is new
    fewer = planned(BEFORE, decode=1)
    assert not paused(roll_in_turn(fewer, in_other_words(*engines(new))))[DECODE]


def test_a_change_reaches_all_engines_whose_templates_the_cluster_words_otherwise():
    new = planned(AFTER)
    found = in_other_words(*engines(planned(BEFORE)))
    held = roll_in_turn(new, found)
    assert paused(held)[DECODE]
    prefill, decode = in_other_words(*engines(held))
    prefill["status"]["availableReplicas"] = 0
    assert paused(roll_in_turn(new, [prefill, decode]))[DECODE]
    prefill["status"]["availableReplicas"] = 1
    assert roll_in_turn(new, [prefill, decode]) is new


def pod_of(role: str, name: str, *, scheduled: str = "True", reason: str = "") -> Document:
    labels = {COMPONENT: ENGINE, ROLE: role}
    row = {"type": "PodScheduled", "status": scheduled, "reason": reason}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {},
        "status": {"phase": "Pending", "conditions": [row]},
    }


def test_a_wait_says_which_prefill_engines_no_node_takes_and_what_to_do():
    old, new = engines(planned(BEFORE)), planned(AFTER)
    held = engines(roll_in_turn(new, live(*old)))[1]
    assert describe_wait(held, []) == ", and it is paused until the prefill engines are new and ready"
    stuck = pod_of("prefill", "a-prefill-0", scheduled="False", reason="Unschedulable")
    said = describe_wait(held, [pod_of("prefill", "a-prefill-1"), stuck])
    assert "no node takes a-prefill-0" in said
    assert "put the change back" in said
    assert "engine.update" in said


@pytest.mark.parametrize(
    "pod",
    [
        pod_of("decode", "a-decode-0", scheduled="False", reason="Unschedulable"),
        pod_of("prefill", "a-prefill-0", scheduled="False", reason="SchedulingGated"),
        pod_of("prefill", "a-prefill-0"),
        {"metadata": {"name": "new", "labels": {COMPONENT: ENGINE, ROLE: "prefill"}}, "spec": {}, "status": {}},
    ],
    ids=["of the other role", "held by a queue", "placed", "not looked at yet"],
)
def test_other_pods_add_nothing_to_a_wait(pod):
    held = engines(roll_in_turn(planned(AFTER), live(*engines(planned(BEFORE)))))[1]
    assert "no node takes" not in describe_wait(held, [pod])
    assert describe_wait(engines(planned(AFTER))[1], [pod]) == ""

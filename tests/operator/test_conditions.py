"""The conditions: what holds, since when, and what is worth an event."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.api.reasons import Reason
from moe_operator.api.status import Condition, ConditionStatus
from moe_operator.kubernetes.conditions import (
    ConditionInputs,
    build_conditions,
    changed_conditions,
    find_waker,
    is_bad,
    read_conditions,
    summarise,
)
from moe_operator.kubernetes.finding import Finding

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LIMITED = (Reason.TOO_FEW_REPLICAS, "more")
WELL = ConditionInputs(desired=2, engines=2, ready=2, gateways=1)
BROKEN = Finding(reason=Reason.IMAGE_CANNOT_BE_PULLED, message="the image x cannot be pulled", pod="p")
ALSO = Finding(reason=Reason.OUT_OF_MEMORY, message="more memory", pod="q")

NO_GATEWAYS = Finding(reason=Reason.FAILED_CREATE, message="quota", component="gateway")
NO_ENGINES = Finding(reason=Reason.FAILED_CREATE, message="quota", component="engine")
ANYBODY = Finding(reason=Reason.PROGRESS_DEADLINE_EXCEEDED, message="late")
GATED = replace(WELL, ready=0, gated=("pod a waits for kueue.x-k8s.io/admission",))
ROWS = [
    (replace(WELL, endpoint=False), "Ready", "False", "NoEndpoint", "a gateway is ready, but not yet an endpoint of"),
    (replace(WELL, seen=False), "Ready", "False", "EnginesNotSeen", "engines accept requests, but no gateway sees one"),
    (replace(WELL, seen=None), "Ready", "True", "Serving", "2 of 2 engines accept requests"),
    (replace(WELL, seen=True), "Ready", "True", "Serving", "2 of 2 engines accept requests"),
    (replace(WELL, ready=0, desired=0, endpoint=False), "Ready", "False", "NoEndpoint", "a gateway is ready, but"),
    (replace(WELL, gateways=0, findings=[NO_GATEWAYS]), "Ready", "False", "FailedCreate", "quota"),
    (replace(WELL, gateways=0, findings=[NO_ENGINES]), "Ready", "False", "NoGateway", "no gateway is ready yet"),
    (replace(WELL, ready=0, findings=[NO_ENGINES]), "Ready", "False", "FailedCreate", "quota"),
    (replace(WELL, ready=0, findings=[NO_GATEWAYS]), "Ready", "False", "NoEngine", "none of 2 engines accepts"),
    (replace(WELL, ready=0, findings=[NO_GATEWAYS, ANYBODY]), "Ready", "False", "ProgressDeadlineExceeded", "late"),
    (replace(WELL, ready=1, findings=[NO_ENGINES]), "Ready", "True", "Serving", "1 of 2 engines accept requests"),
    (replace(WELL, ready=1, findings=[NO_ENGINES]), "Degraded", "True", "FailedCreate", "quota"),
    (replace(WELL, gateways=0, refused="no"), "Ready", "False", "Refused", "no"),
    (replace(WELL, ready=0, desired=0, invalid="spec: no"), "Ready", "False", "InvalidSpec", "spec: no"),
    (GATED, "Ready", "False", "SchedulingGated", "pod a waits for kueue.x-k8s.io/admission"),
    (GATED, "Progressing", "True", "SchedulingGated", "pod a waits for kueue.x-k8s.io/admission"),
    (GATED, "Degraded", "False", "AsExpected", ""),
]


def verdicts(inputs: ConditionInputs) -> dict[str, tuple[str, str, str]]:
    return {row.type: (row.status.value, row.reason, row.message) for row in build_conditions(inputs, {}, NOW)}


@pytest.mark.parametrize(
    ("inputs", "kind", "status", "reason", "message"),
    [
        (WELL, "Ready", "True", "Serving", "2 of 2 engines accept requests"),
        (WELL, "Progressing", "False", "Complete", "everything is as it should be"),
        (WELL, "Degraded", "False", "AsExpected", ""),
        (WELL, "Paused", "False", "NotPaused", ""),
        (WELL, "AutoscalingLimited", "False", "NotLimited", ""),
        (replace(WELL, gateways=0), "Ready", "False", "NoGateway", "no gateway is ready yet"),
        (replace(WELL, ready=1), "Ready", "True", "Serving", "1 of 2 engines accept requests"),
        (replace(WELL, ready=1), "Progressing", "True", "EnginesStarting", "1 of 2 engines are ready"),
        (replace(WELL, ready=0), "Ready", "False", "NoEngine", "none of 2 engines accepts requests yet"),
        (
            replace(WELL, ready=0, desired=0, waker="the next request wakes one"),
            "Ready",
            "True",
            "ScaledToZero",
            "no engine runs; the next request wakes one",
        ),
        (
            replace(WELL, ready=0, desired=0),
            "Ready",
            "False",
            "NoEngine",
            "no engine is asked for, and no request starts one: the number is 0, or it is paused",
        ),
        (replace(WELL, ready=0, findings=[BROKEN]), "Ready", "False", "ImageCannotBePulled", BROKEN.message),
        (replace(WELL, ready=1, findings=[BROKEN]), "Ready", "True", "Serving", "1 of 2 engines accept requests"),
        (replace(WELL, findings=[BROKEN]), "Degraded", "True", "ImageCannotBePulled", BROKEN.message),
        (
            replace(WELL, findings=[BROKEN, ALSO]),
            "Degraded",
            "True",
            BROKEN.reason,
            f"{BROKEN.message}; also: OutOfMemory",
        ),
        (replace(WELL, rolling=("a: 0 of 1", "b")), "Progressing", "True", "Updating", "a: 0 of 1; b"),
        (
            replace(WELL, rolling=("a: 0 of 1",), starting=("e: c",)),
            "Progressing",
            "True",
            "Updating",
            "a: 0 of 1; e: c",
        ),
        (
            replace(WELL, ready=0, starting=("a: x", "b: x", "c: x", "d: x", "e: x", "f: x")),
            "Progressing",
            "True",
            "EnginesStarting",
            "0 of 2 engines are ready; a: x; b: x; c: x; d: x; and 2 more start",
        ),
        (replace(WELL, paused=True), "Paused", "True", "Paused", "spec.paused is set: everything is left as it is"),
        (replace(WELL, paused=True, rolling=("a",)), "Progressing", "False", "Paused", "spec.paused is set"),
        (replace(WELL, invalid="spec.x: no"), "Degraded", "True", "InvalidSpec", "spec.x: no"),
        (replace(WELL, invalid="spec.x: no"), "Ready", "True", "Serving", "2 of 2 engines accept requests"),
        (replace(WELL, invalid="spec.x: no", ready=0), "Ready", "False", "InvalidSpec", "spec.x: no"),
        (replace(WELL, refused="quota"), "Degraded", "True", "Refused", "quota"),
        (
            replace(WELL, refused="quota"),
            "Progressing",
            "False",
            "Refused",
            "not all that is planned was made; it is tried again",
        ),
        (
            replace(WELL, failed="planning: x", refused="quota"),
            "Degraded",
            "True",
            "ReconcileError",
            "planning: x; quota",
        ),
        (
            replace(WELL, failed="x"),
            "Progressing",
            "False",
            "ReconcileError",
            "not all that is planned was made; it is tried again",
        ),
        (replace(WELL, failed="x"), "Ready", "True", "Serving", "2 of 2 engines accept requests"),
        (replace(WELL, invalid="x" * 10**6), "Degraded", "True", "InvalidSpec", "x" * 8000 + " ..."),
        (replace(WELL, limited=LIMITED), "AutoscalingLimited", "True", "TooFewReplicas", "more"),
        *ROWS,
    ],
)
def test_each_condition_says_what_holds_and_why(
    inputs: ConditionInputs, kind: str, status: str, reason: str, message: str
) -> None:
    found = verdicts(inputs)[kind]
    assert found[:2] == (status, reason)
    assert found[2].startswith(message)
    assert bool(message) == bool(found[2])


def test_a_missing_kind_is_named_with_what_to_do_before_anything_else() -> None:
    status, reason, message = verdicts(
        replace(WELL, missing_kinds=("LeaderWorkerSet",), refused="x", findings=[BROKEN])
    )["Degraded"]
    assert (status, reason) == ("True", "LeaderWorkerSetMissing")
    assert "lws.sigs.k8s.io" in message
    assert "spec.engine.parallelism.nodes" in message


def test_a_missing_pool_is_named_unless_something_graver_is_wrong_and_keeps_nobody_from_serving() -> None:
    missing = replace(WELL, missing_kinds=("InferencePool",))
    status, reason, message = verdicts(missing)["Degraded"]
    assert (status, reason) == ("True", "InferencePoolMissing")
    assert "spec.gateway.inferencePool" in message
    assert verdicts(missing)["Ready"][0] == "True"
    assert verdicts(replace(missing, ready=0))["Ready"][1] == "NoEngine"
    assert verdicts(replace(missing, findings=[BROKEN]))["Degraded"][1] == BROKEN.reason


def test_the_time_is_that_of_the_last_change_of_status_not_of_reason() -> None:
    before = {row.type: row for row in build_conditions(replace(WELL, gateways=0), {}, NOW)}
    later = NOW + timedelta(minutes=5)
    after = {row.type: row for row in build_conditions(replace(WELL, ready=0), before, later)}
    assert after["Ready"].reason == "NoEngine" != before["Ready"].reason
    assert after["Ready"].last_transition_time == NOW
    assert after["Progressing"].last_transition_time == later


def test_a_change_of_status_or_reason_is_an_event_and_of_a_new_resource_what_holds() -> None:
    first = build_conditions(WELL, {}, NOW)
    assert {row.type for row in changed_conditions({}, first)} == {"Ready"}
    before = {row.type: row for row in first}
    assert changed_conditions(before, build_conditions(WELL, before, NOW + timedelta(hours=1))) == []
    broken = build_conditions(replace(WELL, findings=[BROKEN]), before, NOW)
    assert [row.type for row in changed_conditions(before, broken)] == ["Degraded"]
    assert [row.type for row in broken if is_bad(row)] == ["Degraded"]


def test_conditions_are_read_back_and_what_cannot_be_read_is_left_out() -> None:
    rows = [row.model_dump(mode="json", by_alias=True) for row in build_conditions(WELL, {}, NOW)]
    document = {"status": {"conditions": [{"type": "Ready"}, {"nonsense": 1}, *rows]}}
    assert list(read_conditions(document).values()) == list(build_conditions(WELL, {}, NOW))
    assert read_conditions({}) == {}


findings = st.lists(st.sampled_from([BROKEN, ALSO]), max_size=2)
any_inputs = st.builds(
    ConditionInputs,
    invalid=st.sampled_from(["", "spec: no"]),
    refused=st.sampled_from(["", "no"]),
    failed=st.sampled_from(["", "an error"]),
    paused=st.booleans(),
    desired=st.integers(0, 3),
    engines=st.integers(0, 3),
    ready=st.integers(0, 3),
    gateways=st.integers(0, 2),
    rolling=st.sampled_from([(), ("a",)]),
    missing_kinds=st.sampled_from([(), ("LeaderWorkerSet",), ("InferencePool",), ("PodMonitor", "InferencePool")]),
    findings=findings,
    endpoint=st.booleans(),
    seen=st.sampled_from([None, True, False]),
    gated=st.sampled_from([(), ("pod a waits",)]),
    generation=st.sampled_from([None, 3]),
    limited=st.sampled_from([None, (Reason.NO_SIGNAL, "stale")]),
)


@given(any_inputs)
def test_there_is_one_condition_of_each_kind_and_none_changes_without_a_change(
    inputs: ConditionInputs,
) -> None:
    rows = build_conditions(inputs, {}, NOW)
    assert len({row.type for row in rows}) == len(rows) == 6
    before = {row.type: row for row in rows}
    assert build_conditions(inputs, before, NOW + timedelta(days=1)) == rows
    ready: Condition = before["Ready"]
    if ready.status is ConditionStatus.TRUE:
        assert inputs.gateways, "without a gateway nothing serves"
        assert inputs.endpoint, "without an endpoint no client comes in"
        assert inputs.seen is not False or not inputs.ready, "an engine that no gateway sees serves nobody"
    assert {row.observed_generation for row in rows} == {inputs.generation}
    assert {row.reason for row in rows} <= set(Reason)
    assert summarise(rows)


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (WELL, "Serving"),
        (replace(WELL, ready=0, desired=0, waker="one comes"), "ScaledToZero"),
        (replace(WELL, findings=[BROKEN]), "ImageCannotBePulled: the image x cannot be pulled"),
        (replace(WELL, gateways=0), "NoGateway: no gateway is ready yet"),
        (replace(WELL, paused=True), "Paused: spec.paused is set: everything is left as it is"),
        (replace(WELL, limited=LIMITED), "TooFewReplicas: more"),
        (replace(WELL, rolling=("a: 0 of 1",)), "Updating: a: 0 of 1"),
        (GATED, "SchedulingGated: pod a waits for kueue.x-k8s.io/admission"),
        (replace(WELL, refused="line\n two  words"), "Refused: line two words"),
        (replace(WELL, invalid="x" * 500), "InvalidSpec: " + "x" * 236 + "…"),
    ],
)
def test_one_line_says_what_is_wrong_or_that_it_serves(inputs: ConditionInputs, line: str) -> None:
    assert summarise(build_conditions(inputs, {}, NOW)) == line


@pytest.mark.parametrize(
    ("spec", "waker"),
    [
        ({}, ""),
        ({"engine": {"replicas": 0}}, ""),
        ({"autoscaling": {"mode": "internal"}}, "the next request wakes one"),
        ({"autoscaling": {}}, "the next request wakes one"),
        ({"autoscaling": {"mode": "external"}}, "the autoscaler beside it starts one"),
        ({"autoscaling": {}, "paused": True}, ""),
    ],
)
def test_ready_at_zero_is_only_what_something_starts(spec: dict[str, Any], waker: str) -> None:
    assert find_waker({"spec": spec}) == waker

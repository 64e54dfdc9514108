"""The number of a workload's replicas: the resource's when that is new, else whoever scaled the workload last."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.api import parse_resource
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.replicas import AUTOSCALED, NOTE, Count, Scaled, count_replicas, keep_for_now, own_replicas

PLACE = ("Deployment", "tiny-gateway")


@pytest.mark.parametrize(
    ("planned", "other", "replicas", "ours"),
    [
        (2, None, 2, True),
        (2, Scaled(count=5, note="2"), 5, False),
        (2, Scaled(count=5), 5, False),
        (3, Scaled(count=5, note="2"), 3, True),
        (2, Scaled(count=5, note="ours"), 2, True),
        (2, Scaled(count=0, note="2"), 0, False),
    ],
    ids=["nobody else", "scaled", "scaled before there were notes", "new number", "claimed again", "scaled to zero"],
)
def test_the_manager_that_sets_the_number(planned: int, other: Scaled | None, replicas: int, ours: bool) -> None:
    count = count_replicas(PLACE, planned, {} if other is None else {PLACE: other})
    assert count == Count(
        replicas=replicas, spec={"replicas": planned} if ours else {}, annotations={NOTE: str(planned)}
    )


def test_a_number_that_the_workload_has_for_now_leaves_the_planned_one_new_until_it_is_applied() -> None:
    other = Scaled(count=5, note="2")
    planned = count_replicas(PLACE, 3, {PLACE: other})
    kept = keep_for_now(planned, 5, other)
    assert kept == Count(replicas=3, spec={"replicas": 5}, annotations={NOTE: "2"})
    again = count_replicas(PLACE, 3, {PLACE: Scaled(count=5, note=kept.annotations[NOTE])})
    assert again.spec == {"replicas": 3}
    # Another number is the operator's alone as soon as it is applied.
    assert keep_for_now(planned, 4, other).annotations == {NOTE: "3"}
    assert keep_for_now(planned, 5, None).annotations == {NOTE: "3"}
    assert keep_for_now(own_replicas(3), 5, other).annotations == {}


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_number_that_the_resource_does_not_change_is_never_fought_over(said: int, scaled: int, again: int) -> None:
    first = count_replicas(PLACE, said, {PLACE: Scaled(count=scaled, note=str(said))})
    assert first.spec == {}
    assert count_replicas(PLACE, said, {PLACE: Scaled(count=again, note=first.annotations[NOTE])}).replicas == again


@pytest.mark.parametrize(
    ("live", "scaled", "wanted"),
    [(None, None, 2), (1, None, 2), (4, None, 4), (9, None, 5), (3, 3, None)],
    ids=["first", "too few", "within", "too many", "set by the autoscaler"],
)
def test_gateways_under_autoscaling_keep_their_number_until_the_autoscaler_sets_it(
    live: int | None, scaled: int | None, wanted: int | None
) -> None:
    bounds = {"minReplicas": 2, "maxReplicas": 5, "targetCpu": "500m"}
    document = {
        "apiVersion": "moeserving.dev/v1alpha1",
        "kind": "MoEServing",
        "metadata": {"name": "tiny"},
        "spec": {"model": {"uri": "hf://org/tiny"}, "gateway": {"autoscaling": bounds}},
    }
    others = {} if scaled is None else {PLACE: Scaled(count=scaled, note=AUTOSCALED)}
    observed = Observed(tokens=("t",), gateways=live, scaled=others)
    planned = plan_cluster(parse_resource(document), "ns", observed, Defaults())
    rows = {row["kind"]: row for row in planned.objects if row["metadata"]["name"] == "tiny-gateway"}
    assert rows["Deployment"]["spec"].get("replicas") == wanted
    scaler = rows["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["metrics"][0]["resource"]["target"] == {"type": "AverageValue", "averageValue": "500m"}

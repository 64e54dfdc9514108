"""An autoscaler of the gateways that does nothing is reported once it has had the time for its first metrics."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.kinds import AUTOSCALER
from moe_operator.kubernetes.problems import ProblemFinder
from moe_operator.kubernetes.scaler_problems import INACTIVE_FOR, find_inactive_scalers
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan.names import Names

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WORDS = "the HPA was unable to compute the replica count: failed to get cpu utilization: the server could not find it"


def scaler(*conditions: tuple[str, str, str], age: timedelta = 2 * INACTIVE_FOR, now: datetime = NOW) -> Document:
    since = (now - age).isoformat().replace("+00:00", "Z")
    rows = [
        {"type": kind, "status": status, "reason": reason, "message": WORDS, "lastTransitionTime": since}
        for kind, status, reason in conditions
    ]
    metadata = {"name": "tiny-gateway", "namespace": "ns", "uid": "s", "labels": Names("tiny").labels("gateway")}
    return {"kind": AUTOSCALER.name, "metadata": metadata, "status": {"conditions": rows}}


GETS_NONE = ("ScalingActive", "False", "FailedGetResourceMetric")
ABLE = ("AbleToScale", "True", "SucceededGetScale")


@pytest.mark.parametrize("rows", [(ABLE, GETS_NONE), (("AbleToScale", "False", "FailedGetScale"),)])
def test_one_that_does_nothing_is_a_finding_of_the_gateways(rows: tuple[tuple[str, str, str], ...]) -> None:
    (finding,), is_waiting = find_inactive_scalers([scaler(*rows)], NOW)
    assert (finding.reason, finding.component, is_waiting) == ("GatewaysNotScaled", "gateway", False)
    assert finding.message.startswith("the number of gateways does not follow the load; does the cluster have a ")
    assert WORDS in finding.message


@pytest.mark.parametrize(
    "live",
    [
        scaler(ABLE, ("ScalingActive", "True", "ValidMetricFound")),
        scaler(ABLE, ("ScalingActive", "False", "ScalingDisabled")),
        scaler(ABLE, ("ScalingLimited", "False", "DesiredWithinRange")),
        {"kind": AUTOSCALER.name, "metadata": {"name": "tiny-gateway"}},
    ],
)
def test_one_that_works_or_was_not_looked_at_yet_is_none(live: Document) -> None:
    assert find_inactive_scalers([live], NOW) == ([], False)


def test_the_first_metrics_have_their_time() -> None:
    young = scaler(ABLE, GETS_NONE, age=INACTIVE_FOR / 2)
    assert find_inactive_scalers([young], NOW) == ([], True)


async def test_a_pass_is_made_again_while_one_may_become_a_finding() -> None:
    now, labels = datetime.now(UTC), Names("tiny").labels("gateway")
    for age, ripens in ((INACTIVE_FOR / 2, True), (2 * INACTIVE_FOR, False)):
        store = Store()
        live = scaler(ABLE, GETS_NONE, age=age, now=now)
        store.put(AUTOSCALER, live | {"metadata": live["metadata"] | {"labels": labels, "resourceVersion": "1"}})
        problems = await ProblemFinder(None, store).find(Key("ns", "tiny"), [], States())  # type: ignore[arg-type]
        assert (problems.ripens, bool(problems.findings)) == (ripens, not ripens)

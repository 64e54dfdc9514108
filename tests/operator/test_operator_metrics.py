"""The operator's metrics of the conditions of its resources."""

import re

import pytest
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.metrics import Metrics
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.store import Store
from prometheus_client import generate_latest

ROW = re.compile(r"^moeserving_operator_condition\{(.*)\} 1\.0$", re.MULTILINE)


def condition(kind, status, reason):
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def resource(*conditions, uid="1", version="1"):
    metadata = {"namespace": "team", "name": "tiny", "uid": uid, "resourceVersion": version}
    return {"metadata": metadata, "status": {"conditions": list(conditions)}}


def rendered(*conditions):
    store = Store()
    store.put(SERVING, resource(*conditions))
    return scrape(Metrics(WorkQueue(), store))


def scrape(metrics):
    return ROW.findall(generate_latest(metrics.registry).decode())


@pytest.mark.parametrize(
    ("kind", "status", "reason", "shown"),
    [
        ("Ready", "True", "Serving", True),
        ("Ready", "False", "NoEngine", True),
        ("Ready", "Unknown", "NotPermitted", True),
        ("Degraded", "True", "PodFailed", True),
        ("Degraded", "False", "AsExpected", False),
        ("AutoscalingLimited", "True", "TooFewReplicas", True),
        ("ExpertsBalanced", "False", "SlowMove", True),
        ("ExpertsBalanced", "False", "Imbalanced", False),
        ("ExpertsBalanced", "Unknown", "NoExpertGroup", False),
        ("Disaggregated", "True", "Transferring", True),
    ],
)
def test_a_condition_is_a_series_while_it_holds_or_wants_a_person_to_act(kind, status, reason, shown):
    labels = f'condition="{kind}",reason="{reason}",resource="tiny",resource_namespace="team",status="{status}"'
    found = ["".join(row.split(" ")) for row in rendered(condition(kind, status, reason))]
    assert [",".join(sorted(row.split(","))) for row in found] == ([labels] if shown else [])


def test_what_is_no_condition_and_a_resource_without_a_status_have_no_series():
    assert rendered() == []
    assert rendered({"type": "Ready"}) == []


def test_each_scrape_shows_the_newest_version_of_a_resource_and_none_of_one_that_is_gone():
    store = Store()
    metrics = Metrics(WorkQueue(), store)
    ready, not_ready = condition("Ready", "True", "Serving"), condition("Ready", "False", "NoEngine")
    store.put(SERVING, resource(ready))
    assert ['reason="Serving"' in row for row in scrape(metrics)] == [True]
    store.put(SERVING, resource(not_ready, version="2"))
    assert ['reason="NoEngine"' in row for row in scrape(metrics)] == [True]
    store.remove(SERVING, resource())
    assert scrape(metrics) == []
    store.put(SERVING, resource(ready, uid="2", version="2"))
    assert ['reason="Serving"' in row for row in scrape(metrics)] == [True]

"""Whether what is planned is there: defaults and what others added are no difference, all else is."""

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_operator.api import parse_resource
from moe_operator.kubernetes.difference import is_covered, needs_apply, was_applied, with_digest
from moe_operator.plan import Defaults, Observed, plan_cluster
from resource_strategies import documents

Document = dict[str, Any]


@pytest.mark.parametrize(
    ("wanted", "live"),
    [
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": {}}, {}),
        ({"a": []}, {}),
        ({"a": ""}, {}),
        ({"a": False}, {}),
        ({"a": 0}, {}),
        (
            {"containers": [{"name": "x", "image": "i"}]},
            {"containers": [{"name": "mesh"}, {"name": "x", "image": "i"}]},
        ),
        ({"ports": [{"containerPort": 1}]}, {"ports": [{"containerPort": 1, "protocol": "TCP"}]}),
        (
            {"volumeMounts": [{"mountPath": "/a", "name": "v"}]},
            {"volumeMounts": [{"mountPath": "/b"}, {"mountPath": "/a", "name": "v"}]},
        ),
        ({"limits": {"cpu": "1000m", "memory": "1.5Gi"}}, {"limits": {"cpu": "1", "memory": "1536Mi"}}),
        ({"requests": {"cpu": 1}}, {"requests": {"cpu": "1", "memory": "1Gi"}}),
        ({"sizeLimit": "1024Mi"}, {"sizeLimit": "1Gi"}),
        ({"args": ["a", "b"]}, {"args": ["a", "b"]}),
        ({"rules": [{"verbs": ["get"]}]}, {"rules": [{"verbs": ["get"], "resourceNames": None}]}),
        ({"annotations": {"a": "1"}}, {"annotations": {"a": "1", "of.others/b": "2"}}),
    ],
    ids=str,
)
def test_what_is_there_in_other_words_or_with_more_is_covered(wanted: Document, live: Document) -> None:
    assert is_covered(wanted, live)


@pytest.mark.parametrize(
    ("wanted", "live"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {}),
        ({"a": {"b": 1}}, {"a": 1}),
        ({"a": [1]}, {"a": {"b": 1}}),
        ({"args": ["a", "b"]}, {"args": ["b", "a"]}),
        ({"args": ["a"]}, {"args": ["a", "b"]}),
        ({"selector": {"a": "1"}}, {"selector": {"a": "1", "b": "2"}}),
        ({"matchLabels": {"a": "1"}}, {"matchLabels": {"a": "1", "b": "2"}}),
        ({"nodeSelector": {}}, {"nodeSelector": {"a": "1"}}),
        ({"subjects": [{"name": "a"}]}, {"subjects": [{"name": "a"}, {"name": "evil"}]}),
        ({"ingress": [{"ports": [{"port": 1}]}]}, {"ingress": [{"ports": [{"port": 1}, {"port": 22}]}]}),
        ({"containers": [{"name": "x", "image": "i"}]}, {"containers": [{"name": "x", "image": "evil"}]}),
        ({"containers": [{"name": "x"}]}, {"containers": [{"name": "y"}]}),
        ({"ports": [{"port": 1, "protocol": "UDP"}]}, {"ports": [{"port": 1, "protocol": "TCP"}]}),
        ({"limits": {"cpu": "2"}}, {"limits": {"cpu": "1"}}),
        ({"limits": {"cpu": "nonsense"}}, {"limits": {"cpu": "1"}}),
        ({"sizeLimit": "1Gi"}, {"sizeLimit": "1G"}),
    ],
    ids=str,
)
def test_what_differs_is_not(wanted: Document, live: Document) -> None:
    assert not is_covered(wanted, live)


def planned(document: Document) -> list[Document]:
    plan = plan_cluster(parse_resource(document), "ns", Observed(uid="u", tokens=("t",)), Defaults())
    return [with_digest(entry) for entry in plan.objects]


@settings(max_examples=30)
@given(documents())
def test_what_was_just_applied_needs_no_apply_and_a_change_of_any_leaf_does(document: Document) -> None:
    for wanted in planned(document):
        assert needs_apply(wanted, None)
        assert not needs_apply(wanted, deepcopy(wanted))
        assert was_applied(wanted, deepcopy(wanted))
        other = deepcopy(wanted)
        other["metadata"]["labels"]["app.kubernetes.io/instance"] = "another"
        assert needs_apply(wanted, other)


@settings(max_examples=30)
@given(documents(), documents())
def test_a_field_that_the_plan_no_longer_has_is_reported_by_the_digest(first: Document, second: Document) -> None:
    second["metadata"]["name"] = first["metadata"]["name"]
    before = {(row["kind"], row["metadata"]["name"]): row for row in planned(first)}
    for wanted in planned(second):
        live = before.get((wanted["kind"], wanted["metadata"]["name"]))
        if live is not None and not needs_apply(wanted, live):
            assert wanted == live


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_covers_itself(anything: Any) -> None:
    assert is_covered(anything, anything)
    assert is_covered({"a": anything}, {"a": anything, "b": 1})

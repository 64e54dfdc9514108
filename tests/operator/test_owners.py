"""Owners of children: which references a plan gives them, and what is read back from those that live."""

from typing import Any

import pytest
from moe_operator.plan.names import OWNER
from moe_operator.plan.owners import SENTINEL, build_owners, is_child, is_orphaned, is_owned

Document = dict[str, Any]
RESOURCE = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "name": "a", "uid": "u", "controller": True}
PLACE = {"apiVersion": "v1", "kind": "Namespace", "name": "ns", "uid": "n"}


@pytest.mark.parametrize(
    ("kind", "uid", "namespace_uid", "references"),
    [
        ("Deployment", "u", "n", [RESOURCE, PLACE]),
        ("PersistentVolumeClaim", "u", "n", [RESOURCE, PLACE]),
        (SENTINEL, "u", "n", [RESOURCE]),
        ("Deployment", "u", None, None),
        (SENTINEL, "u", None, [RESOURCE]),
        ("Deployment", None, "n", None),
    ],
)
def test_a_child_is_owned_by_its_namespace_too_so_that_no_collector_ends_it(
    kind: str, uid: str | None, namespace_uid: str | None, references: list[Document] | None
) -> None:
    made = build_owners({"kind": kind}, "a", "ns", uid, namespace_uid)
    assert made.get("ownerReferences") == references
    assert made.get("annotations") == (None if uid is None else {OWNER: uid})
    assert all("blockOwnerDeletion" not in row for row in references or [])


def live(note: str | None = None, *references: Document, kind: str = "Service") -> Document:
    annotations = {} if note is None else {OWNER: note}
    return {"kind": kind, "metadata": {"annotations": annotations, "ownerReferences": [*references]}}


@pytest.mark.parametrize(
    ("document", "child", "owned"),
    [
        (live(), False, False),
        (live(None, PLACE), False, False),
        (live("u"), True, True),
        (live("other"), True, False),
        (live(""), True, True),
        (live(None, RESOURCE), True, True),
        (live(None, RESOURCE | {"uid": "other"}), True, False),
        ({"kind": "Service", "metadata": {"annotations": None}}, False, False),
    ],
    ids=["a person's", "in a namespace", "ours", "of another uid", "left alone", "older", "older of another", "bare"],
)
def test_what_was_made_by_an_operator_and_for_which_resource(document: Document, child: bool, owned: bool) -> None:
    assert (is_child(document), is_owned(document, "u")) == (child, owned)


@pytest.mark.parametrize(
    ("finalizers", "children", "orphaned"),
    [
        (["moeserving.dev/drain"], [live("u", RESOURCE, kind=SENTINEL)], False),
        (["moeserving.dev/drain", "orphan"], [live("u", RESOURCE, kind=SENTINEL)], True),
        (["moeserving.dev/drain"], [live("u", kind=SENTINEL), live("u", PLACE)], True),
        (["moeserving.dev/drain"], [live("u", PLACE)], False),
        (["moeserving.dev/drain", "foregroundDeletion"], [live("u", PLACE)], False),
        (["moeserving.dev/drain"], [], False),
    ],
    ids=["background", "orphan", "orphan, collected", "foreground, collected", "foreground", "nothing is left"],
)
def test_children_stay_only_where_the_deletion_says_so(
    finalizers: list[str], children: list[Document], orphaned: bool
) -> None:
    resource = {"metadata": {"uid": "u", "finalizers": finalizers}}
    assert is_orphaned(resource, children) is orphaned

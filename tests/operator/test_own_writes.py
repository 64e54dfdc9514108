"""The operator's own writes bring no pass; every change of others does, whenever it comes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.api_server import Kind
from moe_operator.kubernetes.kinds import DEPLOYMENT, SERVING
from moe_operator.kubernetes.own_writes import OwnWrites, keep_serving, take_event
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan.names import INSTANCE

Document = dict[str, Any]
KEY = Key("ns", "tiny")


def deployment(version: int, **parts: Any) -> Document:
    metadata = {"namespace": "ns", "name": "tiny-engine", "resourceVersion": str(version), "labels": {INSTANCE: "tiny"}}
    return {"metadata": metadata, **parts}


def resource(version: int, **metadata: Any) -> Document:
    return {"metadata": {"namespace": "ns", "name": "tiny", "uid": "u", "resourceVersion": str(version), **metadata}}


def own_writes() -> tuple[OwnWrites, list[Key]]:
    reported: list[Key] = []
    return OwnWrites(reported.append), reported


def test_the_event_of_a_write_that_comes_before_its_answer_brings_no_pass() -> None:
    own, reported = own_writes()
    with own.awaiting(DEPLOYMENT, deployment(0)) as answers:
        own.see(DEPLOYMENT, deployment(7), KEY)
        answers.append(deployment(7))
    assert reported == []
    own.see(DEPLOYMENT, deployment(8), KEY)
    assert reported == [KEY]


def test_a_change_of_another_meanwhile_brings_one_once_the_answer_is_there() -> None:
    own, reported = own_writes()
    with own.awaiting(DEPLOYMENT, deployment(0)) as answers:
        own.see(DEPLOYMENT, deployment(6), KEY)
        own.see(DEPLOYMENT, deployment(7), KEY)
        assert reported == []
        answers.append(deployment(7))
    assert reported == [KEY]


def test_without_an_answer_whatever_was_seen_may_be_of_others() -> None:
    own, reported = own_writes()
    with own.awaiting(DEPLOYMENT, deployment(0)):
        own.see(DEPLOYMENT, deployment(7), KEY)
    assert reported == [KEY]


def test_another_object_is_reported_at_once() -> None:
    own, reported = own_writes()
    with own.awaiting(DEPLOYMENT, deployment(0)):
        own.see(SERVING, resource(3), KEY)
        assert reported == [KEY]


@given(st.data())
def test_all_changes_of_others_are_reported_and_none_of_the_own(data: st.DataObject) -> None:
    """Two writes to one object, whose time may overlap, with events of both and of others at any moment."""
    own, reported = own_writes()
    writes = [own.awaiting(DEPLOYMENT, deployment(0)) for _ in range(2)]
    begun: list[list[Document]] = []
    versions = data.draw(st.permutations(range(1, 7)))
    mine, others = versions[:2], versions[2 : 2 + data.draw(st.integers(0, 4))]
    events = data.draw(st.permutations([*mine, *others]))
    steps = data.draw(st.permutations([*range(len(events)), "begin", "end"]))
    # Both begin before an event of theirs can come, the second to end is the one that ends last.
    begun += [write.__enter__() for write in writes]
    for step in steps:
        if step == "begin":
            begun[0].append(deployment(mine[0]))
        elif step == "end":
            begun[1].append(deployment(mine[1]))
        else:
            own.see(DEPLOYMENT, deployment(events[step]), KEY)
    for write in writes:
        write.__exit__(None, None, None)
    assert bool(reported) == bool(others)


@pytest.mark.parametrize(
    ("changed", "passes"),
    [
        ({"generation": 1}, 0),
        ({"generation": 2}, 1),
        ({"generation": 1, "annotations": {"moeserving.dev/rotate-token": "1"}}, 1),
        ({"generation": 1, "labels": {"team": "a"}}, 1),
        ({"generation": 1, "deletionTimestamp": "2026-01-01T00:00:00Z"}, 1),
    ],
)
def test_an_answer_that_is_the_first_to_show_a_persons_change_brings_a_pass(changed: Document, passes: int) -> None:
    """The event of the change may have been left out, as one of several that came together."""
    own, reported = own_writes()
    store = Store()
    store.put(SERVING, resource(4, generation=1))
    keep_serving(store, own, resource(6, **changed))
    assert reported == [KEY] * passes
    assert (store.serving(KEY) or {})["metadata"]["resourceVersion"] == "6"
    keep_serving(store, own, resource(6, **changed))
    assert reported == [KEY] * passes, "it is reported once"


@pytest.mark.parametrize(
    ("kind", "first", "changed"),
    [
        (SERVING, resource(4, generation=1), resource(5, generation=2)),
        (DEPLOYMENT, deployment(4, status={"readyReplicas": 0}), deployment(5, status={"readyReplicas": 1})),
    ],
)
def test_a_write_that_changes_nothing_does_not_take_a_change_of_another_for_its_own(
    kind: Kind, first: Document, changed: Document
) -> None:
    """Its answer has the version that somebody else has just made."""
    own, reported = own_writes()
    store = Store()
    store.put(kind, first)
    with own.awaiting(kind, first) as answers:
        take_event(store, own, kind, changed)
        answers.append(changed)
    assert reported == [KEY]


def test_the_event_of_a_write_of_the_specification_brings_no_pass() -> None:
    own, reported = own_writes()
    store = Store()
    store.put(DEPLOYMENT, deployment(4, spec={"replicas": 1}, status={"readyReplicas": 1}))
    written = deployment(5, spec={"replicas": 2}, status={"readyReplicas": 1})
    with own.awaiting(DEPLOYMENT, written) as answers:
        take_event(store, own, DEPLOYMENT, written)
        answers.append(written)
    take_event(store, own, DEPLOYMENT, written)
    assert reported == []

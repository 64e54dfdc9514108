"""Waits for what other controllers have to finish: each has an end, and its text is stable until then."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.kubernetes.waits import (
    HELD,
    POD_MARGIN,
    UNMARKED,
    Wait,
    find_remains,
    render_overdue,
    render_waits,
    split_waits,
    wait_for_object,
    wait_for_pod,
)

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MARKED = "2026-01-02T03:10:00Z"


def pod(**metadata: Any) -> Document:
    return {"metadata": {"name": "tiny-a"} | metadata, "spec": {"nodeName": "n1"}}


@pytest.mark.parametrize(
    ("wait", "text", "until"),
    [
        (
            wait_for_pod(pod(deletionTimestamp=MARKED), NOW),
            "pod tiny-a on node n1",
            datetime(2026, 1, 2, 3, 10, tzinfo=UTC) + POD_MARGIN,
        ),
        (wait_for_pod(pod(), NOW), "pod tiny-a on node n1", NOW + UNMARKED),
        (wait_for_pod({"metadata": {"name": "tiny-a"}}, NOW), "pod tiny-a", NOW + UNMARKED),
        (
            wait_for_object({"kind": "Service", "metadata": {"name": "tiny", "deletionTimestamp": MARKED}}, NOW),
            "Service tiny",
            datetime(2026, 1, 2, 3, 10, tzinfo=UTC) + HELD,
        ),
        (
            wait_for_object({"kind": "Service", "metadata": {"name": "tiny", "finalizers": ["a/b", "c"]}}, NOW),
            "Service tiny (held by a/b, c)",
            NOW + HELD,
        ),
    ],
    ids=["marked", "unmarked", "without a node", "object", "held object"],
)
def test_what_is_waited_for_and_until_when(wait: Wait, text: str, until: datetime) -> None:
    assert (wait.text, wait.until) == (text, until)


def test_what_holds_the_place_of_another_object_is_named() -> None:
    held = {"name": "tiny-cache", "deletionTimestamp": MARKED, "finalizers": ["kubernetes.io/pvc-protection"]}
    rows = [{"kind": "Service", "metadata": {"name": "tiny"}}, {"kind": "PersistentVolumeClaim", "metadata": held}]
    text = "waits for PersistentVolumeClaim tiny-cache (held by kubernetes.io/pvc-protection), which is being deleted"
    assert find_remains(rows) == [text]


waits = st.lists(
    st.builds(
        Wait,
        text=st.sampled_from("abcdef"),
        until=st.integers(-9, 9).map(lambda seconds: NOW + timedelta(seconds=seconds)),
    ),
    max_size=6,
)


@given(waits)
def test_every_wait_is_either_running_or_over_and_all_are_over_in_the_end(rows: list[Wait]) -> None:
    running, over = split_waits(rows, NOW)
    assert sorted(map(repr, running + over)) == sorted(map(repr, rows))
    assert all(wait.until > NOW for wait in running)
    assert split_waits(rows, NOW + timedelta(seconds=9))[0] == []


@given(waits)
def test_the_order_in_which_things_are_found_does_not_change_the_text(rows: list[Wait]) -> None:
    unique = list({wait.text: wait for wait in rows}.values())
    assert render_waits(unique) == render_waits(unique[::-1])
    assert render_overdue(unique) == render_overdue(unique[::-1])


def test_many_are_counted() -> None:
    rows = [Wait(text=text, until=NOW) for text in "edcba"]
    first = "a, until 2026-01-02T03:04:05Z at the latest; b, until 2026-01-02T03:04:05Z at the latest; "
    assert render_waits(rows) == first + "c, until 2026-01-02T03:04:05Z at the latest; and 2 more"
    assert render_overdue(rows) == "a, b, c and 2 more"

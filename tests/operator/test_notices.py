"""Conditions that are written alone: what an end says, and that a condition keeps its time while it stays the same."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_contract.api_server import FORBIDDEN, ApiError, Kind
from moe_operator.api.status import Condition, ConditionStatus
from moe_operator.kubernetes.ending import EndingProgress, judge_progress
from moe_operator.kubernetes.kinds import NAMESPACE
from moe_operator.kubernetes.namespaces import Namespaces
from moe_operator.kubernetes.notices import with_verdicts
from moe_operator.kubernetes.waits import Wait

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
POD = Wait(text="pod tiny-a on node n1", until=NOW)
TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


@pytest.mark.parametrize(
    ("progress", "problem", "progressing", "degraded"),
    [
        (
            EndingProgress(waits=(POD,), part="gateways"),
            "",
            "ends gateways; waits for pod tiny-a on node n1, until 2026-01-02T03:04:05Z at the latest",
            (FALSE, "AsExpected", ""),
        ),
        (
            EndingProgress(overdue=(POD,), part="the other objects"),
            "",
            "all was ended",
            (
                TRUE,
                "NotEnding",
                "should have ended and did not (is its node lost?): pod tiny-a on node n1; "
                "the deletion goes on without",
            ),
        ),
        (EndingProgress(), "no right", "no right", (TRUE, "NotPermitted", "cannot end it: no right")),
    ],
    ids=["waits", "overdue", "not permitted"],
)
def test_what_an_end_says(progress: EndingProgress, problem: str, progressing: str, degraded: tuple[Any, ...]) -> None:
    verdicts = judge_progress(progress, problem)
    assert verdicts["Ready"][:2] == (FALSE, "Deleting")
    assert verdicts["Progressing"] == (TRUE, "Deleting", progressing)
    assert verdicts["Degraded"] == degraded


def test_a_condition_keeps_its_time_while_its_status_stays_and_others_are_left() -> None:
    old = NOW - timedelta(hours=1)
    before = {
        kind: Condition(type=kind, status=status, reason="Old", message="", last_transition_time=old)
        for kind, status in (("Ready", TRUE), ("Degraded", TRUE), ("Paused", FALSE))
    }
    rows = with_verdicts(before, {"Ready": (FALSE, "New", "a"), "Degraded": (TRUE, "New", "b")}, NOW)
    assert [(row.type, row.reason, row.last_transition_time) for row in rows] == [
        ("Ready", "New", NOW),
        ("Degraded", "New", old),
        ("Paused", "Old", old),
    ]


class OneNamespace:
    """An API server with one namespace; stands in for `Api`."""

    def __init__(self, found: Any) -> None:
        self.found, self.calls = found, 0

    async def get(self, kind: Kind, namespace: str, name: str) -> Any:
        assert (kind, namespace) == (NAMESPACE, "")
        self.calls += 1
        if isinstance(self.found, ApiError):
            raise self.found
        return self.found


async def test_the_uid_of_a_namespace_is_read_once_until_a_resource_ends() -> None:
    server: Any = OneNamespace({"metadata": {"uid": "n"}})
    namespaces = Namespaces(server)
    assert [await namespaces.fetch_uid("a") for _ in range(3)] == ["n"] * 3
    assert server.calls == 1
    server.found = {"metadata": {"uid": "m", "deletionTimestamp": "2026-01-02T03:04:05Z"}}
    namespaces.forget("a")
    assert await namespaces.fetch_uid("a") == "m"
    assert await namespaces.fetch_is_ending("a")


@pytest.mark.parametrize("found", [None, ApiError(FORBIDDEN, "no right")], ids=["gone", "refused"])
async def test_a_namespace_that_may_not_be_read_has_no_uid_and_is_not_ending(found: Any) -> None:
    server: Any = OneNamespace(found)
    assert await Namespaces(server).fetch_uid("a") is None
    assert not await Namespaces(server).fetch_is_ending("a")


async def test_any_other_failure_ends_the_pass() -> None:
    server: Any = OneNamespace(ApiError(503, "away"))
    with pytest.raises(ApiError):
        await Namespaces(server).fetch_uid("a")

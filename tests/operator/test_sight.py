"""What the operator cannot read: it concerns the resources of that namespace, and no others."""

import pytest
from moe_contract.api_server import FORBIDDEN, ApiError
from moe_operator.kubernetes.kinds import LEADER_WORKER_SET, POD, SECRET, SERVING
from moe_operator.kubernetes.sight import Sight

REFUSED, BROKEN = ApiError(FORBIDDEN, "not allowed"), ApiError(500, "broken")


def two_namespaces() -> Sight:
    return Sight((kind, place) for kind in (POD, SECRET, SERVING, LEADER_WORKER_SET) for place in ("a", "b"))


def read(sight: Sight, *places: str) -> Sight:
    for place in places:
        for kind in (POD, SECRET, SERVING, LEADER_WORKER_SET):
            sight.seen(kind, place)
    return sight


def test_at_first_nothing_is_known() -> None:
    assert two_namespaces().blind_spot("a") == "pods in a: not read yet; and 1 kinds more"


def test_what_was_read_in_one_namespace_says_nothing_of_another() -> None:
    sight = read(two_namespaces(), "b")
    assert sight.blind_spot("b") == ""
    assert sight.blind_spot("a")


def test_a_right_that_is_taken_away_is_a_blind_spot_until_it_is_back() -> None:
    sight = read(two_namespaces(), "a", "b")
    assert sight.failed(POD, "a", REFUSED)
    assert sight.blind_spot("a") == "pods in a: not allowed"
    assert sight.blind_spot("b") == ""
    assert sight.unreadable() == [("pods", "a")]
    assert sight.seen(POD, "a")
    assert (sight.blind_spot("a"), sight.unreadable()) == ("", [])


def test_a_passing_failure_leaves_what_was_read_known() -> None:
    sight = read(two_namespaces(), "a")
    assert not sight.failed(POD, "a", BROKEN)
    assert sight.blind_spot("a") == ""


@pytest.mark.parametrize("kind", [LEADER_WORKER_SET, SERVING], ids=lambda kind: kind.name)
def test_kinds_that_are_not_needed_block_nothing(kind: object) -> None:
    sight = read(two_namespaces(), "a")
    assert sight.failed(kind, "a", REFUSED)  # type: ignore[arg-type]
    assert sight.blind_spot("a") == ""
    assert len(sight.unreadable()) == 1


@pytest.mark.parametrize(("error", "waits"), [(REFUSED, False), (BROKEN, True)], ids=["refused", "broken"])
def test_only_what_may_still_be_read_is_awaited(error: ApiError, waits: bool) -> None:
    sight = Sight([(POD, None)])
    assert sight.failed(POD, None, error)
    assert bool(sight.awaited) is waits
    assert sight.blind_spot("any").startswith("pods in all namespaces: ")

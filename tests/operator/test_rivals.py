"""Releases that would serve the same namespaces: found by their Leases, and never do two of them lead."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.api_server import FORBIDDEN, ApiError, Kind, Listing
from moe_operator.kubernetes.leader import Election, Terms
from moe_operator.kubernetes.rivals import LABELS, SERVES, Rivals, overlaps, render_scope
from virtual_time import run_in_virtual_time

Document = dict[str, Any]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((), (), True),
        ((), ("a",), True),
        (("a",), ("b",), False),
        (("b", "a"), ("c", "a"), True),
        (("a",), ("ab",), False),
    ],
)
def test_scopes_overlap_where_a_namespace_is_in_both(one: tuple[str, ...], other: tuple[str, ...], same: bool) -> None:
    assert overlaps(render_scope(one), render_scope(other)) is same
    assert overlaps(render_scope(other), render_scope(one)) is same


class Cluster:
    """Leases of an API server, by namespace and name; stands in for `Api`."""

    def __init__(self) -> None:
        self.leases: dict[tuple[str, str], Document] = {}
        self.version = 0
        self.delay_s: Callable[[], float] = lambda: 0.0
        self.may_list_all = True

    def put(self, lease: Document) -> Document:
        self.version += 1
        metadata = lease["metadata"] | {"resourceVersion": str(self.version)}
        self.leases[metadata["namespace"], metadata["name"]] = kept = lease | {"metadata": metadata}
        return kept

    async def get(self, kind: Kind, namespace: str, name: str) -> Document | None:
        await asyncio.sleep(self.delay_s())
        found = self.leases.get((namespace, name))
        return None if found is None else found | {"spec": dict(found["spec"])}

    async def create(self, kind: Kind, lease: Document) -> Document:
        await asyncio.sleep(self.delay_s())
        if (lease["metadata"]["namespace"], lease["metadata"]["name"]) in self.leases:
            raise ApiError(409, "exists")
        return self.put(lease)

    async def replace(self, kind: Kind, lease: Document) -> Document:
        await asyncio.sleep(self.delay_s())
        place = (lease["metadata"]["namespace"], lease["metadata"]["name"])
        if self.leases[place]["metadata"]["resourceVersion"] != lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "changed")
        return self.put(lease)

    async def list(self, kind: Kind, namespace: str | None) -> Listing:
        await asyncio.sleep(self.delay_s())
        if namespace is None and not self.may_list_all:
            raise ApiError(FORBIDDEN, "no")
        marked = (row for row in self.leases.values() if row["metadata"].get("labels"))
        return Listing(items=[row for row in marked if namespace in (None, row["metadata"]["namespace"])], version="1")


def release(cluster: Any, namespace: str, name: str, *serves: str) -> Election:
    scope, clock = render_scope(serves), asyncio.get_running_loop().time
    rivals = Rivals(cluster, namespace, name, scope, clock)
    marks = {"labels": LABELS, "annotations": {SERVES: scope}}
    identity = f"{namespace}/{name}"
    return Election(cluster, namespace, name, identity, Terms(), clock, find_rivals=rivals.find, metadata=marks)


def former(cluster: Cluster, namespace: str) -> None:
    spec = {"holderIdentity": "old", "leaseDurationSeconds": 15}
    cluster.put({"metadata": {"namespace": namespace, "name": "moeserving-operator"}, "spec": spec})


def test_of_two_that_overlap_the_second_says_so_and_follows_when_the_first_is_gone() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        first, second = release(cluster, "x", "a", "team"), release(cluster, "y", "b", "team", "other")
        one = asyncio.create_task(first.run())
        await asyncio.sleep(1)
        two = asyncio.create_task(second.run())
        await asyncio.sleep(30)
        assert first.leading.is_set()
        assert not second.leading.is_set()
        assert [str(rival) for rival in second.rivals] == ["x/a (serves team)"]
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        await first.release()
        await asyncio.sleep(5)
        assert second.leading.is_set()
        assert second.rivals == []
        two.cancel()

    run_in_virtual_time(scenario())


def test_releases_that_have_nothing_in_common_both_lead() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        both = [release(cluster, "x", name, name) for name in ("a", "b")]
        tasks = [asyncio.create_task(one.run()) for one in both]
        await asyncio.sleep(5)
        assert all(one.leading.is_set() for one in both)
        for task in tasks:
            task.cancel()

    run_in_virtual_time(scenario())


def test_a_release_of_before_the_leases_took_names_is_waited_for_until_it_no_longer_renews() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        former(cluster, "x")
        newer = release(cluster, "x", "a")
        task = asyncio.create_task(newer.run())
        await asyncio.sleep(10)
        assert not newer.leading.is_set()
        await asyncio.sleep(10)
        assert newer.leading.is_set()
        task.cancel()

    run_in_virtual_time(scenario())


def test_without_the_right_to_read_all_leases_those_of_the_own_namespace_count() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        cluster.may_list_all = False
        first, second = release(cluster, "x", "a"), release(cluster, "x", "b")
        tasks = [asyncio.create_task(first.run())]
        await asyncio.sleep(1)
        tasks.append(asyncio.create_task(second.run()))
        await asyncio.sleep(10)
        assert first.leading.is_set()
        assert [rival.place for rival in second.rivals] == ["x/a"]
        for task in tasks:
            task.cancel()

    run_in_virtual_time(scenario())


def test_a_candidate_in_the_lease_of_another_release_says_so() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        first, second = release(cluster, "x", "same", "a"), release(cluster, "x", "same", "b")
        second._identity = "other"
        tasks = [asyncio.create_task(one.run()) for one in (first, second)]
        await asyncio.sleep(10)
        assert first.leading.is_set()
        assert [str(rival) for rival in second.rivals] == ["x/same (serves a)"]
        for task in tasks:
            task.cancel()

    run_in_virtual_time(scenario())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.floats(0, 3), min_size=3, max_size=3))
def test_whenever_they_start_one_of_all_that_overlap_leads_and_never_two(seed: int, starts_s: list[float]) -> None:
    chance = random.Random(seed)

    async def scenario() -> None:
        cluster = Cluster()
        cluster.delay_s = lambda: chance.uniform(0.0, 0.5)
        releases = [release(cluster, "x", name) for name in "abc"]

        async def begin(one: Election, start_s: float) -> None:
            await asyncio.sleep(start_s)
            await one.run()

        tasks = [asyncio.create_task(begin(*pair)) for pair in zip(releases, starts_s, strict=True)]
        for _ in range(400):
            await asyncio.sleep(0.1)
            assert sum(one.leading.is_set() for one in releases) <= 1
        assert sum(one.leading.is_set() for one in releases) == 1
        for task in tasks:
            task.cancel()

    run_in_virtual_time(scenario())

"""The election: one leads, another follows soon, and never may two write, whatever the API server does to them."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_contract.api_server import ApiError, Kind
from moe_operator.kubernetes.api import Api, NotLeading
from moe_operator.kubernetes.kinds import CONFIG_MAP
from moe_operator.kubernetes.leader import Election, Terms
from virtual_time import run_in_virtual_time

Document = dict[str, Any]
TERMS = Terms()


def refusal(code: int) -> ApiError:
    return ApiError(code, "no")


class Leases:
    """An API server that holds one Lease; versions make two writes of the same one impossible."""

    def __init__(self) -> None:
        self.lease: Document | None = None
        self.version = 0

    def store(self, lease: Document) -> Document:
        self.version += 1
        self.lease = lease | {"metadata": lease["metadata"] | {"resourceVersion": str(self.version)}}
        return self.lease

    def replace(self, lease: Document) -> Document:
        assert self.lease is not None
        if lease["metadata"].get("resourceVersion") != self.lease["metadata"]["resourceVersion"]:
            raise refusal(409)
        return self.store(lease)

    def create(self, lease: Document) -> Document:
        if self.lease is not None:
            raise refusal(409)
        return self.store(lease)


class Way:
    """The way of one operator to it: `mood` says what becomes of a call. Stands in for `Api`."""

    def __init__(self, leases: Leases, mood: Callable[[], tuple[str, float, float]] | None = None) -> None:
        self._leases = leases
        self.mood = mood or (lambda: ("fine", 0.0, 0.0))

    async def get(self, kind: Kind, namespace: str, name: str) -> Document | None:
        return await self._call(lambda: self._leases.lease)

    async def create(self, kind: Kind, lease: Document) -> Document | None:
        return await self._call(lambda: self._leases.create(lease))

    async def replace(self, kind: Kind, lease: Document) -> Document | None:
        return await self._call(lambda: self._leases.replace(lease))

    async def _call(self, effect: Callable[[], Document | None]) -> Document | None:
        what, there_s, back_s = self.mood()
        await asyncio.sleep(there_s)
        if what == "lost":
            raise ApiError(0, "ClientConnectorError: refused")
        found = effect()
        await asyncio.sleep(back_s)
        if what == "unheard":
            raise ApiError(0, "ServerDisconnectedError: broken")
        return found


def election(way: Any, identity: str, terms: Terms = TERMS) -> Election:
    return Election(way, "default", "lease", identity, terms, asyncio.get_running_loop().time)


def virtually(steps: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await steps()

    return run_in_virtual_time(run())


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_of_two_that_begin_at_once_one_leads_and_goes_on_leading() -> None:
    async def steps() -> None:
        leases = Leases()
        both = [election(Way(leases), name) for name in ("a", "b")]
        tasks = [asyncio.create_task(one.run()) for one in both]
        for _ in range(300):
            await asyncio.sleep(1.0)
            assert [one.holds() for one in both] == [True, False]
        assert leases.lease is not None
        assert leases.lease["spec"]["leaseTransitions"] == 0
        await end(*tasks)

    virtually(steps)


def test_one_that_is_gone_is_replaced_once_its_term_is_over_and_not_before() -> None:
    async def steps() -> float:
        leases = Leases()
        first, second = election(Way(leases), "a"), election(Way(leases), "b")
        task = asyncio.create_task(first.run())
        await asyncio.sleep(5.0)
        other = asyncio.create_task(second.run())
        await asyncio.sleep(5.0)
        gone_s = asyncio.get_running_loop().time()
        await end(task)
        await second.leading.wait()
        assert leases.lease is not None
        assert leases.lease["spec"]["leaseTransitions"] == 1
        await end(other)
        return asyncio.get_running_loop().time() - gone_s

    assert TERMS.duration_s - TERMS.retry_s <= virtually(steps) <= TERMS.duration_s + 2 * TERMS.retry_s


def test_one_that_ends_in_order_is_replaced_at_the_next_try() -> None:
    async def steps() -> float:
        leases = Leases()
        first, second = election(Way(leases), "a"), election(Way(leases), "b")
        task = asyncio.create_task(first.run())
        other = asyncio.create_task(second.run())
        await asyncio.sleep(30.0)
        await end(task)
        released_s = asyncio.get_running_loop().time()
        await first.release()
        assert not first.holds()
        await second.leading.wait()
        await end(other)
        return asyncio.get_running_loop().time() - released_s

    assert virtually(steps) <= 2 * TERMS.retry_s


def test_one_that_cannot_renew_ends_its_lead_in_time() -> None:
    async def steps() -> float:
        way = Way(Leases())
        one = election(way, "a")
        task = asyncio.create_task(one.run())
        await asyncio.sleep(10.0)
        way.mood = lambda: ("lost", 0.0, 0.0)
        cut_s = asyncio.get_running_loop().time()
        await task
        assert not one.leading.is_set()
        return asyncio.get_running_loop().time() - cut_s

    assert TERMS.renew_s - TERMS.retry_s <= virtually(steps) <= TERMS.renew_s


def test_an_api_server_that_no_longer_answers_costs_the_lead_in_the_same_time() -> None:
    async def steps() -> float:
        way = Way(Leases())
        one = election(way, "a")
        task = asyncio.create_task(one.run())
        await asyncio.sleep(10.0)
        way.mood = lambda: ("fine", 1e6, 0.0)
        cut_s = asyncio.get_running_loop().time()
        await task
        return asyncio.get_running_loop().time() - cut_s

    assert virtually(steps) <= TERMS.renew_s + 0.001


def test_an_api_server_that_is_away_for_a_moment_costs_nothing() -> None:
    async def steps() -> None:
        way = Way(Leases())
        one = election(way, "a")
        task = asyncio.create_task(one.run())
        for _ in range(10):
            way.mood = lambda: ("fine", 0.0, 0.0)
            await asyncio.sleep(5.0)
            way.mood = lambda: ("lost", 0.0, 0.0)
            await asyncio.sleep(5.0)
            assert one.holds()
        await end(task)

    virtually(steps)


def test_a_holder_whose_lease_another_took_leaves() -> None:
    async def steps() -> None:
        leases = Leases()
        one = election(Way(leases), "a")
        task = asyncio.create_task(one.run())
        await asyncio.sleep(5.0)
        assert leases.lease is not None
        leases.store(leases.lease | {"spec": leases.lease["spec"] | {"holderIdentity": "thief"}})
        await task
        assert not one.holds()

    virtually(steps)


async def test_a_process_that_stood_still_may_not_write_before_it_has_renewed() -> None:
    now_s = 0.0
    one = Election(Way(Leases()), "default", "lease", "a", TERMS, lambda: now_s)  # type: ignore[arg-type]
    task = asyncio.create_task(one.run())
    await one.leading.wait()
    api = Api(None, one.holds)  # type: ignore[arg-type]
    now_s = TERMS.renew_s
    document = {"metadata": {"name": "a", "namespace": "b"}}
    for change in (api.apply, api.create, api.replace, api.delete):
        with pytest.raises(NotLeading):
            await change(CONFIG_MAP, document)
    with pytest.raises(NotLeading):
        await api.merge(CONFIG_MAP, "b", "a", {})
    assert not api.calls
    await end(task)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_whatever_becomes_of_their_calls_never_may_two_write_and_in_the_end_one_does(seed: int) -> None:
    chance = random.Random(seed)

    def mood() -> tuple[str, float, float]:
        times = [0.0 if chance.random() < 0.6 else chance.uniform(0.0, 12.0) for _ in range(2)]
        return chance.choice(["fine", "fine", "lost", "unheard"]), *times

    async def live(way: Way, name: str, alive: list[Election | None], place: int) -> None:
        """An operator that is started anew whenever its lead is over, and now and then killed."""
        while True:
            alive[place] = one = election(way, f"{name}-{chance.random()}")
            run = asyncio.create_task(one.run())
            try:
                await asyncio.wait([run], timeout=chance.uniform(1.0, 90.0))
            finally:
                await end(run)
            alive[place] = None
            await asyncio.sleep(chance.uniform(0.0, 5.0))

    async def steps() -> None:
        leases = Leases()
        ways = [Way(leases, mood) for _ in range(3)]
        alive: list[Election | None] = [None] * 3
        tasks = [asyncio.create_task(live(way, str(number), alive, number)) for number, way in enumerate(ways)]
        for _ in range(600):
            await asyncio.sleep(0.25)
            assert sum(one is not None and one.holds() for one in alive) <= 1
        await end(*tasks)
        calm = election(Way(leases), "calm")
        last = asyncio.create_task(calm.run())
        await asyncio.wait_for(calm.leading.wait(), TERMS.duration_s + 2 * TERMS.retry_s)
        await end(last)

    virtually(steps)


@pytest.mark.parametrize("rounds", range(20))
@pytest.mark.parametrize("leads", [False, True])
def test_an_election_that_is_cancelled_ends_at_whatever_point_it_is(rounds: int, leads: bool) -> None:
    async def steps() -> None:
        one = election(Way(Leases()), "a")
        run = asyncio.create_task(one.run())
        if leads:
            # Up to the moment of the next renewal.
            await asyncio.sleep(TERMS.retry_s)
        for _ in range(rounds):
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.wait([run], timeout=60.0)
        assert run.cancelled()

    virtually(steps)

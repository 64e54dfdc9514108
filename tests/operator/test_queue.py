"""The queue of resources: each once, one worker a resource, later ones in time, failures ever later."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_operator.kubernetes.operator import kept_for_changes
from moe_operator.kubernetes.queue import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, SHARE, WorkQueue
from virtual_time import run_in_virtual_time

Queue = WorkQueue[str]


def in_queue(steps: Callable[[Queue], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await steps(WorkQueue())

    return run_in_virtual_time(run())


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def is_empty(queue: Queue) -> bool:
    try:
        await asyncio.wait_for(queue.take(), 1e-3)
    except TimeoutError:
        return True
    return False


def test_what_is_added_twice_is_taken_once_in_the_order_of_the_first() -> None:
    async def steps(queue: Queue) -> list[str]:
        for item in "abab":
            queue.add(item)
        assert len(queue) == 2
        taken = [await queue.take(), await queue.take()]
        assert await is_empty(queue)
        return taken

    assert in_queue(steps) == ["a", "b"]


def test_a_change_goes_before_a_thousand_resources_that_are_only_looked_at_again() -> None:
    """Each ten minutes, and when an operator takes over, all are: a change then waited until all were looked at."""

    async def steps(queue: Queue) -> tuple[float, float]:
        for number in range(1000):
            queue.add_in_background(f"r{number}")
        worked: dict[str, float] = {}

        async def work() -> None:
            while True:
                item = await queue.take()
                await asyncio.sleep(0.025)
                queue.done(item)
                worked.setdefault(item, now_s())

        workers = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(1.0)
        queue.add("r999")
        await asyncio.sleep(60.0)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        return worked["r999"] - 1.0, max(worked.values())

    waited_s, ended_s = in_queue(steps)
    assert waited_s <= 0.05 + 1e-6, "the pass that goes on, and its own"
    assert ended_s == pytest.approx(12.5, abs=0.1), "and no other is looked at later than without the change"


def test_a_change_finds_a_worker_while_all_that_is_looked_at_waits_for_silent_pods() -> None:
    """An operator that takes over asks every pod: those of a lost node give no answer for seconds."""

    async def steps(queue: Queue) -> tuple[float, float, int]:
        queue = WorkQueue(most_background=8)
        for number in range(60):
            queue.add_in_background(f"silent{number}")
        worked: dict[str, float] = {}

        async def work() -> None:
            while True:
                item = await queue.take()
                await asyncio.sleep(7.0 if item.startswith("silent") else 0.05)
                queue.done(item)
                worked.setdefault(item, now_s())

        workers = [asyncio.create_task(work()) for _ in range(8 + kept_for_changes(8))]
        await asyncio.sleep(1.0)
        for number in range(20):
            queue.add(f"changed{number}")
        await asyncio.sleep(100.0)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        changed = max(at_s for item, at_s in worked.items() if item.startswith("changed"))
        return changed - 1.0, max(worked.values()), len(worked)

    waited_s, ended_s, count = in_queue(steps)
    assert count == 80
    assert waited_s <= 0.5 + 1e-6, "two workers are there for twenty changes"
    assert ended_s <= 56.0 + 1e-6, "eight look at sixty resources"


@pytest.mark.parametrize(("workers", "more"), [(1, 1), (2, 1), (4, 1), (8, 2), (256, 64)])
def test_a_quarter_more_workers_are_kept_for_changes(workers: int, more: int) -> None:
    assert kept_for_changes(workers) == more


def test_what_waits_in_the_background_is_not_left_waiting_by_changes_that_never_end() -> None:
    async def steps(queue: Queue) -> list[str]:
        queue.add_in_background("x")
        queue.add_in_background("y")
        taken = []
        for number in range(12):
            queue.add(f"{number}")
            item = await queue.take()
            taken.append(item)
            queue.done(item)
        return taken

    taken = in_queue(steps)
    assert (taken.index("x"), taken.index("y")) == (SHARE - 1, 2 * SHARE - 1)


def test_a_look_while_a_worker_has_the_item_comes_after_it_and_behind_changes() -> None:
    async def steps(queue: Queue) -> list[str]:
        queue.add("a")
        await queue.take()
        queue.add_in_background("a")
        queue.done("a")
        queue.add("b")
        taken = [await queue.take(), await queue.take()]
        queue.add_in_background("b")
        queue.add("b")
        queue.add_in_background("c")
        queue.done("b")
        return [*taken, await queue.take()]

    assert in_queue(steps) == ["b", "a", "b"]


def test_what_comes_because_time_passes_waits_behind_changes() -> None:
    async def steps(queue: Queue) -> list[str]:
        queue.add_after("late", 1.0)
        await asyncio.sleep(2.0)
        queue.add("changed")
        return [await queue.take(), await queue.take()]

    assert in_queue(steps) == ["changed", "late"]


def test_what_is_added_while_a_worker_has_it_comes_once_more_when_that_is_done() -> None:
    async def steps(queue: Queue) -> None:
        queue.add("a")
        await queue.take()
        queue.add("a")
        queue.add("a")
        assert await is_empty(queue), "never in two workers"
        queue.done("a")
        assert await queue.take() == "a"
        queue.done("a")
        assert await is_empty(queue)

    in_queue(steps)


def test_what_is_wanted_later_comes_then_and_the_sooner_date_counts() -> None:
    async def steps(queue: Queue) -> tuple[list[float], bool]:
        queue.add_after("a", 10.0)
        queue.add_after("a", 3.0)
        queue.add_after("a", 20.0)
        queue.add_after("b", 5.0)
        times = []
        for name in ("a", "b"):
            assert await queue.take() == name
            times.append(now_s())
            queue.done(name)
        await asyncio.sleep(60.0)
        return times, await is_empty(queue)

    times, empty = in_queue(steps)
    assert times == pytest.approx([3.0, 5.0])
    assert empty


def test_an_item_that_waits_for_its_date_comes_at_once_when_it_is_added() -> None:
    async def steps(queue: Queue) -> float:
        queue.add_after("a", 10.0)
        queue.add("a")
        await queue.take()
        return now_s()

    assert in_queue(steps) == pytest.approx(0.0, abs=1e-3)


def test_a_worker_that_waits_hears_of_a_sooner_date() -> None:
    async def steps(queue: Queue) -> float:
        queue.add_after("late", 100.0)
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(1.0)
        queue.add_after("soon", 1.0)
        assert await waiting == "soon"
        return now_s()

    assert in_queue(steps) == pytest.approx(2.0)


def test_failures_double_the_wait_up_to_a_bound_and_a_success_forgets_them() -> None:
    async def in_a_row(queue: Queue) -> list[float]:
        queue.add("a")
        waits = []
        await queue.take()
        for _ in range(12):
            began_s = now_s()
            waits.append(queue.failed("a"))
            await queue.take()
            assert now_s() - began_s == pytest.approx(waits[-1])
        queue.done("a")
        queue.add("a")
        await queue.take()
        return [*waits, queue.failed("a")]

    waits = in_queue(in_a_row)
    assert waits[:3] == [FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, 4 * FIRST_BACKOFF_S]
    assert max(waits) == waits[11] == LONGEST_BACKOFF_S
    assert waits[-1] == FIRST_BACKOFF_S


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.floats(0.0, 30.0), st.sampled_from(["now", "later", "look"])),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from([None, 1, 2]),
)
def test_every_item_that_was_added_is_worked_on_after_it_was_and_never_by_two_at_once(
    additions: list[tuple[str, float, str]], most: int | None
) -> None:
    async def steps(queue: Queue) -> None:
        queue = WorkQueue(most)
        busy: Counter[str] = Counter()
        ended: dict[str, float] = {}
        began: dict[str, float] = {}

        async def work() -> None:
            while True:
                item = await queue.take()
                busy[item] += 1
                assert busy[item] == 1
                began[item] = now_s()
                await asyncio.sleep(2.5)
                busy[item] -= 1
                ended[item] = now_s()
                queue.done(item)

        workers = [asyncio.create_task(work()) for _ in range(3)]
        last: dict[str, float] = {}
        for item, wait_s, how in additions:
            if how != "later":
                (queue.add if how == "now" else queue.add_in_background)(item)
                last[item] = max(last.get(item, 0.0), now_s())
            else:
                queue.add_after(item, wait_s)
            await asyncio.sleep(wait_s / 4)
        await asyncio.sleep(100.0)
        assert len(queue) == 0
        assert set(ended) == {item for item, _, _ in additions}
        assert all(began[item] >= at_s for item, at_s in last.items()), "a pass begins after the last word of a change"
        for worker in workers:
            worker.cancel()
        results = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    in_queue(steps)


@pytest.mark.parametrize("rounds", range(6))
def test_a_worker_that_is_cancelled_as_an_item_comes_ends(rounds: int) -> None:
    async def steps(queue: Queue) -> None:
        async def work() -> None:
            while True:
                queue.done(await queue.take())

        queue.add_after("later", 3600.0)
        worker = asyncio.create_task(work())
        await asyncio.sleep(1.0)
        queue.add("a")
        for _ in range(rounds):
            await asyncio.sleep(0)
        worker.cancel()
        await asyncio.wait([worker], timeout=60.0)
        assert worker.cancelled()

    in_queue(steps)

"""Reports of pushed states: from the pod that was meant alone, and not more often than an operator can work."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_operator.kubernetes.peers import Peer
from moe_operator.kubernetes.spaced_reports import LEAST_BETWEEN_S, SpacedReports
from state_wires import ENDED, KEY, Followed, engine, settle, state
from virtual_time import run_in_virtual_time


def asked(uid: str) -> Peer:
    """An engine whose pod repeats its uid."""
    return Peer(pod="e-0", url="http://e-0", component="engine", revision="stable", uid=uid, says_uid=True)


@pytest.mark.parametrize(("uid", "is_accepted"), [("mine", True), ("another", False), ("", False)])
def test_a_state_is_accepted_from_the_pod_that_was_meant_alone(uid: str, is_accepted: bool) -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state(uid=uid))
        states = await followed.streams.fetch(KEY, [asked("mine")])
        assert ("e-0" in states) is is_accepted
        assert states.strangers == (frozenset() if is_accepted else {"e-0"})
        await followed.streams.close()

    run_in_virtual_time(story())


def test_another_pod_at_the_address_is_reported_at_once_and_a_new_pod_of_the_name_has_a_stream_of_its_own() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state(uid="mine"))
        await followed.streams.fetch(KEY, [asked("mine")])
        followed.wires.say("http://e-0", ENDED, state(uid="another"))
        await asyncio.sleep(5.0)
        assert followed.changes == [(KEY, False)], "though it says the same but for its uid"
        states = await followed.streams.fetch(KEY, [asked("mine")])
        assert states.strangers == {"e-0"}
        followed.wires.say("http://e-0", state(uid="another"))
        states = await followed.streams.fetch(KEY, [asked("another")])
        assert "e-0" in states
        assert followed.wires.open == 1
        await followed.streams.close()

    run_in_virtual_time(story())


def test_another_pod_at_the_address_is_reported_once_whatever_it_says() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state(uid="mine"))
        await followed.streams.fetch(KEY, [asked("mine")])
        for turn in range(1000):
            phase = ("starting", "ready")[turn % 2]
            followed.wires.say("http://e-0", state(phase, running=turn, uid="another"))
            await asyncio.sleep(0.05)
        assert followed.changes == [(KEY, False)]
        followed.wires.say("http://e-0", state(uid="mine"))
        await settle()
        assert followed.changes == [(KEY, False)] * 2
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_peer_that_changes_all_the_time_is_reported_once_a_second_and_its_last_change_too() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state("ready"))
        await followed.streams.fetch(KEY, [engine()])
        seen = 0
        for turn in range(1000):
            followed.wires.say("http://e-0", state(("starting", "ready")[turn % 2]))
            await asyncio.sleep(0.01)
            seen = seen or len(followed.changes)
            assert seen == 1, "the first at once"
        assert len(followed.changes) in (10, 11)
        await asyncio.sleep(0.5)
        before = len(followed.changes)
        followed.wires.say("http://e-0", state("stopped"))
        await settle()
        assert len(followed.changes) == before, "not yet"
        await asyncio.sleep(LEAST_BETWEEN_S)
        assert followed.changes == [(KEY, False)] * (before + 1)
        await asyncio.sleep(LEAST_BETWEEN_S)
        followed.wires.say("http://e-0", state("starting"))
        await settle()
        followed.wires.say("http://e-0", state("ready"))
        await settle()
        followed.streams.forget(KEY)
        await asyncio.sleep(60.0)
        assert len(followed.changes) == before + 2, "no report of a stream that was closed"

    run_in_virtual_time(story())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.booleans()), max_size=30))
def test_reports_are_spaced_and_none_is_lost(steps: list[tuple[float, bool]]) -> None:
    async def story() -> None:
        now_s, reported = asyncio.get_running_loop().time, list[tuple[float, bool]]()
        reports = SpacedReports(lambda numbers_only: reported.append((now_s(), numbers_only)))
        changes: list[float] = []
        for pause_s, numbers_only in steps:
            await asyncio.sleep(pause_s)
            changes += [] if numbers_only else [now_s()]
            reports.add(numbers_only)
        await asyncio.sleep(LEAST_BETWEEN_S + 0.01)
        at = [time_s for time_s, numbers_only in reported if not numbers_only]
        assert len(reported) - len(at) == sum(numbers_only for _, numbers_only in steps)
        assert all(b - a > LEAST_BETWEEN_S - 1e-6 for a, b in itertools.pairwise(at))
        for change_s in changes:
            assert any(change_s <= time_s <= change_s + LEAST_BETWEEN_S + 0.01 for time_s in at)
        assert at[:1] == changes[:1]

    run_in_virtual_time(story())

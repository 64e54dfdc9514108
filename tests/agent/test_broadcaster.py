"""The watched stream of state snapshots: polling, notification, fan-out, slow watchers, errors, the end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from moe_agent.api import broadcaster as broadcaster_module
from moe_agent.api.broadcaster import StateBroadcaster, Version
from moe_agent.app import build_supervisor
from moe_agent.supervisor.node import build_node
from moe_agent.supervisor.supervisor import Phase
from moe_contract.agent_config import AgentConfig
from moe_contract.state_stream import SparseStream

LONG_S = 20.0


class State:
    """A value that changes, and how often it was looked at and serialised."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.value = 0
        self.serialised = self.looked = 0
        self.unserialisable = self.unreadable = False

    def set(self, value: int) -> None:
        self.value = value
        self.changed.set()

    def version(self) -> Version:
        if self.unreadable:
            raise ValueError("no version")
        self.looked += 1
        return (self.value,)

    def serialise(self) -> bytes:
        if self.unserialisable:
            raise ValueError("no snapshot")
        self.serialised += 1
        return b"%d" % self.value


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def broadcaster(state: State) -> StateBroadcaster:
    return StateBroadcaster(state.changed, state.version, state.serialise)


@pytest.fixture
def without_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only notifications wake the broadcaster."""
    monkeypatch.setattr(broadcaster_module, "POLL_INTERVAL_S", LONG_S)
    monkeypatch.setattr(broadcaster_module, "HEARTBEAT_S", LONG_S)


async def newest(snapshots: AsyncIterator[tuple[Version, bytes]]) -> bytes:
    version, snapshot = await asyncio.wait_for(anext(snapshots), LONG_S / 2)
    assert snapshot == b"%d" % version
    return snapshot


async def test_a_change_of_the_phase_notifies_through_the_supervisor_that_the_agent_builds(tmp_path: Path):
    config = AgentConfig.model_validate(
        {
            "run_dir": tmp_path,
            "listen": {"port": 1},
            "token_file": tmp_path / "token",
            "engine": {"port": 2, "model": "m", "served_name": "m"},
        }
    )
    phases: list[Phase] = []
    supervisor = build_supervisor(
        config, build_node(config.engine, {}), lambda: None, lambda: phases.append(supervisor.phase)
    )
    supervisor.request_drain()
    assert phases == [Phase.DRAINING]


@pytest.mark.usefixtures("without_polling")
async def test_a_notification_brings_the_change_and_all_watchers_share_its_snapshot(broadcaster, state):
    async with aclosing(broadcaster.watch()) as first, aclosing(broadcaster.watch()) as second:
        assert [await newest(first), await newest(second)] == [b"0", b"0"]
        for step in (1, 2, 3):
            serialised = state.serialised
            state.set(step)
            assert [await newest(first), await newest(second)] == [b"%d" % step] * 2
            assert state.serialised == serialised + 1


@pytest.mark.usefixtures("without_polling")
async def test_a_notification_that_came_before_the_wait_is_not_lost(broadcaster, state):
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
        state.set(1)
        await asyncio.sleep(0)
        assert await newest(snapshots) == b"1"


@pytest.mark.usefixtures("without_polling")
async def test_a_notification_without_a_change_brings_no_snapshot(broadcaster, state):
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
        waiting = asyncio.create_task(anext(snapshots))
        looked = state.looked
        state.changed.set()
        while state.looked == looked:
            await asyncio.sleep(0.001)
        assert (state.serialised, waiting.done()) == (1, False)
        state.set(1)
        assert await asyncio.wait_for(waiting, LONG_S / 2) == ((1,), b"1")


@pytest.mark.usefixtures("without_polling")
@pytest.mark.parametrize("turns", range(8))
async def test_a_change_while_a_watcher_wakes_reaches_its_sparse_stream(broadcaster, state, turns):
    sparse, lines = SparseStream(LONG_S, LONG_S), asyncio.Queue[bytes]()

    async def watch() -> None:
        async with aclosing(broadcaster.watch()) as snapshots:
            async for version, snapshot in snapshots:
                if line := sparse.next_line(0.0, version, tuple, lambda text=snapshot: text):
                    lines.put_nowait(line)

    watching = asyncio.create_task(watch())
    assert await asyncio.wait_for(lines.get(), LONG_S / 2) == b"0"
    state.set(1)
    for _ in range(turns):
        await asyncio.sleep(0)
    state.set(2)
    while await asyncio.wait_for(lines.get(), LONG_S / 2) != b"2":
        pass
    watching.cancel()


async def test_a_change_without_a_notification_is_found_by_polling(broadcaster, state, monkeypatch):
    monkeypatch.setattr(broadcaster_module, "HEARTBEAT_S", LONG_S)
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
        state.value = 1
        assert await newest(snapshots) == b"1"


async def test_changes_between_two_polls_share_a_snapshot(broadcaster, state, monkeypatch):
    monkeypatch.setattr(broadcaster_module, "POLL_INTERVAL_S", 0.5)
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
        for step in range(1, 11):
            state.value = step
            await asyncio.sleep(0)
        assert await newest(snapshots) == b"10"
        assert state.serialised == 2


async def test_a_snapshot_comes_without_any_change(broadcaster, monkeypatch):
    monkeypatch.setattr(broadcaster_module, "HEARTBEAT_S", 0.05)
    async with aclosing(broadcaster.watch()) as snapshots:
        assert [await newest(snapshots) for _ in range(3)] == [b"0"] * 3


@pytest.mark.usefixtures("without_polling")
async def test_a_slow_watcher_skips_snapshots_but_not_the_newest(broadcaster, state):
    async with aclosing(broadcaster.watch()) as slow, aclosing(broadcaster.watch()) as quick:
        await newest(slow)
        await newest(quick)
        for step in (1, 2, 3):
            state.set(step)
            assert await newest(quick) == b"%d" % step
        assert await newest(slow) == b"3"
        assert state.serialised == 5


async def test_an_ended_broadcaster_sends_the_last_state_and_ends(broadcaster, state):
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
        state.value = 7
        broadcaster.end()
        rest = [snapshot async for _, snapshot in snapshots]
    assert rest == [b"7"]


async def test_a_watch_of_an_ended_broadcaster_ends_too(broadcaster):
    broadcaster.end()
    async with aclosing(broadcaster.watch()) as snapshots:
        assert [snapshot async for _, snapshot in snapshots] == [b"0", b"0"]


@pytest.mark.usefixtures("without_polling")
@pytest.mark.parametrize("fault", ["unserialisable", "unreadable"])
async def test_an_error_ends_all_watches_and_new_ones_work(broadcaster, state, fault):
    async with aclosing(broadcaster.watch()) as waiting, aclosing(broadcaster.watch()) as busy:
        await newest(waiting)
        await newest(busy)
        setattr(state, fault, True)
        state.set(1)
        with pytest.raises(ValueError, match=r"no snapshot|no version"):
            await newest(waiting)
        setattr(state, fault, False)
        async with aclosing(broadcaster.watch()) as newcomer:
            assert await newest(newcomer) == b"1"
            with pytest.raises(ValueError, match=r"no snapshot|no version"):
                await newest(busy)
            state.set(2)
            assert await newest(newcomer) == b"2"
    state.value = 1
    async with aclosing(broadcaster.watch()) as snapshots:
        assert await newest(snapshots) == b"1"
        state.set(2)
        assert await newest(snapshots) == b"2"


async def test_nothing_polls_while_nobody_watches(broadcaster):
    async with aclosing(broadcaster.watch()) as snapshots:
        await newest(snapshots)
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if "StateBroadcaster._poll" in repr(task.get_coro())] == []

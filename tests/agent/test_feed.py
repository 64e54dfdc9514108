"""The bell between engine and agent, and the feed of those who watch."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from moe_agent.api import broadcaster as feed_module
from moe_agent.api.broadcaster import StateBroadcaster
from moe_agent.app import build_supervisor, hang_bell
from moe_agent.shared_memory.notifier import Bell, BellRope, Ticks, bell_path
from moe_agent.supervisor.node import build_node
from moe_agent.supervisor.supervisor import Phase
from moe_contract.agent_config import AgentConfig

LONG_S = 20.0


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    with Bell(tmp_path) as made:
        yield made


class State:
    """What changes, and how often lines were made of it."""

    def __init__(self) -> None:
        self.value = 0
        self.made = self.looked = 0
        self.broken = self.blind = False

    def fingerprint(self) -> int:
        if self.blind:
            raise ValueError("no look")
        self.looked += 1
        return self.value

    def line(self) -> bytes:
        if self.broken:
            raise ValueError("no line")
        self.made += 1
        return b"%d" % self.value


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def feed(bell: Bell, state: State) -> StateBroadcaster:
    return StateBroadcaster(bell, state.fingerprint, state.line)


@pytest.fixture
def only_the_bell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is seen by looking now and then."""
    monkeypatch.setattr(feed_module, "LOOK_S", LONG_S)
    monkeypatch.setattr(feed_module, "MOST_S", LONG_S)


async def newest(lines: AsyncIterator[bytes]) -> bytes:
    return await asyncio.wait_for(anext(lines), LONG_S / 2)


async def test_a_ring_before_and_during_the_wait_ends_it_and_is_heard_until_it_is_hushed(tmp_path, bell):
    rope = BellRope(tmp_path)
    rope.ring()
    for _ in range(2):
        await asyncio.wait_for(bell.wait(LONG_S), LONG_S / 2)
    bell.hush()
    waiting = asyncio.create_task(bell.wait(LONG_S))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    rope.ring()
    await asyncio.wait_for(waiting, LONG_S / 2)


async def test_without_a_ring_the_wait_ends_in_time(bell):
    begun_s = time.monotonic()
    await asyncio.wait_for(bell.wait(0.05), LONG_S)
    assert time.monotonic() - begun_s >= 0.05


@pytest.mark.parametrize("ends", ["cancelled", "in time"])
async def test_a_wait_that_is_over_listens_no_longer(bell, ends):
    waiting = asyncio.create_task(bell.wait(LONG_S if ends == "cancelled" else 0.01))
    await asyncio.sleep(0)
    if ends == "cancelled":
        waiting.cancel()
    await asyncio.wait({waiting})
    assert not asyncio.get_running_loop().remove_reader(bell._fd)


def test_ringing_never_waits_and_never_fails(tmp_path, caplog):
    BellRope(tmp_path).ring()
    bell = Bell(tmp_path)
    rope = BellRope(tmp_path)
    for _ in range(100_000):
        rope.ring()
    bell.close()
    bell.close()
    rope.ring()
    bell.ring()
    assert caplog.text == ""


@pytest.mark.parametrize(("make", "said"), [(Path.touch, "not a FIFO"), (Path.mkdir, "Is a directory")])
def test_what_is_no_bell_is_told_and_left_alone(tmp_path, caplog, make, said):
    make(bell_path(tmp_path))
    BellRope(tmp_path).ring()
    assert said in caplog.text
    assert not bell_path(tmp_path).is_file() or bell_path(tmp_path).stat().st_size == 0


def test_where_there_can_be_no_bell_the_agent_looks_often(tmp_path, caplog):
    config = AgentConfig.model_validate(
        {
            "run_dir": tmp_path / "absent",
            "listen": {"port": 1},
            "token_file": tmp_path / "token",
            "engine": {"port": 2, "model": "m", "served_name": "m"},
        }
    )
    assert isinstance(hang_bell(config), Ticks)
    assert "no FIFO can be made" in caplog.text


async def test_a_change_of_the_phase_is_told_by_the_supervisor_that_the_agent_builds(tmp_path):
    config = AgentConfig.model_validate(
        {
            "run_dir": tmp_path,
            "listen": {"port": 1},
            "token_file": tmp_path / "token",
            "engine": {"port": 2, "model": "m", "served_name": "m"},
        }
    )
    told: list[Phase] = []
    supervisor = build_supervisor(
        config, build_node(config.engine, {}), lambda: None, lambda: told.append(supervisor.phase)
    )
    supervisor.request_drain()
    assert told == [Phase.DRAINING]


async def test_without_a_bell_a_change_is_seen_all_the_same(state, monkeypatch):
    monkeypatch.setattr(feed_module, "LOOK_S", LONG_S)
    monkeypatch.setattr(feed_module, "MOST_S", LONG_S)
    async with aclosing(StateBroadcaster(Ticks(), state.fingerprint, state.line).watch()) as lines:
        await newest(lines)
        state.value = 1
        assert await newest(lines) == b"1"


def test_a_bell_replaces_the_one_that_an_earlier_agent_left(tmp_path):
    bell_path(tmp_path).write_text("not a FIFO")
    with Bell(tmp_path):
        assert bell_path(tmp_path).is_fifo()


@pytest.mark.usefixtures("only_the_bell")
async def test_a_ring_brings_the_change_and_all_watchers_share_its_line(tmp_path, feed, state):
    rope = BellRope(tmp_path)
    async with aclosing(feed.watch()) as first, aclosing(feed.watch()) as second:
        assert [await newest(first), await newest(second)] == [b"0", b"0"]
        for step in (1, 2, 3):
            state.value = step
            rope.ring()
            made = state.made
            assert [await newest(first), await newest(second)] == [b"%d" % step] * 2
            assert state.made == made + 1


@pytest.mark.usefixtures("only_the_bell")
async def test_a_ring_without_a_change_brings_no_line(tmp_path, feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        waiting = asyncio.create_task(anext(lines))
        looked = state.looked
        BellRope(tmp_path).ring()
        while state.looked == looked:
            await asyncio.sleep(0.001)
        assert (state.made, waiting.done()) == (1, False)
        state.value = 1
        BellRope(tmp_path).ring()
        assert await asyncio.wait_for(waiting, LONG_S / 2) == b"1"


async def test_a_change_that_rings_no_bell_is_seen_all_the_same(feed, state, monkeypatch):
    monkeypatch.setattr(feed_module, "MOST_S", LONG_S)
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        state.value = 1
        assert await newest(lines) == b"1"


async def test_a_line_comes_without_any_change(feed, state, monkeypatch):
    monkeypatch.setattr(feed_module, "MOST_S", 0.05)
    async with aclosing(feed.watch()) as lines:
        assert [await newest(lines) for _ in range(3)] == [b"0"] * 3


@pytest.mark.usefixtures("only_the_bell")
async def test_who_is_slow_misses_lines_but_not_the_newest(tmp_path, feed, state):
    rope = BellRope(tmp_path)
    async with aclosing(feed.watch()) as slow, aclosing(feed.watch()) as quick:
        await newest(slow)
        await newest(quick)
        for step in (1, 2, 3):
            state.value = step
            rope.ring()
            assert await newest(quick) == b"%d" % step
        assert await newest(slow) == b"3"
        assert state.made == 5


@pytest.mark.usefixtures("only_the_bell")
async def test_changes_in_quick_succession_share_a_line(tmp_path, feed, state, monkeypatch):
    monkeypatch.setattr(feed_module, "LEAST_S", 1.0)
    rope = BellRope(tmp_path)
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        for step in range(1, 11):
            state.value = step
            rope.ring()
            await asyncio.sleep(0)
        assert await newest(lines) == b"10"
        assert state.made == 2


async def test_an_ended_feed_says_the_last_state_and_ends(feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        state.value = 7
        feed.end()
        rest = [line async for line in lines]
    assert rest == [b"7"]


async def test_a_watch_of_an_ended_feed_ends_too(feed):
    feed.end()
    async with aclosing(feed.watch()) as lines:
        assert [line async for line in lines] == [b"0", b"0"]


@pytest.mark.usefixtures("only_the_bell")
@pytest.mark.parametrize("fault", ["broken", "blind"])
async def test_what_goes_wrong_ends_all_watches_and_new_ones_work(tmp_path, feed, state, fault):
    async with aclosing(feed.watch()) as waiting, aclosing(feed.watch()) as busy:
        await newest(waiting)
        await newest(busy)
        state.value = 1
        setattr(state, fault, True)
        BellRope(tmp_path).ring()
        with pytest.raises(ValueError, match="no l"):
            await newest(waiting)
        setattr(state, fault, False)
        async with aclosing(feed.watch()) as newcomer:
            assert await newest(newcomer) == b"1"
            with pytest.raises(ValueError, match="no l"):
                await newest(busy)
            state.value = 2
            BellRope(tmp_path).ring()
            assert await newest(newcomer) == b"2"
    state.value = 1
    async with aclosing(feed.watch()) as lines:
        assert await newest(lines) == b"1"
        state.value = 2
        BellRope(tmp_path).ring()
        assert await newest(lines) == b"2"


async def test_nobody_looks_while_nobody_watches(feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if "StateBroadcaster._look" in repr(task.get_coro())] == []

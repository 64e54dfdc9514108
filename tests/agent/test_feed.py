"""The bell between engine and agent, and the feed of those who watch."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from moe_agent import feed as feed_module
from moe_agent.bell import Bell, BellRope, bell_path
from moe_agent.feed import Feed

LONG_S = 20.0


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[Bell]:
    with Bell(tmp_path) as made:
        yield made


class State:
    """What changes, and how often lines were made of it."""

    def __init__(self) -> None:
        self.value = 0
        self.made = 0
        self.broken = False

    def fingerprint(self) -> int:
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
def feed(bell: Bell, state: State) -> Feed:
    return Feed(bell, state.fingerprint, state.line)


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
    await bell.wait(0.05)
    assert 0.05 <= time.monotonic() - begun_s < LONG_S


async def test_a_cancelled_wait_listens_no_longer(tmp_path, bell):
    waiting = asyncio.create_task(bell.wait(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    BellRope(tmp_path).ring()
    await asyncio.sleep(0.02)
    await asyncio.wait_for(bell.wait(LONG_S), LONG_S / 2)


def test_ringing_blocks_and_fails_never(tmp_path):
    BellRope(tmp_path).ring()
    bell = Bell(tmp_path)
    rope = BellRope(tmp_path)
    for _ in range(100_000):
        rope.ring()
    bell.close()
    rope.ring()


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
        BellRope(tmp_path).ring()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(lines), 0.1)
        assert state.made == 1


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


@pytest.mark.usefixtures("only_the_bell")
async def test_changes_in_quick_succession_share_a_line(tmp_path, feed, state, monkeypatch):
    monkeypatch.setattr(feed_module, "LEAST_S", 0.2)
    rope = BellRope(tmp_path)
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        for step in range(1, 11):
            state.value = step
            rope.ring()
            await asyncio.sleep(0.001)
        assert await newest(lines) == b"10"
        assert state.made == 2


async def test_an_ended_feed_says_the_last_state_and_ends(feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        state.value = 7
        feed.end()
        rest = [line async for line in lines]
    assert rest[-1] == b"7"


@pytest.mark.usefixtures("only_the_bell")
async def test_where_no_line_can_be_made_watches_fail_and_new_ones_work(tmp_path, feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
        state.value, state.broken = 1, True
        BellRope(tmp_path).ring()
        with pytest.raises(ValueError, match="no line"):
            await newest(lines)
    state.broken = False
    async with aclosing(feed.watch()) as lines:
        assert await newest(lines) == b"1"
        state.value = 2
        BellRope(tmp_path).ring()
        assert await newest(lines) == b"2"


async def test_nobody_looks_while_nobody_watches(feed, state):
    async with aclosing(feed.watch()) as lines:
        await newest(lines)
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if "Feed._look" in repr(task.get_coro())] == []

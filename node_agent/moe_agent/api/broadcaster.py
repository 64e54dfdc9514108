"""The watched stream of snapshots: one line for every change, made once for all who watch.

Run by `moe_agent.api.server`. While anyone watches, one task waits for the bell, looks whether something has changed,
and makes the new line for everybody.

Invariants: a watcher gets the state as of its begin, then the newest after each change: at most `LEAST_S` after it rang
the bell, else `LOOK_S`; lines for all are no closer than `LEAST_S`, and one comes at least each `MOST_S`. Who is slow
misses lines, never the newest. After `end` each watch has one more line, that of then. Where something goes wrong here,
all watches end with that error, and the next one begins anew.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from moe_agent.shared_memory.notifier import Announcements

LEAST_S = 0.01
MOST_S = 1.0
# By itself, in case a ring is lost.
LOOK_S = 0.25


class StateBroadcaster:
    """See the module.

    Args:
        bell: rings when a page has been written, or when something has changed in the agent itself.
        fingerprint: differs when anything has changed.
        line: the state as of now.
    """

    def __init__(self, bell: Announcements, fingerprint: Callable[[], object], line: Callable[[], bytes]) -> None:
        self._bell, self._fingerprint, self._line = bell, fingerprint, line
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None
        self._told: _Told
        self._ended = False

    def end(self) -> None:
        """Lets all watches end after a last line."""
        self._ended = True
        self._bell.ring()

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Lines, the first at once; ends after `end`."""
        self._watchers += 1
        try:
            if self._looking is None or self._looking.done():
                self._told = _Told()
                self._looking = asyncio.create_task(self._look(self._fingerprint()))
            told, heard, ends = self._told, self._told.lines, False
            yield self._line()
            while not ends:
                heard = await told.newer(heard)
                ends = told.is_last
                yield told.line
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                await self._stop()

    async def _stop(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})

    async def _look(self, seen: object) -> None:
        told_s = time.monotonic()
        try:
            while not self._told.is_last:
                await self._bell.wait(max(0.0, min(LOOK_S, told_s + MOST_S - time.monotonic())))
                # Steps that are shorter than this share a line.
                if (early_s := told_s + LEAST_S - time.monotonic()) > 0.0:
                    await asyncio.sleep(early_s)
                self._bell.hush()
                found, now_s = self._fingerprint(), time.monotonic()
                if found != seen or now_s - told_s >= MOST_S or self._ended:
                    seen, told_s = found, now_s
                    self._told.tell(self._line(), is_last=self._ended)
        except Exception as error:
            self._told.fail(error)


class _Told:
    """What was told since somebody began to look; the newest line alone is kept, however slow a watcher is."""

    def __init__(self) -> None:
        self.lines, self.line, self.is_last = 0, b"", False
        self._error: Exception | None = None
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(self, line: bytes, *, is_last: bool) -> None:
        self.lines, self.line, self.is_last = self.lines + 1, line, is_last
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def newer(self, heard: int) -> int:
        """How many lines there are, once there are more than `heard`."""
        while self.lines == heard:
            if self._error is not None:
                raise self._error
            await asyncio.shield(self._news)
        return self.lines

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        news.set_result(None)

"""The watched stream of snapshots: one line for every change, made once for all who watch.

Run by `moe_agent.server`. While anyone watches, one task waits for the bell, looks whether something has changed, and
has the new line for everybody.

Invariants: a watcher gets the state as of its begin, then the newest after each change: at most `LEAST_S` after it, or
`LOOK_S` where nothing rang; lines are no closer than `LEAST_S`, and one comes at least each `MOST_S`. Who is slow
misses lines, never the newest. The last line of a watch that is ended says what the state is then. Where a line cannot
be made, all watches end with that error.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from moe_agent.bell import Bell

LEAST_S = 0.01
MOST_S = 1.0
# New settings ring no bell.
LOOK_S = 0.25


class Feed:
    """See the module.

    Args:
        bell: rings when a page has been written.
        fingerprint: differs when anything has changed.
        line: the state as of now.
    """

    def __init__(self, bell: Bell, fingerprint: Callable[[], object], line: Callable[[], bytes]) -> None:
        self._bell, self._fingerprint, self._line = bell, fingerprint, line
        self._watchers = 0
        self._looking: asyncio.Task[None] | None = None
        self._next: asyncio.Future[None] | None = None
        self._lines, self._newest = 0, b""
        self._ended = False

    def end(self) -> None:
        """Lets all watches end after a last line."""
        self._ended = True

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Lines, the first at once; ends after `end`."""
        self._watchers += 1
        if self._looking is None or self._looking.done():
            self._next = asyncio.get_running_loop().create_future()
            self._looking = asyncio.create_task(self._look(self._fingerprint()))
        heard = self._lines
        try:
            yield self._line()
            while not self._ended:
                if heard == self._lines and self._next is not None:
                    await asyncio.shield(self._next)
                    continue
                heard = self._lines
                yield self._newest
            yield self._line()
        finally:
            self._watchers -= 1
            if self._watchers == 0 and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look(self, seen: object) -> None:
        told_s = time.monotonic()
        while True:
            await self._bell.wait(LOOK_S)
            # Steps that are shorter than this share a line.
            if (early_s := told_s + LEAST_S - time.monotonic()) > 0.0:
                await asyncio.sleep(early_s)
            self._bell.hush()
            now_s = time.monotonic()
            if (found := self._fingerprint()) != seen or now_s - told_s >= MOST_S or self._ended:
                seen, told_s = found, now_s
                if not self._tell():
                    return

    def _tell(self) -> bool:
        """Whether a line could be made."""
        told, self._next = self._next, asyncio.get_running_loop().create_future()
        assert told is not None
        try:
            self._newest = self._line()
        except Exception as error:
            told.set_exception(error)
            return False
        self._lines += 1
        told.set_result(None)
        return True

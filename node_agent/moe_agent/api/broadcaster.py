"""The watched stream of state snapshots: one snapshot is serialised for each change and fanned out to all watchers.

Run by `moe_agent.api.server`. While anyone watches, one task looks at the shared-memory records every
`POLL_INTERVAL_S`; a change within the agent itself (phase, settings) wakes it at once.

Invariants: a watcher first gets the current snapshot, then each newer one; a slow watcher skips snapshots, never the
latest. A snapshot comes with the version that was read before it was made, so that it is never older than its version.
At least one snapshot is sent every `HEARTBEAT_S`. After `end` each watch yields one last snapshot. An error
while a snapshot is made ends all watches with that error, and the next watch begins anew.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

# A signal 0.1 s old costs nothing measurable in TTFT, and one look takes the agent a quarter of a millisecond.
POLL_INTERVAL_S = 0.1
HEARTBEAT_S = 1.0

Version = tuple[int, ...]


class StateBroadcaster:
    """Sends the newest snapshot of the agent's state to all watchers.

    Args:
        changed: set when something has changed in the agent itself.
        version: differs from its last value when anything has changed.
        serialise: the current state as one line of JSON.
    """

    def __init__(self, changed: asyncio.Event, version: Callable[[], Version], serialise: Callable[[], bytes]) -> None:
        self._changed, self._version, self._serialise = changed, version, serialise
        self._watchers = 0
        self._polling: asyncio.Task[None] | None = None
        self._latest: _LatestSnapshot
        self._ended = False

    def end(self) -> None:
        """Ends all watches after one last snapshot."""
        self._ended = True
        self._changed.set()

    async def watch(self) -> AsyncGenerator[tuple[Version, bytes], None]:
        """Yields snapshots, each after its version, the first at once; returns after `end`."""
        self._watchers += 1
        try:
            version = self._version()
            if self._polling is None or self._polling.done():
                self._latest = _LatestSnapshot()
                self._polling = asyncio.create_task(self._poll(version))
            latest, seen, ends = self._latest, self._latest.number, False
            yield version, self._serialise()
            while not ends:
                seen = await latest.wait_newer(seen)
                ends = latest.is_last
                yield latest.version, latest.snapshot
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                await self._stop()

    async def _stop(self) -> None:
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.wait({polling})

    async def _poll(self, sent: Version) -> None:
        """Publishes a snapshot whenever the version differs from that of the last one."""
        sent_s = time.monotonic()
        try:
            while not self._latest.is_last:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_INTERVAL_S):
                        await self._changed.wait()
                self._changed.clear()
                version, now_s = self._version(), time.monotonic()
                if version != sent or now_s - sent_s >= HEARTBEAT_S or self._ended:
                    sent, sent_s = version, now_s
                    self._latest.publish(version, self._serialise(), is_last=self._ended)
        except Exception as error:
            self._latest.fail(error)


class _LatestSnapshot:
    """The newest snapshot with its number; older ones are not kept, however slow a watcher is."""

    def __init__(self) -> None:
        self.number, self.snapshot, self.is_last = 0, b"", False
        self.version: Version = ()
        self._error: Exception | None = None
        self._replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def publish(self, version: Version, snapshot: bytes, *, is_last: bool) -> None:
        self.number, self.version, self.snapshot, self.is_last = self.number + 1, version, snapshot, is_last
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    async def wait_newer(self, seen: int) -> int:
        """The number of the newest snapshot, once it is greater than `seen`; raises the error of `fail`."""
        while self.number == seen:
            if self._error is not None:
                raise self._error
            await asyncio.shield(self._replaced)
        return self.number

    def _wake(self) -> None:
        replaced, self._replaced = self._replaced, asyncio.get_running_loop().create_future()
        replaced.set_result(None)

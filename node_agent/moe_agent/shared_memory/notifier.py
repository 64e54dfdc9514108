"""The bell between an engine and its agent: a FIFO that a rank writes a byte to after its page.

Without it the agent would have to look at the pages a hundred times a second, also when nothing happens; where it
shares its cores with the engine that is felt. The agent hangs the bell up before an engine starts and outlives the
engine. The engine's side needs the standard library alone.

Invariants: to ring never waits for a listener and never fails, whether it is heard or not; a ring that is lost delays
what it would have told, since the agent looks by itself now and then (`moe_agent.api.broadcaster`), and loses nothing.
"""

import asyncio
import logging
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

log = logging.getLogger(__name__)

_NAME = "published.fifo"
_RING = b"\0"
_DRAIN_BYTES = 64 * 1024
# How often the pages are looked at where there is no bell.
_TICK_S = 0.025


def bell_path(run_dir: Path) -> Path:
    """Where the bell of an agent's engine hangs."""
    return run_dir / _NAME


class BellRope:
    """The engine's side; where no agent has hung a bell it is tied to nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._fd = _tie(bell_path(run_dir))
        if self._fd is not None:
            weakref.finalize(self, os.close, self._fd)

    def ring(self) -> None:
        """Something new stands in a page."""
        if self._fd is not None:
            _ring(self._fd)


def _tie(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: %s; the agent sees what is published later", path, error.strerror)
        return None
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    log.warning("%s: not a FIFO; the agent sees what is published later", path)
    return None


class Announcements(Protocol):
    """What tells the agent when to look."""

    async def wait(self, timeout_s: float) -> None:
        """Until it rings, at once where it has rung since it was hushed, or until the time is over. One waits."""

    def hush(self) -> None:
        """Forgets that it rang; whoever looks at the pages after this misses nothing."""

    def ring(self) -> None:
        """From the agent itself."""


class Bell:
    """The agent's side.

    Raises:
        OSError: the file system has no FIFOs, or the folder cannot be written to.
    """

    def __init__(self, run_dir: Path) -> None:
        path = bell_path(run_dir)
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Open for writing, too: without a writer a FIFO would be at its end, and always readable.
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def ring(self) -> None:
        if self._fd is not None:
            _ring(self._fd)

    async def wait(self, timeout_s: float) -> None:
        assert self._fd is not None
        loop, fd = asyncio.get_running_loop(), self._fd
        rung = loop.create_future()
        loop.add_reader(fd, _set_rung, rung)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await rung
        finally:
            loop.remove_reader(fd)

    def hush(self) -> None:
        assert self._fd is not None
        with suppress(BlockingIOError):
            os.read(self._fd, _DRAIN_BYTES)

    def close(self) -> None:
        """Nobody waits any more; to ring does nothing from now on."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Ticks:
    """In place of a bell, where there can be none: rings forty times a second."""

    async def wait(self, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, _TICK_S))

    def hush(self) -> None: ...

    def ring(self) -> None: ...

    def close(self) -> None: ...


def _ring(fd: int) -> None:
    # Full: it rings already. Broken: the agent is gone, and with it whoever would listen.
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, _RING)


def _set_rung(rung: asyncio.Future[None]) -> None:
    if not rung.done():
        rung.set_result(None)

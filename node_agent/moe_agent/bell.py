"""The bell between an engine and its agent: a FIFO that a rank writes a byte to after its page, so that nobody polls.

Looking at a page every 10 ms would wake the agent a hundred times a second, also when nothing happens; where it shares
its cores with the engine that is felt. The agent hangs the bell up before an engine starts and outlives the engine. The
engine's side needs the standard library alone.

Invariants: to ring never blocks and never fails, whether anyone hears it or not; a ring that is lost loses nothing, as
the agent also looks by itself now and then (`moe_agent.feed`).
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

_NAME = "published.fifo"
_RING = b"\0"
_DRAIN_BYTES = 64 * 1024


def bell_path(run_dir: Path) -> Path:
    """Where the bell of an agent's engine hangs."""
    return run_dir / _NAME


class BellRope:
    """The engine's side; without an agent it is tied to nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = os.open(bell_path(run_dir), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def ring(self) -> None:
        """Something new stands in a page."""
        if self._fd is not None:
            _ring(self._fd)


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
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def ring(self) -> None:
        """From the agent itself."""
        _ring(self._fd)

    async def wait(self, timeout_s: float) -> None:
        """Until it rings, at once where it has rung since it was hushed, or until the time is over."""
        loop = asyncio.get_running_loop()
        rung = loop.create_future()
        loop.add_reader(self._fd, _set_rung, rung)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await rung
        finally:
            loop.remove_reader(self._fd)

    def hush(self) -> None:
        """Forgets that it rang; whoever looks at the pages after this misses nothing."""
        with suppress(BlockingIOError):
            os.read(self._fd, _DRAIN_BYTES)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _ring(fd: int) -> None:
    # Full: it rings already. Broken: the agent is gone, and with it whoever would listen.
    with suppress(BlockingIOError, BrokenPipeError):
        os.write(fd, _RING)


def _set_rung(rung: asyncio.Future[None]) -> None:
    if not rung.done():
        rung.set_result(None)

"""Reports of changes with a least time between them, so that a peer that changes all the time makes no loop of passes.

Owned by one stream of states. Invariants: after a notable change a report follows at once, or `LEAST_BETWEEN_S` after
the last one; several changes in between have one report. No report follows `stop`.
"""

import asyncio
from collections.abc import Callable

# A pass reads the newest states, so that one report stands for all changes before it.
LEAST_BETWEEN_S = 1.0


class SpacedReports:
    """Passes on that something changed.

    Args:
        report: gets whether only numbers changed.
    """

    def __init__(self, report: Callable[[bool], None]) -> None:
        self._report = report
        self._is_stopped = False
        self._last_s = -LEAST_BETWEEN_S
        self._waiting: asyncio.TimerHandle | None = None

    def add(self, numbers_only: bool) -> None:
        """Reports a change; that of numbers alone, which its receiver spaces out, at once."""
        if self._is_stopped:
            return
        if numbers_only:
            self._report(True)
            return
        loop = asyncio.get_running_loop()
        wait_s = self._last_s + LEAST_BETWEEN_S - loop.time()
        if wait_s <= 0.0:
            self._report_now()
        elif self._waiting is None:
            self._waiting = loop.call_later(wait_s, self._report_now)

    def stop(self) -> None:
        """Drops the report that waits; none follows."""
        self._is_stopped = True
        if self._waiting is not None:
            self._waiting.cancel()

    def _report_now(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting, self._last_s = None, asyncio.get_running_loop().time()
        self._report(False)

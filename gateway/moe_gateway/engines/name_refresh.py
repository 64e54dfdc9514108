"""Asks all engines for their names when a request names a model that none has listed: it may have been loaded since.

Called before such a request is refused. One for a gateway. Anyone can name a model, so engines are asked at most once
in `PERIOD_S`, and requests that come meanwhile share the answer.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

PERIOD_S = 1.0


class NameRefresh:
    """Asks engines for their names, not too often.

    Args:
        ask: asks all engines, and returns once they have answered or taken too long.
        spawn: starts a task that ends with the gateway at the latest.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Coroutine[Any, Any, None]],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        clock: Callable[[], float],
    ) -> None:
        self._ask = ask
        self._spawn = spawn
        self._clock = clock
        self._asked_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    @property
    def may_help(self) -> bool:
        """Whether engines are being asked, or may be asked again."""
        return self._asking is not None or self._clock() - self._asked_s >= PERIOD_S

    async def refresh(self) -> None:
        """Returns once all engines were asked, if that is due."""
        if not self.may_help:
            return
        if self._asking is None:
            self._asking = self._spawn(self._run())
        # A client that leaves ends the wait of no other.
        await asyncio.shield(self._asking)

    async def _run(self) -> None:
        try:
            await self._ask()
        finally:
            self._asked_s, self._asking = self._clock(), None

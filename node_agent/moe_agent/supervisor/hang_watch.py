"""Whether an engine's core hangs while its HTTP server lives, asked at each health check.

Two signs: a core that has requests makes no step; or a core that has none does not answer when it is asked.
"""

import asyncio
from collections.abc import Callable

import aiohttp
from moe_contract.serving_routes import CORE

_PAUSE_S = 10.0


class HangWatch:
    """Watches the core of one engine, for one life of its process.

    Args:
        session: to the engine's server.
        unstepped_s: for how long the engine has made no step though it has requests, in seconds, at a monotonic time.
        limit_s: time without a step, or without an answer of an idle core, in seconds, that is a hang. A core on
            another node, whose steps are not seen here, may be busy for as long before it answers.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        unstepped_s: Callable[[float], float],
        *,
        limit_s: float,
    ) -> None:
        self._session, self._unstepped_s = session, unstepped_s
        self._limit_s = limit_s
        self._question: asyncio.Task[None] | None = None
        self._asked_s = float("-inf")

    async def look(self, now_s: float) -> str | None:
        """The reason why the engine counts as one that hangs; None while it does not.

        One that sleeps or is paused keeps its requests, and makes no step for them.
        """
        unstepped_s = self._unstepped_s(now_s)
        if unstepped_s > 0.0:
            # Its steps speak for it; between two of them it would answer late.
            self.close()
            hangs = unstepped_s > self._limit_s and not await is_asleep(self._session)
            return f"no step for {self._limit_s:g} s though there are requests" if hangs else None
        if self._question is not None and not self._question.done():
            hangs = now_s - self._asked_s > self._limit_s
            return f"the idle core gives no answer for {self._limit_s:g} s" if hangs else None
        if now_s - self._asked_s >= _PAUSE_S:
            self._question, self._asked_s = asyncio.create_task(self._ask()), now_s
        return None

    def close(self) -> None:
        """Gives an open question up."""
        if self._question is not None:
            self._question.cancel()
            self._question = None

    async def _ask(self) -> None:
        """Returns once the core answers, or where nobody can say whether it does."""
        try:
            async with self._session.get(CORE, timeout=aiohttp.ClientTimeout(total=None)) as answer:
                await answer.read()
        except (aiohttp.ClientError, OSError):
            return


async def is_asleep(session: aiohttp.ClientSession) -> bool:
    """Whether the engine was put to sleep or paused on request; False where it has no such routes."""
    for name in ("is_sleeping", "is_paused"):
        try:
            async with session.get(f"/{name}") as answer:
                if answer.status == 200 and (await answer.json()).get(name) is True:
                    return True
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError):
            continue
    return False

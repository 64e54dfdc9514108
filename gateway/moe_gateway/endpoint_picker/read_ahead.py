"""The messages of a stream, taken one at a time, and whether more can come while something else is awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Generic, TypeVar

Message = TypeVar("Message")
Result = TypeVar("Result")


class ReadAhead(Generic[Message]):
    """Messages in their order; one is read ahead while something else is awaited.

    Args:
        messages: until the other side ends them.
    """

    def __init__(self, messages: AsyncIterator[Message]) -> None:
        self._messages = messages
        self._ahead: asyncio.Task[Message | None] | None = None

    async def take(self) -> Message | None:
        """The next message; None once the other side has ended them."""
        if self._ahead is None:
            return await self._read()
        ahead, self._ahead = self._ahead, None
        return await ahead

    async def _read(self) -> Message | None:
        return await anext(self._messages, None)

    async def unless_ended(self, awaited: Awaitable[Result]) -> Result | None:
        """The result of something that takes a while; None, and it is cancelled, when the messages end before."""
        waiting = asyncio.ensure_future(awaited)
        if waiting.done():
            return waiting.result()
        if self._ahead is None:
            self._ahead = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({waiting, self._ahead}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done() and self._ahead.result() is not None:
                # One message is read ahead, and its end is known by the cancelling of the stream alone.
                await asyncio.wait({waiting})
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()

    def close(self) -> None:
        """Reads no more; called at the end of a stream."""
        if self._ahead is not None:
            self._ahead.cancel()

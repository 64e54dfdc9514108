"""A way to an engine over the loopback that can spoil its answers: transfers that fail, answers that come late.

Bytes pass unchanged while nothing is asked for. An engine that does not listen looks as one that closes at once.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

_CHUNK = 1 << 16
# The first digit of the id under which the other engine would fetch the blocks.
_ENGINE_ID = re.compile(rb'("remote_engine_id":\s*")([0-9a-f])')


class Interceptor:
    """Carries connections to one engine.

    Args:
        target: port of the engine.

    Attributes:
        spoils: whether the blocks that an answer names belong to an engine that does not exist.
        spoilt: answers that were spoilt so.
        held: answers that came late.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = asyncio.Event()
        self._to_hold = 0
        self.spoils = False
        self.spoilt = self.held = 0

    def hold(self, answers: int) -> None:
        """This number of answers that name blocks wait from now on; others pass, so the engine goes on."""
        self._to_hold = answers
        self._open.clear()

    def let_go(self) -> None:
        """The answers that wait pass."""
        self._to_hold = 0
        self._open.set()

    @contextlib.asynccontextmanager
    async def serving(self, port: int) -> AsyncIterator[None]:
        """Listens on a port of the loopback."""
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._carry(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", port)
        try:
            yield
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_engine, to_engine = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = [
            asyncio.create_task(self._copy(reader, to_engine)),
            asyncio.create_task(self._copy_answers(from_engine, writer)),
        ]
        try:
            # The end of one side is that of the connection: neither side closes its half alone.
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for each in (to_engine, writer):
                each.close()
            for each in (to_engine, writer):
                with contextlib.suppress(OSError):
                    await each.wait_closed()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()

    async def _copy_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self._to_hold and _ENGINE_ID.search(data) is not None:
                    self._to_hold -= 1
                    self.held += 1
                    await self._open.wait()
                writer.write(self._spoil(data) if self.spoils else data)
                await writer.drain()

    def _spoil(self, data: bytes) -> bytes:
        def other(found: re.Match[bytes]) -> bytes:
            self.spoilt += 1
            return found[1] + (b"1" if found[2] == b"0" else b"0")

        return _ENGINE_ID.sub(other, data)

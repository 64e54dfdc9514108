"""Finds the engine that keeps a response which another gateway passed on: all engines are asked for it at once.

Called before a request is dispatched that names a response of which no engine is known. Without keys alone: with keys a
response is its tenant's, and whose it is only the gateway knows that passed it on.
"""

import asyncio
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

from moe_gateway.engines.fleet import Engine
from moe_gateway.http.heads import build_request_head
from moe_gateway.http.upstream import Pool, UpstreamConnection

# An engine that takes longer to look into its memory has stopped, or is far behind.
SEARCH_TIMEOUT_S = 2.0
# Searches at a time: each asks every engine.
MOST_SEARCHES = 8


class SearchIncomplete(Exception):
    """No engine said that it has the response, and not all of them answered."""


class _Keeping(Enum):
    """What an engine says: `HERE`: it has the response. `NOT_HERE`: it has not. `UNKNOWN`: it did not say."""

    HERE = "here"
    NOT_HERE = "not_here"
    UNKNOWN = "unknown"


class _EngineAnswer(NamedTuple):
    server: str
    kept: _Keeping


class Question:
    """A request for one response at one engine, as the `Receiver` of its connection; only the status is read.

    Attributes:
        status: of the engine's answer, once it is there.
    """

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def received(self, _data: bytes, connection: UpstreamConnection) -> None:
        """More of the answer came."""
        if connection.head_complete and not self.status.done():
            self.status.set_result(connection.status)

    def lost(self, _connection: UpstreamConnection, reason: str) -> None:
        """The answer has no end."""
        if not self.status.done():
            self.status.set_exception(ConnectionError(reason))


class ResponseSearch:
    """Asks engines; one for a gateway.

    Args:
        pool_of: connections to an engine by its name; None for one that is not known.
    """

    def __init__(self, pool_of: Callable[[str], Pool | None]) -> None:
        self._pool_of = pool_of
        self._turn = asyncio.Semaphore(MOST_SEARCHES)

    async def find(
        self, url: bytes, engines: Iterable[Engine], request_id: bytes, is_wanted: Callable[[], bool]
    ) -> str | None:
        """Returns the name of the engine that has a response; None where none has it, or nobody wants to know.

        Args:
            url: of the response, `/v1/responses/{id}`.
            engines: those to ask, as they are when the turn of this search comes.
            request_id: of the request that names the response.
            is_wanted: whether the answer is still wanted; asked when its turn comes.

        Raises:
            SearchIncomplete: an engine that may have it did not answer in time.
        """
        async with self._turn:
            if not is_wanted():
                return None
            asking = [asyncio.create_task(self._ask(engine, url, request_id)) for engine in engines]
            is_complete = True
            try:
                for next_answer in asyncio.as_completed(asking):
                    answer = await next_answer
                    if answer.kept is _Keeping.HERE:
                        return answer.server
                    is_complete = is_complete and answer.kept is _Keeping.NOT_HERE
            finally:
                for task in asking:
                    task.cancel()
        if not is_complete:
            raise SearchIncomplete
        return None

    async def _ask(self, engine: Engine, url: bytes, request_id: bytes) -> _EngineAnswer:
        name = engine.address.name
        if (pool := self._pool_of(name)) is None:
            return _EngineAnswer(name, _Keeping.NOT_HERE)
        head = build_request_head(b"GET", url, b"", host=engine.host, body_bytes=0, request_id=request_id, rank=None)
        try:
            async with asyncio.timeout(SEARCH_TIMEOUT_S):
                # An idle connection may be about to close, which would look like an engine that does not answer.
                connection = await pool.connect()
                try:
                    question = Question()
                    connection.request(question, head, b"")
                    status = await question.status
                finally:
                    connection.abort()
        except ConnectionRefusedError:
            # Where no server listens, no response is kept.
            return _EngineAnswer(name, _Keeping.NOT_HERE)
        except OSError:
            return _EngineAnswer(name, _Keeping.UNKNOWN)
        if status == 200:
            return _EngineAnswer(name, _Keeping.HERE)
        return _EngineAnswer(name, _Keeping.UNKNOWN if status >= 500 else _Keeping.NOT_HERE)

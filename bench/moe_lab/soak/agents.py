"""The agents of mock engines: they publish an engine's phase and steps, as a node agent does, from its page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from moe_contract.agent_state import READY, AgentState, EngineProcess, RankReport, write_agent_state
from moe_scheduling.signals import StepTime

from moe_lab.soak.answers import MODEL
from moe_lab.soak.processes import MockProcess

PERIOD_S = 0.1
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\nconnection: close\r\n\r\n"
_STEP_TIME = StepTime(base_s=0.004, prefill_s=0.00001, decode_s=0.0001)


def read_state(engine: MockProcess) -> AgentState:
    """The state of an engine: ready while its process runs, whatever its core does."""
    running = engine.launched.is_running
    step, requests = engine.page.read_steps()
    rank = RankReport(rank=0, step=step, running=requests, decode_tokens=requests, step_time=_STEP_TIME)
    return AgentState(
        name=engine.name,
        phase=READY if running else "backoff",
        accepting=running,
        engine=EngineProcess(
            url=f"http://127.0.0.1:{engine.port}", model=MODEL, pid=engine.launched.starts, identity=MODEL
        ),
        ranks=(rank,),
    )


@contextlib.asynccontextmanager
async def serving_agents(engines: Sequence[MockProcess]) -> AsyncIterator[None]:
    """Serves the states of all engines that have an agent."""
    async with contextlib.AsyncExitStack() as stack:
        for engine in engines:
            if engine.agent_port is not None:
                await stack.enter_async_context(_serving_agent(engine))
        yield


@contextlib.asynccontextmanager
async def _serving_agent(engine: MockProcess) -> AsyncIterator[None]:
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        # A task of a stream's server that is cancelled would be reported as an exception.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, RuntimeError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_HEAD)
            while not writer.is_closing():
                writer.write(write_agent_state(read_state(engine)))
                await writer.drain()
                await asyncio.sleep(PERIOD_S)
        writers.discard(writer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", engine.agent_port)
    try:
        yield
    finally:
        server.close()
        for writer in list(writers):
            writer.transport.abort()

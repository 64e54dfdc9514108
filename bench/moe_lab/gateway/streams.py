"""What a router does to streams: seconds between their events, also beside large bodies, and memory of idle ones.

Runs in the process of the benchmark, as the load does. Each stream is a connection of its own.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from moe_lab.gateway.engine import IDLE_TOKENS, MODEL, STEP_S
from moe_lab.gateway.load import WrongAnswer, ask_repeatedly, build_request, frame_request
from moe_lab.gateway.processes import GatewayProcess

LARGE_BODY_BYTES = 8 * 1024 * 1024
# Streams whose events are timed, and connections that send large bodies meanwhile.
TIMED_STREAMS = 16
LARGE_CONNECTIONS = 2
# Idle streams that are opened at a time.
IDLE_STREAMS = 100
_EVENT_MARK = b"data: "
_END = b"0\r\n\r\n"
# A run that is many times too long hangs.
_PATIENCE_S = 60.0


class StreamReader(asyncio.Protocol):
    """One stream: asks for it, and notes when its events come.

    Attributes:
        gaps_s: seconds between events that came one after the other.
        begun: set with the first event.
        ended: set with the end of the stream, or of the connection.
        events: those that came.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._last_s = 0.0
        self.gaps_s: list[float] = []
        self.events = 0
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of the one that can write.
        self.transport = transport  # type: ignore[assignment]
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if events := data.count(_EVENT_MARK):
            now_s = time.perf_counter()
            if self.events:
                self.gaps_s.append(now_s - self._last_s)
            self._last_s, self.events = now_s, self.events + events
            self.begun.set()
        if data.endswith(_END):
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def _open(port: int, count: int, request: bytes) -> list[StreamReader]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: StreamReader(request), "127.0.0.1", port) for _ in range(count)]
    return [reader for _, reader in made]


async def time_events(port: int, *, seconds: float, large_bodies: bool) -> list[float]:
    """Seconds between the events of each of some streams, while other clients send large bodies or nobody does.

    Raises:
        WrongAnswer: a stream or an answer to a large body is not the engine's.
    """
    events = max(2, round(seconds / STEP_S))
    readers = await _open(port, TIMED_STREAMS, build_request(events=events))
    asking: list[asyncio.Task[object]] = []
    if large_bodies:
        load = ask_repeatedly(port, connections=LARGE_CONNECTIONS, seconds=seconds, request=build_large_request())
        asking.append(asyncio.create_task(load))
    try:
        async with asyncio.timeout(10 * seconds + _PATIENCE_S):
            for reader in readers:
                await reader.ended.wait()
            await asyncio.gather(*asking)
    finally:
        _close(readers)
        for task in asking:
            task.cancel()
    if any(reader.events != events + 1 for reader in readers):
        raise WrongAnswer(f"streams of {[reader.events - 1 for reader in readers]} events, not {events}")
    return [gap_s for reader in readers for gap_s in reader.gaps_s]


def build_large_request() -> bytes:
    """A chat request of 8 MiB for a small JSON answer."""
    text = "word " * (LARGE_BODY_BYTES // 5)
    return frame_request(orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]}))


def _close(readers: Sequence[StreamReader]) -> None:
    for reader in readers:
        if reader.transport is not None:
            reader.transport.close()


@dataclass(frozen=True, slots=True)
class IdleGrowth:
    """Bytes that each of the newest idle streams took, by the routers' names."""

    bytes_each: dict[str, float]


async def grow_idle(routers: Sequence[GatewayProcess], rounds: int) -> list[IdleGrowth]:
    """Opens idle streams at the routers in turn, round after round, and keeps them open; the first round warms up.

    Raises:
        WrongAnswer: a stream did not begin, or has ended.
    """
    opened: list[StreamReader] = []
    found = []
    try:
        for number in range(rounds + 1):
            turn = routers if number % 2 else list(reversed(routers))
            found.append(IdleGrowth({router.name: await _grow(router, opened) for router in turn}))
        if any(reader.ended.is_set() for reader in opened):
            raise WrongAnswer("idle streams have ended")
    finally:
        _close(opened)
    return found[1:]


async def _grow(router: GatewayProcess, opened: list[StreamReader]) -> float:
    before = private_bytes(router.process.pid)
    readers = await _open(router.port, IDLE_STREAMS, build_request(events=IDLE_TOKENS))
    opened += readers
    async with asyncio.timeout(_PATIENCE_S):
        for reader in readers:
            await reader.begun.wait()
    # An allocator may have had room for all of them.
    return max(1.0, (private_bytes(router.process.pid) - before) / IDLE_STREAMS)


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other, in bytes."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Private_"))

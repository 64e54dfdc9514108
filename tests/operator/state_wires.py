"""Peers whose streams of states carry what a test says, and the streams that an operator keeps to them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import aiohttp
import orjson
from moe_contract.agent_state import AgentState, read_agent_state
from moe_contract.clients import Unreachable
from moe_operator.kubernetes.peers import Peer
from moe_operator.kubernetes.state_streams import StateStreams
from moe_operator.kubernetes.store import Key

KEY = Key("ns", "tiny")
LOST, ENDED = "lost", "ended"


def engine(pod: str = "e-0", url: str = "http://e-0") -> Peer:
    return Peer(pod=pod, url=url, component="engine", revision="stable")


GATEWAY = Peer(pod="g-0", url="http://g-0", component="gateway", revision="")


def state(phase: str = "ready", running: int = 0, uid: str = "") -> bytes:
    return orjson.dumps({"phase": phase, "ranks": [{"rank": 0, "running": running}], "pod": {"uid": uid}})


class Wires:
    """Peers by URL: each has a queue of what its stream carries; one without a queue cannot be reached."""

    closed = False

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[bytes | str | Exception]] = {}
        self.opened: list[tuple[str, float]] = []
        self.answers: dict[str, bytes] = {}
        self.open = 0

    def say(self, url: str, *words: bytes | str | Exception) -> None:
        queue = self.queues.setdefault(url, asyncio.Queue())
        for word in words:
            queue.put_nowait(word)

    async def read(self, _: object, url: str, interval_s: float, silence_s: float) -> AsyncGenerator[bytes]:
        self.opened.append((url, asyncio.get_running_loop().time()))
        if url not in self.queues:
            raise Unreachable("cannot be reached")
        self.open += 1
        try:
            while (word := await self.queues[url].get()) != ENDED:
                if word == LOST:
                    del self.queues[url]
                    raise Unreachable("cannot be reached")
                if isinstance(word, Exception):
                    raise word
                assert isinstance(word, bytes)
                yield word
        finally:
            self.open -= 1

    async def ask(self, _: object, peer: Peer) -> AgentState | None:
        text = self.answers.get(peer.url)
        return None if text is None else read_agent_state(text)


class Followed:
    """Streams over wires, and what they reported."""

    def __init__(self, most: int = 100) -> None:
        self.wires, self.changes = Wires(), list[tuple[Key, bool]]()
        self.streams = StateStreams(
            cast(aiohttp.ClientSession, self.wires),
            lambda key, numbers_only: self.changes.append((key, numbers_only)),
            most,
            read=cast(Any, self.wires.read),
            ask=cast(Any, self.wires.ask),
        )


async def settle() -> None:
    """Lets all that can run now run."""
    await asyncio.sleep(0.001)

"""The states of agents and gateways, pushed over one stream for each pod instead of asked for at each pass.

Owned by the reconciler: a pass says which peers its resource has, and gets their newest states. A change calls
`on_change`, for each peer at most once in `LEAST_BETWEEN_S` unless only numbers change. A peer that cannot stream (of
an older version, behind a proxy that buffers, or without a descriptor for it) is asked at each pass.

Invariants: a state is valid while its stream lives, which is `STREAM_SILENCE_S` after the last byte at most, and
through one try to open the stream anew. It is accepted only where the answer carries the uid of the pod
(`identity.py`), and a pod with another uid gets a stream of its own. No stream is open for a resource that was
forgotten, nor after `close`.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

import aiohttp
from moe_contract.agent_state import AgentState, read_agent_state
from moe_contract.clients import PeerError, Refused, Unreadable
from moe_contract.gateway_state import GatewayState, read_gateway_state
from moe_contract.routes import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, STREAM_SILENCE_S
from moe_contract.state_stream import NotStreamed, Silent, read_states

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s
from moe_operator.autoscale.signal import Freshness, States
from moe_operator.kubernetes.peers import Peer, accept_states, fetch_state, is_stranger
from moe_operator.kubernetes.spaced_reports import SpacedReports
from moe_operator.kubernetes.store import Key
from moe_operator.plan.pod_status import ENGINE

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 15.0
# A pass, which is made while a resource is not well, has waiting tries made at once, but not more often than this.
LEAST_RETRY_S = 2.0
# A stream that lived for so long starts with short pauses again.
STEADY_AFTER_S = 30.0
# A peer that refuses a stream or sends nothing, but answers when it is asked, is asked for so long.
ASKED_FOR_S = 300.0
# Least time between two states of a peer that differ in numbers alone.
NUMBERS_EVERY_S, LEAST_NUMBERS_EVERY_S = 15.0, 0.5
NUMBERS_PER_DECISION = 5
# What is notable of another pod that answers at the address of a peer: nothing that it says.
_STRANGER = ("stranger",)
# A heartbeat so long after the interval says that the numbers are as they were: changed ones would have come before it.
SAME_AFTER_S = 1.0

State = AgentState | GatewayState
Read = Callable[[aiohttp.ClientSession, str, float, float], AsyncGenerator[bytes]]
Ask = Callable[[aiohttp.ClientSession, Peer], Awaitable[State | None]]
log = logging.getLogger("moeserving.operator")


def numbers_interval_s(resource: MoEServing) -> float:
    """Least time between two states that differ in numbers alone: an autoscaler reads several for each decision."""
    section = resource.spec.autoscaling
    if section is None or section.mode is not AutoscalingMode.INTERNAL:
        return NUMBERS_EVERY_S
    return min(NUMBERS_EVERY_S, max(LEAST_NUMBERS_EVERY_S, duration_s(section.interval) / NUMBERS_PER_DECISION))


class StateStreams:
    """The streams of all resources.

    Args:
        session: to read with; its connector needs room for all streams.
        on_change: called with the resource of a peer whose state changed; the flag says that only numbers did.
        most: streams that may be open at a time; further peers are asked at each pass.
        read: the states of a peer, as `read_states`.
        ask: the state of a peer as of now, as `fetch_state`.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        on_change: Callable[[Key, bool], None],
        most: int = 100_000,
        read: Read = read_states,
        ask: Ask = fetch_state,
    ) -> None:
        self._session, self._on_change, self._most = session, on_change, most
        self._read, self._ask = read, ask
        self._streams: dict[Key, dict[str, _Stream]] = {}

    @property
    def count(self) -> int:
        """How many peers have a stream, open or to be opened."""
        return sum(not stream.is_asked for streams in self._streams.values() for stream in streams.values())

    async def fetch(self, key: Key, peers: Sequence[Peer], interval_s: float = NUMBERS_EVERY_S) -> States:
        """The newest states of these peers that answer as themselves; other streams of the resource are closed.

        Waits for the first answer of a peer that is new, at most as long as for any answer.
        """
        streams = self._follow(key, peers, interval_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_TIMEOUT_S + READ_TIMEOUT_S):
                for stream in streams:
                    await stream.answered.wait()
        for stream in streams:
            # No pass waits for its first state any more, so that one is a change.
            stream.answered.set()
        answers = await asyncio.gather(*(stream.newest() for stream in streams))
        rows = [(stream.peer, *answer) for stream, answer in zip(streams, answers, strict=True)]
        found = accept_states((peer, state) for peer, state, _ in rows)
        return replace(found, freshness={peer.pod: fresh for peer, _, fresh in rows if peer.pod in found})

    def is_pushed(self, key: Key) -> bool:
        """Whether each change of a peer of this resource comes by itself, so that no pass has to look for it."""
        return all(not stream.is_asked for stream in self._streams.get(key, {}).values())

    def forget(self, key: Key) -> None:
        """Closes the streams of a resource."""
        for stream in self._streams.pop(key, {}).values():
            stream.stop()

    async def close(self) -> None:
        """Closes all streams; returns once they are."""
        tasks = [stream.task for streams in self._streams.values() for stream in streams.values()]
        for key in [*self._streams]:
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, key: Key, peers: Sequence[Peer], interval_s: float) -> list["_Stream"]:
        if not peers:
            self.forget(key)
            return []
        streams = self._streams.setdefault(key, {})
        wanted = {peer.pod: peer for peer in peers}
        for pod, stream in [*streams.items()]:
            if wanted.get(pod) != stream.peer or stream.interval_s != interval_s:
                streams.pop(pod).stop()
        for pod, peer in wanted.items():
            if pod in streams:
                streams[pod].retry_now()
            else:
                streams[pod] = self._start(key, peer, interval_s)
        return [streams[pod] for pod in wanted]

    def _start(self, key: Key, peer: Peer, interval_s: float) -> "_Stream":
        is_full = self._most <= self.count
        return _Stream(
            self._session,
            peer,
            interval_s,
            self._read,
            self._ask,
            lambda numbers_only: self._on_change(key, numbers_only),
            is_asked=is_full,
        )


class _Stream:
    """The stream of one peer: a task that reads it and opens it anew when it ends.

    Attributes:
        peer: whose state it is.
        interval_s: least time between two states that differ in numbers alone.
        answered: set once the first try has given a state or failed.
        is_asked: the peer does not stream, or did not lately; each pass asks it.
        is_open: the stream is being read.
        task: that reads.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        peer: Peer,
        interval_s: float,
        read: Read,
        ask: Ask,
        on_change: Callable[[bool], None],
        *,
        is_asked: bool,
    ) -> None:
        self.peer, self.interval_s = peer, interval_s
        self._session, self._read_states, self._ask = session, read, ask
        self._reports = SpacedReports(on_change)
        self.answered = asyncio.Event()
        self.is_asked, self.is_open = is_asked, False
        self._freshness, self._taken_s = _fresh_now(), _now_s()
        # The newest state as it was sent: most of them are never looked at.
        self._text: bytes | None = None
        self._notable: tuple[object, ...] | None = None
        self._retry = asyncio.Event()
        self._tried_s = -LEAST_RETRY_S
        if is_asked:
            self.answered.set()
        self.task = asyncio.ensure_future(_nothing() if is_asked else self._run())

    def stop(self) -> None:
        """Closes the stream; no change is reported any more."""
        self._reports.stop()
        self.answered.set()
        self.task.cancel()

    def retry_now(self) -> None:
        """Ends the pause before the next try, unless the last one was just made."""
        if not self.is_open and _now_s() - self._tried_s >= LEAST_RETRY_S:
            self._retry.set()

    async def newest(self) -> tuple[State | None, Freshness]:
        """The newest state, None when there is none that is valid and can be read, and how new it is."""
        if self.is_asked:
            return await self._ask(self._session, self.peer), _fresh_now()
        return None if self._text is None else self._read(self._text), self._freshness

    def _read(self, text: bytes) -> State | None:
        try:
            return read_agent_state(text) if self.peer.component == ENGINE else read_gateway_state(text)
        except ValueError:
            return None

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._session.closed:
            opened_s = self._tried_s = _now_s()
            try:
                await self._follow()
            except NotStreamed as answer:
                self.is_asked = True
                self._take(answer.state)
                return
            except (Refused, Unreadable, Silent):
                if not self.is_open and await self._answers():
                    await asyncio.sleep(ASKED_FOR_S)
                    continue
            except PeerError:
                pass
            except Exception as error:
                # Whatever a peer sends, its stream is opened anew.
                log.warning("the state of %s: %r", self.peer.pod, error)
            if self.is_open and _now_s() - opened_s > STEADY_AFTER_S:
                retry_s = FIRST_RETRY_S
            if self.is_open:
                # The state stays through the first try; all streams of a node do not come back in the same moment.
                self.is_open = False
                await asyncio.sleep(retry_s * random.uniform(0.0, 1.0))
            else:
                self._lose()
                await self._pause(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(LONGEST_RETRY_S, 2.0 * retry_s)

    async def _follow(self) -> None:
        states = self._read_states(self._session, self.peer.url, self.interval_s, STREAM_SILENCE_S)
        async with contextlib.aclosing(states):
            async for text in states:
                if not text:
                    self._note_heartbeat()
                    continue
                self.is_open, self.is_asked = True, False
                self._freshness, self._taken_s = _fresh_now(), _now_s()
                self._take(text)

    def _note_heartbeat(self) -> None:
        if not self.is_open:
            return
        now_s = _now_s()
        is_same = now_s - self._taken_s >= self.interval_s + SAME_AFTER_S
        self._freshness = Freshness(as_of_s=now_s if is_same else self._freshness.as_of_s, alive_s=now_s)

    async def _answers(self) -> bool:
        """Whether the peer, which gave no stream, says its state when it is asked; then it is asked at each pass."""
        if await self._ask(self._session, self.peer) is None:
            return False
        self.is_asked, self._text, self._notable = True, None, None
        self.answered.set()
        self._reports.add(False)
        return True

    def _take(self, text: bytes) -> None:
        state = self._read(text)
        before, notable = self._notable, self._notable_of(state)
        is_same = text == self._text
        self._text, self._notable = text, notable
        is_first = not self.answered.is_set()
        self.answered.set()
        # The pass that waits for the first state sees it.
        if not is_first and not is_same and not before == notable == _STRANGER:
            self._reports.add(before == notable)

    def _notable_of(self, state: State | None) -> tuple[object, ...] | None:
        if is_stranger(self.peer, state):
            return _STRANGER
        return None if state is None else state.notable

    def _lose(self) -> None:
        was_known, self._text, self._notable = self._text is not None, None, None
        self.answered.set()
        if was_known:
            self._reports.add(False)

    async def _pause(self, seconds: float) -> None:
        self._retry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._retry.wait()


async def _nothing() -> None:
    """The task of a peer that is asked."""


def _fresh_now() -> Freshness:
    return Freshness(as_of_s=_now_s(), alive_s=_now_s())


def _now_s() -> float:
    return asyncio.get_running_loop().time()

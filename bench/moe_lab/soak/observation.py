"""What gateways say of themselves during a soak: state, memory, descriptors, and exceptions in their logs."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from moe_lab.soak.processes import SoakGateway

# Back to the start means: at most this much above it. The start of memory is after the first requests, when all code is
# loaded; what a gateway remembers (100,000 sessions and responses, prefixes of prompts) has a bound, and grows to it.
MEMORY_TOLERANCE_BYTES = 64 * 1024 * 1024
DESCRIPTOR_TOLERANCE = 8
SETTLE_TIMEOUT_S = 120.0
_POLL_S = 0.1
_SIGNS = ("Traceback", "a periodic check failed", "a body was not read", "Fatal error", "exception was never retrieved")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayReport:
    """One gateway at the end of a soak.

    Attributes:
        name: of the gateway.
        is_steady: whether it ran from the beginning to the end.
        in_flight: requests that it counts as in flight when all have ended.
        held: requests that it counts as held then.
        unanswered_tokens: prompt tokens that it counts as unanswered then.
        finished: requests that it counts as finished.
        memory_start_bytes: resident memory after the warm-up; of its last start.
        memory_end_bytes: resident memory at the end.
        descriptors_start: open files and connections before the first request.
        descriptors_end: those at the end.
        exceptions: lines of its log that show an exception.
    """

    name: str
    is_steady: bool
    in_flight: int
    held: int
    unanswered_tokens: int
    finished: int
    memory_start_bytes: int
    memory_end_bytes: int
    descriptors_start: int
    descriptors_end: int
    exceptions: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """The guarantees that it breaks, in words."""
        found = []
        if self.in_flight or self.held or self.unanswered_tokens:
            found.append(
                f"{self.name}: {self.in_flight} requests in flight, {self.held} held and {self.unanswered_tokens} "
                "tokens unanswered after the end of all"
            )
        if self.is_steady and self.memory_end_bytes > self.memory_start_bytes + MEMORY_TOLERANCE_BYTES:
            found.append(
                f"{self.name}: memory went from {self.memory_start_bytes:,} to {self.memory_end_bytes:,} bytes"
            )
        if self.descriptors_end > self.descriptors_start + DESCRIPTOR_TOLERANCE:
            found.append(f"{self.name}: descriptors went from {self.descriptors_start} to {self.descriptors_end}")
        return found + [f"{self.name}: exception in its log: {line}" for line in self.exceptions]


async def read_state(session: aiohttp.ClientSession, gateway: SoakGateway) -> Any | None:
    """The state of a gateway; None where it does not answer."""
    try:
        timeout = aiohttp.ClientTimeout(total=5.0)
        async with session.get(f"{gateway.admin_url}/v1/state", timeout=timeout) as answer:
            return await answer.json()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def accepting_engines(state: Any) -> set[str]:
    """The names of the engines that get new requests."""
    return {row["name"] for row in state["engines"] if row["accepting"]}


def is_at_rest(state: Any | None) -> bool:
    """Whether a gateway counts no request any more."""
    return state is not None and not (state["in_flight"] or state["held"] or _unanswered(state))


def _unanswered(state: Any) -> int:
    return sum(int(row["unanswered_prefill_tokens"]) for row in state["engines"])


async def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits until the condition holds; returns whether it did within the time."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True


async def observe_end(
    session: aiohttp.ClientSession, gateway: SoakGateway, memory_start_bytes: int, descriptors_start: int
) -> GatewayReport:
    """Waits until a gateway is at rest and its connections have ended, and reports how it stands then."""
    until_s = time.monotonic() + SETTLE_TIMEOUT_S
    state = await read_state(session, gateway)
    while time.monotonic() < until_s:
        state = await read_state(session, gateway)
        if is_at_rest(state) and gateway.count_descriptors() <= descriptors_start + DESCRIPTOR_TOLERANCE:
            break
        await asyncio.sleep(_POLL_S)
    if state is None:
        state = {"in_flight": -1, "held": -1, "engines": [], "totals": {"requests": 0}}
    return GatewayReport(
        name=gateway.name,
        is_steady=gateway.is_steady,
        in_flight=state["in_flight"],
        held=state["held"],
        unanswered_tokens=_unanswered(state),
        finished=state["totals"]["requests"],
        memory_start_bytes=memory_start_bytes,
        memory_end_bytes=gateway.read_memory_bytes(),
        descriptors_start=descriptors_start,
        descriptors_end=gateway.count_descriptors(),
        exceptions=tuple(find_exceptions(gateway.launched.log.read_text(errors="replace"))),
    )


def find_exceptions(log: str) -> list[str]:
    """The lines of a gateway's log that show an exception, at most five."""
    return [line[:2000] for line in log.splitlines() if any(sign in line for sign in _SIGNS)][:5]

"""All processes of a soak: mock engines with and without an agent, perhaps a real engine, and gateways before them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from moe_lab.soak.agents import serving_agents
from moe_lab.soak.observation import accepting_engines, read_state
from moe_lab.soak.processes import DidNotStart, MockProcess, SoakGateway, start_mock
from moe_lab.soak.real_engine import RealEngine

MOCKS = 4
REAL_START_TIMEOUT_S = 900.0
START_TIMEOUT_S = 180.0
_POLL_S = 0.1
# The first gateway runs from the beginning to the end; each has another policy.
POLICIES = ("predicted", "roundRobin")


@dataclass(slots=True, kw_only=True)
class SoakTestbed:
    """What runs.

    Attributes:
        mocks: mock engines; every second one has an agent.
        real: the real engine; None without one.
        gateways: before all engines; the first is steady.
        session: for the gateways' states.
    """

    mocks: list[MockProcess]
    real: RealEngine | None
    gateways: list[SoakGateway]
    session: aiohttp.ClientSession

    async def wait_until_accepting(self, engine: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits until all gateways that answer send requests to an engine.

        Raises:
            DidNotStart: they do not within the time.
        """
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            states = [await read_state(self.session, gateway) for gateway in self.gateways]
            known = [state for state in states if state is not None]
            if known and all(engine in accepting_engines(state) for state in known):
                return
            await asyncio.sleep(_POLL_S)
        raise DidNotStart(f"no gateway sends requests to {engine} for {timeout_s:g} s")

    async def wait_until_serving(self, gateway: SoakGateway) -> None:
        """Waits until a gateway sends requests to engines.

        Raises:
            DidNotStart: it ended, or does not within the time.
        """
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s and gateway.launched.is_running:
            state = await read_state(self.session, gateway)
            if state is not None and state["accepting"]:
                return
            await asyncio.sleep(_POLL_S)
        raise DidNotStart(f"{gateway.name} does not serve; its log ends with:\n{gateway.launched.log_end()}")


@contextlib.asynccontextmanager
async def running(folder: Path, *, gateways: int, model: Path | None) -> AsyncIterator[SoakTestbed]:
    """Starts everything and waits until each gateway sends requests to each engine; ends everything after it.

    Args:
        folder: for configurations, logs and records.
        gateways: how many.
        model: folder of the tiny model for a real engine; None: no real engine.

    Raises:
        DidNotStart: something does not serve.
    """
    (folder / "token").write_text("soak\n", "utf-8")
    async with contextlib.AsyncExitStack() as stack:
        mocks = []
        for number in range(MOCKS):
            mocks.append(start_mock(f"mock-{number}", folder, with_agent=number % 2 == 0))
            stack.callback(mocks[-1].launched.kill)
        real = None
        if model is not None:
            real = RealEngine(folder, model)
            stack.callback(_end_real, real)
            real.launched.start()
        await stack.enter_async_context(serving_agents(mocks))
        rows = [mock.address for mock in mocks] + ([] if real is None else [real.address])
        started = []
        for number in range(gateways):
            policy = POLICIES[number % len(POLICIES)]
            started.append(SoakGateway(f"gateway-{number}", folder, rows, policy, steady=number == 0))
            started[-1].launched.start()
            stack.callback(started[-1].launched.kill)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        testbed = SoakTestbed(mocks=mocks, real=real, gateways=started, session=session)
        for gateway in started:
            await testbed.wait_until_serving(gateway)
        for mock in mocks:
            await testbed.wait_until_accepting(mock.name)
        if real is not None:
            await testbed.wait_until_accepting(real.name, REAL_START_TIMEOUT_S)
        yield testbed


def _end_real(real: RealEngine) -> None:
    """Ends the agent and all below it, whatever state they are in."""
    below: list[psutil.Process] = []
    with contextlib.suppress(DidNotStart, psutil.NoSuchProcess):
        below = real.launched.find_program().children(recursive=True)
    real.launched.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=10)

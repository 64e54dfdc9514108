"""Carries out the faults of a soak and heals them: those of engines one at a time, and so those of gateways.

The next one begins only when every request that was under way at the end of the last one has ended, and, for a fault of
an engine, when every gateway sends requests to two other mock engines: a request meets one fault of an engine, and
healthy engines are left. An engine that a gateway still ejects after its last fault does not count; the longest
ejection is 30 s. A fault of a gateway begins whatever happens to an engine just then: it costs no request an attempt.
"""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import psutil

from moe_lab.soak.client import PATIENCE_S
from moe_lab.soak.faults import EngineFault, Fault, FaultKind, GatewayFault, RealFault
from moe_lab.soak.observation import accepting_engines, read_state, wait_for
from moe_lab.soak.page import EngineMode
from moe_lab.soak.processes import MockProcess, SoakGateway
from moe_lab.soak.testbed import REAL_START_TIMEOUT_S, SoakTestbed

_POLL_S = 0.05
# Mock engines beside the victim that each gateway uses when a fault begins.
OTHERS = 2


class FaultInjector:
    """Injects faults into a testbed.

    Args:
        testbed: what runs.
        under_way: numbers of the requests that have not ended.
        progress: gets a line for the beginning and the end of each fault.
        turn: held during a fault; injectors whose faults must not overlap share it.
        now: the faults under way, of all injectors of a soak.

    Attributes:
        injected: how often each kind came.
        overlaps: how many faults began during one of another injector.
    """

    def __init__(
        self,
        testbed: SoakTestbed,
        under_way: Callable[[], Collection[int]],
        progress: Callable[[str], None],
        turn: asyncio.Lock,
        now: list[FaultKind],
    ) -> None:
        self._testbed = testbed
        self._turn = turn
        self._under_way = under_way
        self._progress = progress
        self._now = now
        self.injected: Counter[FaultKind] = Counter()
        self.overlaps = 0

    async def run(self, faults: Iterator[Fault], is_due: Callable[[], bool], is_over: Callable[[], bool]) -> None:
        """Injects one fault after the other, each when it is due, until it is over."""
        while not is_over():
            if not is_due():
                await asyncio.sleep(_POLL_S)
                continue
            async with self._turn:
                await self._inject(next(faults))

    async def _inject(self, fault: Fault) -> None:
        await self._strike(fault)
        self.injected[fault.kind] += 1
        self._progress(f"healed: {fault.kind.value}")
        before = set(self._under_way())
        await wait_for(lambda before=before: not before & set(self._under_way()), 2 * PATIENCE_S)  # type: ignore[misc]

    async def _strike(self, fault: Fault) -> None:
        kind = fault.kind
        if isinstance(kind, EngineFault):
            mocks = self._testbed.mocks
            victim = mocks[fault.victim % len(mocks)]
            await self._wait_for_others(victim.name)
            with self._under(kind):
                await self._strike_engine(victim, kind, fault.duration_s)
        elif isinstance(kind, GatewayFault):
            with self._under(kind):
                await self._strike_gateway(_choose_gateway(self._testbed.gateways, fault), kind, fault.duration_s)
        else:
            await self._wait_for_others("")
            with self._under(kind):
                await self._strike_real(kind, fault.duration_s)

    @contextlib.contextmanager
    def _under(self, kind: FaultKind) -> Iterator[None]:
        """Counts the fault among those under way."""
        self.overlaps += bool(self._now)
        self._now.append(kind)
        try:
            yield
        finally:
            self._now.remove(kind)

    async def _wait_for_others(self, victim: str) -> None:
        names = {mock.name for mock in self._testbed.mocks} - {victim}
        while True:
            states = [await read_state(self._testbed.session, gateway) for gateway in self._testbed.gateways]
            if all(state is not None and len(accepting_engines(state) & names) >= OTHERS for state in states):
                return
            await asyncio.sleep(_POLL_S)

    async def _strike_engine(self, victim: MockProcess, kind: EngineFault, duration_s: float) -> None:
        self._progress(f"{victim.name}: {kind.value}, {duration_s:.1f} s")
        mode = kind.mode
        if mode is not None:
            victim.page.mode = mode
            await asyncio.sleep(duration_s)
            victim.page.mode = EngineMode.NORMAL
        elif kind is EngineFault.KILL:
            victim.launched.kill()
            await asyncio.sleep(duration_s)
            victim.launched.start()
        else:
            victim.launched.send(signal.SIGSTOP)
            await asyncio.sleep(duration_s)
            victim.launched.send(signal.SIGCONT)

    async def _strike_gateway(self, victim: SoakGateway, kind: GatewayFault, duration_s: float) -> None:
        launched = victim.launched
        self._progress(f"{victim.name}: {kind.value}, {duration_s:.1f} s")
        match kind:
            case GatewayFault.KILL:
                victim.note_kill()
                launched.kill()
                await asyncio.sleep(duration_s)
                launched.start()
            case GatewayFault.REPLACE:
                victim.note_end()
                launched.ask_to_end()
                # It ends after its last request, which may wait for a frozen engine.
                await wait_for(lambda: not launched.is_running, PATIENCE_S)
                launched.kill()
                launched.start()
            case GatewayFault.FREEZE | GatewayFault.LONG_FREEZE:
                launched.send(signal.SIGSTOP)
                await asyncio.sleep(duration_s)
                launched.send(signal.SIGCONT)
        await self._testbed.wait_until_serving(victim)

    async def _strike_real(self, kind: RealFault, duration_s: float) -> None:
        real = self._testbed.real
        assert real is not None
        self._progress(f"{kind.value}, {duration_s:.1f} s")
        cores = real.find_cores()
        if kind in (RealFault.KILL_CORE, RealFault.KILL_SERVER):
            _signal(cores if kind is RealFault.KILL_CORE else real.find_servers(), signal.SIGKILL)
            # Until then the gateways may not have noticed.
            await wait_for(lambda: bool(set(real.find_cores()) - set(cores)), REAL_START_TIMEOUT_S)
        else:
            _signal(cores, signal.SIGSTOP)
            await asyncio.sleep(duration_s)
            _signal(cores, signal.SIGCONT)
        await self._testbed.wait_until_accepting(real.name, REAL_START_TIMEOUT_S)


def _choose_gateway(gateways: Sequence[SoakGateway], fault: Fault) -> SoakGateway:
    """Which gateway a fault hits: a steady one is suspended at most."""
    suspends = fault.kind in (GatewayFault.FREEZE, GatewayFault.LONG_FREEZE)
    able = [gateway for gateway in gateways if suspends or not gateway.is_steady]
    return able[fault.victim % len(able)]


def _signal(processes: Collection[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)

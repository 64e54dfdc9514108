"""The soak itself: clients that ask without end while faults come, then the reckoning."""

import asyncio
import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moe_lab.soak.client import SoakConnection, connect
from moe_lab.soak.deliveries import KEPT, Deliveries, EngineRecords, Received, SoakOutcome, judge
from moe_lab.soak.faults import EngineFault, FaultKind, GatewayFault, RealFault, plan_faults
from moe_lab.soak.injection import FaultInjector
from moe_lab.soak.observation import GatewayReport, observe_end, wait_for
from moe_lab.soak.official_clients import OfficialClients
from moe_lab.soak.processes import DidNotStart, SoakGateway
from moe_lab.soak.testbed import SoakTestbed, running
from moe_lab.soak.traffic import SMALL, Leaving, SoakRequest, plan_request

# Of the requests, those that the official clients send, which take ten times the processor time of the others.
OFFICIAL_EVERY = 50
# Of those of the mock engines, since a real engine takes a minute to start again.
REAL_FAULT_PERIODS = 20
PROGRESS_S = 10.0
# The start of a gateway's memory is after these, and after a tenth of all requests.
WARM_UP_REQUESTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakSettings:
    """What a soak does.

    Attributes:
        requests: least number of requests; more come until each kind of fault has come once.
        minutes: no request is sent after that time, and no fault comes; None: no limit.
        seed: requests and faults follow from it.
        connections: requests at a time.
        gateways: two at least.
        fault_every: requests between two faults of an engine, and between two of a gateway.
        model: folder of the tiny model for a real engine; None: mock engines alone.
        has_long_faults: whether some faults last until an engine is taken for stalled.
    """

    requests: int
    minutes: float | None = None
    seed: int = 0
    connections: int = 48
    gateways: int = 2
    fault_every: int = 500
    model: Path | None = None
    has_long_faults: bool = True


@dataclass(slots=True, kw_only=True)
class SoakResult:
    """What a soak found.

    Attributes:
        settings: what it did.
        deliveries: outcomes of all requests.
        records: what the mock engines were given and computed.
        faults: how often each kind came.
        overlaps: how many of them began during another one.
        gateways: how each stands at the end.
        official: requests of the official clients.
        load_s: seconds in which requests were sent.
        problems: guarantees that were broken, in words; empty when all were kept.
    """

    settings: SoakSettings
    deliveries: Deliveries
    records: EngineRecords
    faults: Counter[FaultKind]
    overlaps: int = 0
    gateways: list[GatewayReport] = field(default_factory=list)
    official: int = 0
    load_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Soak:
    """One soak on a testbed that runs."""

    def __init__(self, settings: SoakSettings, testbed: SoakTestbed, progress: Callable[[str], None]) -> None:
        self._settings = settings
        self._testbed = testbed
        self._progress = progress
        self._numbers = itertools.count(1)
        self._started_s = time.monotonic()
        self._under_way: dict[int, SoakRequest] = {}
        self._deliveries = Deliveries()
        self._pending: list[tuple[SoakRequest, Received]] = []
        self._official = {gateway.name: OfficialClients(gateway) for gateway in testbed.gateways}
        self._official_count = 0
        self._sent: Counter[str] = Counter()
        self._perhaps_sent: Counter[str] = Counter()
        self._injectors: list[tuple[FaultInjector, list[FaultKind]]] = []

    async def run(self) -> SoakResult:
        """Sends everything, injects everything, and returns the result."""
        testbed = self._testbed
        descriptors = {gateway.name: gateway.count_descriptors() for gateway in testbed.gateways}
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(self._report())
            measuring = group.create_task(self._measure_start())
            work = [group.create_task(self._work(number)) for number in range(self._settings.connections)]
            work += [group.create_task(each) for each in self._inject()]
            await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
            reporting.cancel()
        load_s = time.monotonic() - self._started_s
        for client in self._official.values():
            await client.close()
        reports = [
            await observe_end(testbed.session, gateway, measuring.result()[gateway.name], descriptors[gateway.name])
            for gateway in testbed.gateways
        ]
        return self._conclude(reports, load_s)

    # Requests.

    @property
    def _is_over(self) -> bool:
        return all(self._has_enough(injector, kinds) for injector, kinds in self._injectors)

    def _has_enough(self, injector: FaultInjector, kinds: list[FaultKind]) -> bool:
        """Whether enough requests were sent and each of these faults has come, or the time is up."""
        settings = self._settings
        if settings.minutes is not None and time.monotonic() - self._started_s > settings.minutes * 60.0:
            return True
        return self._deliveries.finished >= settings.requests and set(kinds) <= set(injector.injected)

    async def _work(self, worker: int) -> None:
        connection: SoakConnection | None = None
        while not self._is_over:
            request = plan_request(self._settings.seed, next(self._numbers))
            self._under_way[request.number] = request
            try:
                if is_official(request):
                    received = await self._ask_officially(request, worker)
                else:
                    connection, received = await self._ask(request, worker, connection)
            finally:
                del self._under_way[request.number]
            self._take(request, received)
        if connection is not None:
            connection.close()

    async def _ask(
        self, request: SoakRequest, worker: int, connection: SoakConnection | None
    ) -> tuple[SoakConnection, Received]:
        gateways = tuple(self._testbed.gateways)
        while True:
            if connection is None or not connection.is_open:
                connection = await connect(gateways, worker)
            received = await connection.ask(request)
            if not connection.is_unread or self._read_records().given(request.number):
                self._count_sent(connection.gateway.port, request)
                return connection, received

    async def _ask_officially(self, request: SoakRequest, worker: int) -> Received:
        gateways = self._testbed.gateways
        for turn in itertools.count(worker):
            gateway = gateways[turn % len(gateways)]
            received = await self._official[gateway.name].ask(request)
            if received is not None:
                self._official_count += 1
                self._count_sent(gateway.port, request)
                return received
            await asyncio.sleep(0.05)
        raise AssertionError

    def _count_sent(self, port: int, request: SoakRequest) -> None:
        """A request whose client leaves at once may or may not have reached the gateway."""
        (gateway,) = [each for each in self._testbed.gateways if each.port == port]
        is_sure = request.leaving in (Leaving.STAYS, Leaving.IN_ANSWER)
        (self._sent if is_sure else self._perhaps_sent)[gateway.name] += 1

    def _take(self, request: SoakRequest, received: Received) -> None:
        """Counts the end of a request; where the number of its attempts matters, the records are read once."""
        outcome = judge(request, received, lambda: self._read_records().given(request.number))
        self._deliveries.add(request, outcome, received.detail)
        if outcome not in KEPT:
            self._progress(f"request {request.number}: {outcome.value}: {received.detail}")

    def _read_records(self) -> EngineRecords:
        records = EngineRecords()
        for mock in self._testbed.mocks:
            records.read(mock.record.read_bytes())
        return records

    # Faults.

    def _inject(self) -> Iterator[Coroutine[Any, Any, None]]:
        testbed, settings = self._testbed, self._settings
        groups: dict[str, tuple[FaultKind, ...]] = {"engines": tuple(EngineFault), "gateways": tuple(GatewayFault)}
        if testbed.real is not None:
            groups["real"] = tuple(RealFault)
        of_engines, of_gateways = asyncio.Lock(), asyncio.Lock()
        now: list[FaultKind] = []
        for purpose, all_kinds in groups.items():
            turn = of_gateways if purpose == "gateways" else of_engines
            kinds = [kind for kind in all_kinds if settings.has_long_faults or not kind.is_long]
            injector = FaultInjector(testbed, lambda: self._under_way, self._progress, turn, now)
            self._injectors.append((injector, kinds))
            faults = plan_faults(settings.seed, kinds, purpose=purpose)
            every = settings.fault_every * (REAL_FAULT_PERIODS if purpose == "real" else 1)
            yield injector.run(faults, self._due(every), partial(self._has_enough, injector, kinds))

    def _due(self, every: int) -> Callable[[], bool]:
        """A function that says whether the next fault is due, by the number of requests that have ended."""
        threshold = every

        def is_due() -> bool:
            nonlocal threshold
            if self._deliveries.finished < threshold:
                return False
            threshold = self._deliveries.finished + every
            return True

        return is_due

    # The reckoning.

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            finished, spent_s = self._deliveries.finished, time.monotonic() - self._started_s
            faults = sum(injector.injected.total() for injector, _ in self._injectors)
            memory = ", ".join(
                f"{gateway.read_memory_bytes() / 2**20:.0f} MiB"
                for gateway in self._testbed.gateways
                if gateway.is_steady
            )
            self._progress(
                f"{finished:,} requests, {finished / spent_s:,.0f}/s, {faults} faults, "
                f"{self._deliveries.broken} broken guarantees, {memory}"
            )

    async def _measure_start(self) -> dict[str, int]:
        """The memory of each gateway after the warm-up; that of one that does not run just then is 0."""
        warm_up = max(WARM_UP_REQUESTS, self._settings.requests // 10)
        least = min(warm_up, self._settings.requests)
        await wait_for(lambda: self._deliveries.finished >= least or self._is_over, math.inf)
        return {gateway.name: _memory_of(gateway) for gateway in self._testbed.gateways}

    def _conclude(self, reports: list[GatewayReport], load_s: float) -> SoakResult:
        records = self._read_records()
        problems = [f"{each.value}: {count}" for each, count in self._broken()]
        problems += [problem for report in reports for problem in report.problems]
        if overwritten := records.overwritten:
            problems.append(f"written to more than two engines: requests {overwritten[:10]}")
        for report in reports:
            least, most = self._sent[report.name], self._sent[report.name] + self._perhaps_sent[report.name]
            if report.is_steady and not least <= report.finished <= most:
                problems.append(f"{report.name} counts {report.finished} requests; {least} to {most} were sent there")
        return SoakResult(
            settings=self._settings,
            deliveries=self._deliveries,
            records=records,
            faults=sum((injector.injected for injector, _ in self._injectors), Counter()),
            overlaps=sum(injector.overlaps for injector, _ in self._injectors),
            gateways=reports,
            official=self._official_count,
            load_s=load_s,
            problems=problems,
        )

    def _broken(self) -> Iterator[tuple[SoakOutcome, int]]:
        for outcome, count in self._deliveries.outcomes.items():
            if outcome not in KEPT:
                yield outcome, count


def is_official(request: SoakRequest) -> bool:
    """Whether an official client sends it."""
    return request.number % OFFICIAL_EVERY == 0 and request.leaving is Leaving.STAYS and request.text_bytes == SMALL


def _memory_of(gateway: SoakGateway) -> int:
    with contextlib.suppress(DidNotStart):
        return gateway.read_memory_bytes()
    return 0


async def run_soak(settings: SoakSettings, folder: Path, progress: Callable[[str], None]) -> SoakResult:
    """Starts everything, soaks, and ends everything.

    Args:
        settings: what to do.
        folder: for configurations, logs and records.
        progress: gets a line now and then.

    Raises:
        DidNotStart: a process does not serve.
    """
    async with running(folder, gateways=settings.gateways, model=settings.model) as testbed:
        progress("engines and gateways are up")
        return await Soak(settings, testbed, progress).run()

"""The run: tokens from a plain engine, then clients that ask without pause while engines fail, then the reckoning."""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from moe_lab.soak.observation import find_exceptions, is_at_rest, wait_for
from moe_lab.soak.traffic import Leaving
from moe_lab.split_requests.engine_figures import EngineFigures, wait_until_free
from moe_lab.split_requests.faults import SplitFault, name_idle_faults, plan_faults
from moe_lab.split_requests.injection import SplitInjector
from moe_lab.split_requests.judgement import Outcomes, SplitAnswer, SplitOutcome
from moe_lab.split_requests.owed import find_owed
from moe_lab.split_requests.testbed import SplitTestbed, running
from moe_lab.split_requests.traffic import SplitRequest, plan_request

EACH_ROLE = 2
# Far beyond any wait that the gateway allows itself.
PATIENCE_S = 300.0
# After the last answer: a lease ends, and a little more.
FREE_WITHIN_S = 60.0
# Some requests go whole: those that a decode engine has the blocks of, and those whose pair failed.
MOST_REQUESTS = 1.25
PROGRESS_S = 30.0
_LEAVES_AFTER_BYTES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSettings:
    """What a run does.

    Attributes:
        transfers: answers that have to come from an engine that had not computed their prompt.
        seed: requests and faults follow from it.
        in_flight: requests at a time.
        rounds: how often each kind of fault comes.
    """

    transfers: int
    seed: int = 0
    in_flight: int = 6
    rounds: int = 1

    @property
    def most_requests(self) -> int:
        """Number of requests after which the run ends in any case."""
        return max(self.in_flight, round(self.transfers * MOST_REQUESTS))


@dataclass(slots=True, kw_only=True)
class SplitResult:
    """What a run found.

    Attributes:
        settings: what it did.
        outcomes: outcomes of all requests.
        faults: how often each kind came.
        transfers: answers that came from an engine that had not computed their prompt.
        fall_backs: pairs that were left for one engine, by reason.
        spoilt: answers whose blocks were made to belong to nobody.
        held: answers that were held back for longer than a lease.
        engines: how each stands at the end.
        load_s: seconds in which requests were sent.
        problems: guarantees that were broken, in words.
    """

    settings: SplitSettings
    outcomes: Outcomes
    faults: Counter[SplitFault]
    transfers: int
    fall_backs: dict[str, int]
    spoilt: int
    held: int
    engines: list[EngineFigures]
    load_s: float
    problems: list[str]


async def run_split(settings: SplitSettings, model: Path, folder: Path, say: Callable[[str], None]) -> SplitResult:
    """Everything, in order.

    Args:
        settings: what to do.
        model: folder of the tiny model.
        folder: for configurations, logs and the owed tokens.
        say: gets a line for each step.

    Raises:
        DidNotStart: a process does not serve.
    """
    requests = [plan_request(settings.seed, number) for number in range(settings.most_requests)]
    kept = folder / f"owed-{settings.seed}.json"
    owed = await find_owed(requests, model, folder, kept, say)
    say(f"starting {EACH_ROLE} engines for prompts and {EACH_ROLE} that decode; logs are in {folder}")
    async with running(model, folder, prefill=EACH_ROLE, decode=EACH_ROLE) as testbed:
        say("all engines take requests")
        return await _SplitRun(settings, testbed, requests, owed, say).run()


class _SplitRun:
    def __init__(
        self,
        settings: SplitSettings,
        testbed: SplitTestbed,
        requests: Sequence[SplitRequest],
        owed: dict[int, str],
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._testbed, self._owed, self._say = settings, testbed, owed, say
        self._left = iter(requests)
        self._outcomes = Outcomes()
        self._injector = SplitInjector(testbed, say)
        self._transfers = self._faults = 0
        self._are_faults_over = self._are_requests_over = False

    async def run(self) -> SplitResult:
        """Sends all requests, injects all faults, and returns the result."""
        settings, began_s = self._settings, time.monotonic()
        faults = plan_faults(settings.seed, settings.transfers, settings.rounds, EACH_ROLE)
        self._faults = len(faults)
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            clients = [group.create_task(self._work(session)) for _ in range(settings.in_flight)]
            await self._injector.run(faults, lambda: self._outcomes.finished, lambda: self._are_requests_over)
            self._are_faults_over = True
            await asyncio.wait(clients)
            load_s = time.monotonic() - began_s
            watching.cancel()
        self._say("all requests have ended; waiting until all blocks are free")
        return await self._conclude(load_s)

    async def _watch(self) -> None:
        """Counts the transfers and says how far the run is."""
        said_s = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            self._transfers = _read_transfers(await self._testbed.read_gateway()) or self._transfers
            if time.monotonic() - said_s > PROGRESS_S:
                said_s = time.monotonic()
                self._say(f"{self._outcomes.finished} requests, {self._transfers} with transfers")

    # Requests.

    async def _work(self, session: aiohttp.ClientSession) -> None:
        for request in self._left:
            await wait_for(lambda: self._outcomes.finished < self._injector.pause_at, math.inf)
            if self._transfers >= self._settings.transfers and self._are_faults_over:
                break
            received = await ask(session, self._testbed.url, request)
            outcome = self._outcomes.add(request, received, self._owed[request.number])
            if outcome in (SplitOutcome.WRONG, SplitOutcome.LOST):
                self._say(self._outcomes.examples[-1])
        self._are_requests_over = True

    # The end.

    async def _conclude(self, load_s: float) -> SplitResult:
        testbed = self._testbed
        await testbed.wait_until_accepting()
        state = await testbed.read_gateway()
        until_s = time.monotonic() + FREE_WITHIN_S
        while not is_at_rest(state) and time.monotonic() < until_s:
            await asyncio.sleep(1.0)
            state = await testbed.read_gateway()
        engines = [await wait_until_free(testbed.session, engine, FREE_WITHIN_S) for engine in testbed.engines]
        splits = (state or {}).get("splits") or {}
        transfers = int(splits.get("transfers", 0))
        problems = [*self._outcomes.problems, *(_held(engine) for engine in engines if engine.kv_usage)]
        if not is_at_rest(state):
            problems.append("the gateway counts requests in flight after the end of all")
        if transfers < self._settings.transfers:
            problems.append(f"only {transfers} answers came with transfers, of {self._settings.transfers}")
        if missing := self._faults - self._injector.injected.total():
            problems.append(f"{missing} faults did not come")
        interceptor = testbed.interceptor
        problems += name_idle_faults(self._injector.injected, spoilt=interceptor.spoilt, held=interceptor.held)
        log = testbed.gateway.log.read_text(errors="replace")
        return SplitResult(
            settings=self._settings,
            outcomes=self._outcomes,
            faults=self._injector.injected,
            transfers=transfers,
            fall_backs=dict(splits.get("fall_backs", {})),
            spoilt=interceptor.spoilt,
            held=interceptor.held,
            engines=engines,
            load_s=load_s,
            problems=[*problems, *(f"exception in the gateway's log: {line}" for line in find_exceptions(log))],
        )


def _read_transfers(state: Any | None) -> int:
    return int(((state or {}).get("splits") or {}).get("transfers", 0))


def _held(engine: EngineFigures) -> str:
    return f"{engine.name}: {engine.kv_usage:.2%} of its blocks are still held"


async def ask(session: aiohttp.ClientSession, url: str, request: SplitRequest) -> SplitAnswer:
    """Sends a request; returns what came until its end, until the client left, or until its patience ended."""
    if request.leaving is Leaving.BEFORE_ANSWER:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(_ask(session, url, request), request.stay_s)
        return SplitAnswer(has_left=True)
    return await _ask(session, url, request)


async def _ask(session: aiohttp.ClientSession, url: str, request: SplitRequest) -> SplitAnswer:
    status, body, is_complete, has_left = 0, bytearray(), False, False
    sent_s, ttft_s = time.monotonic(), None
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
        async with session.post(url + request.api.value, json=request.body) as answer:
            status = answer.status
            async for data in answer.content.iter_any():
                ttft_s = ttft_s or time.monotonic() - sent_s
                body += data
                if request.leaving is Leaving.IN_ANSWER and len(body) > _LEAVES_AFTER_BYTES:
                    answer.close()
                    has_left = True
                    break
            is_complete = not has_left
    return SplitAnswer(status=status, body=bytes(body), is_complete=is_complete, has_left=has_left, ttft_s=ttft_s)

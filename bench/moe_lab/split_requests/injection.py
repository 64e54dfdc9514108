"""Carries out the faults of a run, one at a time, and waits until all engines take requests again."""

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import psutil

from moe_lab.soak.observation import wait_for
from moe_lab.split_requests.faults import PlannedFault, SplitFault
from moe_lab.split_requests.testbed import START_TIMEOUT_S, SplitEngine, SplitTestbed

FROZEN_S = 8.0
SPOILT_S = 15.0
# Longer than the lease of the engines, 30 s.
HELD_S = 33.0
HELD_ANSWERS = 2
DOWN_S = 3.0


class SplitInjector:
    """Injects planned faults.

    Args:
        testbed: what runs.
        say: gets a line for each fault.

    Attributes:
        injected: how often each kind came.
        pause_at: requests that may end before the fault of the moment is over; the next one is due then.
    """

    def __init__(self, testbed: SplitTestbed, say: Callable[[str], None]) -> None:
        self._testbed = testbed
        self._say = say
        self.injected: Counter[SplitFault] = Counter()
        self.pause_at = math.inf

    async def run(self, faults: Sequence[PlannedFault], ended: Callable[[], int], is_over: Callable[[], bool]) -> None:
        """Injects each fault when the number of requests that have ended calls for it, until it is over."""
        for fault, following in zip(faults, [*faults[1:], None], strict=True):
            await wait_for(lambda due=fault.after: ended() >= due or is_over(), math.inf)  # type: ignore[misc]
            if ended() < fault.after:
                return
            self.pause_at = math.inf if following is None else following.after
            await self._strike(fault)
            self.injected[fault.kind] += 1
            self.pause_at = math.inf

    async def _strike(self, fault: PlannedFault) -> None:
        engines, began_s = self._testbed.of_role(decodes=fault.kind.is_of_decode), time.monotonic()
        victim, interceptor = engines[fault.victim % len(engines)], self._testbed.interceptor
        if not fault.kind.is_of_process:
            # The one behind the interceptor.
            victim = engines[0]
        match fault.kind:
            case SplitFault.PREFILL_CORE_KILLED | SplitFault.DECODE_CORE_KILLED:
                await self._kill_cores(victim)
            case SplitFault.PREFILL_AGENT_KILLED | SplitFault.DECODE_AGENT_KILLED:
                await asyncio.to_thread(victim.kill)
                await asyncio.sleep(DOWN_S)
                victim.launched.start()
            case SplitFault.PREFILL_FROZEN | SplitFault.DECODE_FROZEN:
                cores = victim.find_cores()
                _signal(cores, signal.SIGSTOP)
                await asyncio.sleep(FROZEN_S)
                _signal(cores, signal.SIGCONT)
            case SplitFault.TRANSFERS_FAIL:
                interceptor.spoils = True
                await asyncio.sleep(SPOILT_S)
                interceptor.spoils = False
            case SplitFault.LEASES_END:
                interceptor.hold(HELD_ANSWERS)
                await asyncio.sleep(HELD_S)
                interceptor.let_go()
        # The gateway may not have noticed yet.
        await asyncio.sleep(1.0)
        await self._testbed.wait_until_accepting()
        self._say(f"{victim.name}: {fault.kind.value}; all well after {time.monotonic() - began_s:.0f} s")

    async def _kill_cores(self, victim: SplitEngine) -> None:
        cores = victim.find_cores()
        _signal(cores, signal.SIGKILL)
        await wait_for(lambda: bool(set(victim.find_cores()) - set(cores)), START_TIMEOUT_S)


def _signal(processes: Collection[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)

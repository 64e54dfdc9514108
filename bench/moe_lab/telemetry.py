"""What the telemetry costs an engine at each step: the goal is less than 20 microseconds, gathering included.

Run by `python -m moe_lab`. The scheduler is vLLM's with our class; 1, 64 or 256 requests decode in it. Its bell
rings, and nobody listens: steps here follow one another at once, and an agent listens to one ring in 10 ms. What a ring
costs that wakes somebody is a row of its own.
"""

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from moe_agent.shared_memory.notifier import Bell, BellRope
from moe_agent.shared_memory.records import Control, ControlPageWriter, RankPageReader
from moe_agent.step_time import StepTimeFit
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_scheduling.request.order import RequestSettings
from moe_tools.virtual_engine import EngineShape, VirtualEngine, VirtualEngines

from moe_lab.rows import Row

_REPETITIONS = 40
_CALLS = 500
_GOAL = "< 20"
_PACED_RINGS = 300
_PACE_S = 0.012
_START_TIMEOUT_S = 60.0


def run() -> Iterator[Row]:
    """Cost of each part, in microseconds of processor time: what else runs on the machine does not count."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        os.environ[RUN_DIR_VARIABLE] = folder
        try:
            with ControlPageWriter(run_dir, Control(version=1, request=RequestSettings())), Bell(run_dir):
                yield from _measure(run_dir)
        finally:
            del os.environ[RUN_DIR_VARIABLE]


def _measure(run_dir: Path) -> Iterator[Row]:
    yield _row("fit of the step time, one step", _observe_steps())
    engines = VirtualEngines(run_dir)
    for running in (1, 64, 256):
        engine = _decoding(engines, running)
        yield _row(f"all that a step adds, {running} running", _account(engine), goal=_GOAL)
        engine.scheduler.shutdown()
    with RankPageReader(run_dir, 0) as page:
        yield _row("the agent reads a page", page.read)
    yield Row(benchmark="telemetry", case="a ring that wakes the agent", unit="us", values=_ring_paced())


def _decoding(engines: VirtualEngines, running: int) -> VirtualEngine:
    """An engine in which `running` requests decode."""
    engine = engines.make(EngineShape(seats=running, step_tokens=8192, kv_blocks=8192))
    for index in range(running):
        engine.add(f"r{index}", 20, out=200)
    for _ in range(3):
        engine.step()
    return engine


def _account(engine: VirtualEngine) -> Callable[[], None]:
    """One step's worth of what our scheduler does and vLLM's own does not."""
    scheduler: Any = engine.scheduler
    output = scheduler.schedule()
    scheduler.end_step(output, engine.now_s)

    def account() -> None:
        scheduler.take_settings()
        scheduler.begin_step(output, scheduler.prefilling(), engine.now_s)
        engine.now_s += 0.01
        scheduler.end_step(output, engine.now_s)

    return account


def _ring_paced() -> list[float]:
    """Rings so far apart that another process waits for each."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        listens = context.Event()
        listener = context.Process(target=_listen, args=(Path(folder), listens), daemon=True)
        listener.start()
        try:
            if not listens.wait(_START_TIMEOUT_S):
                raise RuntimeError("the process that is to hear the bell does not start")
            rope = BellRope(Path(folder))
            values = []
            for _ in range(_PACED_RINGS):
                # Awake, as an engine's core is.
                until_s = time.monotonic() + _PACE_S
                while time.monotonic() < until_s:
                    pass
                begun_s = time.thread_time()
                rope.ring()
                values.append((time.thread_time() - begun_s) * 1e6)
            return values
        finally:
            listener.kill()
            listener.join()


def _listen(run_dir: Path, listens: Event) -> None:
    async def listen() -> None:
        with Bell(run_dir) as bell:
            listens.set()
            while True:
                await bell.wait(_START_TIMEOUT_S)
                bell.hush()

    asyncio.run(listen())


def _observe_steps() -> Callable[[], None]:
    fit = StepTimeFit()
    counter = iter(range(1_000_000_000))

    def observe() -> None:
        step = next(counter)
        fit.observe(prefill_tokens=step % 7 * 100, decoding_requests=step % 64, step_s=0.01 + step % 13 * 0.001)

    return observe


def _row(case: str, call: Callable[[], object], goal: str = "") -> Row:
    values = []
    for _ in range(_REPETITIONS):
        begun_s = time.thread_time()
        for _ in range(_CALLS):
            call()
        values.append((time.thread_time() - begun_s) / _CALLS * 1e6)
    return Row(benchmark="telemetry", case=case, unit="us", values=values, goal=goal)

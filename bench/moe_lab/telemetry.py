"""Cost of the telemetry for an engine at each step; the goal is at most 10 microseconds, gathering included.

Run by `python -m moe_lab`. The scheduler is vLLM's with our class; 1, 64 or 256 requests decode in it, in steps of
10 ms of virtual time. The rank's record is written every 50 ms, so at every fifth step; a step that writes it is a row
of its own. One look of the agent at the record is measured while it is awake; waking up costs more (docs/adr/0022).
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_agent.shared_memory.control_record import Control, ControlRecordWriter
from moe_agent.shared_memory.rank_record import RankRecordReader
from moe_agent.step_time import StepTimeFit
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_scheduling.request.order import RequestSettings
from moe_tools.virtual_engine import EngineShape, VirtualEngine, VirtualEngineFactory

from moe_lab.rows import BenchmarkRow

RUNNING = (1, 64, 256)
_REPETITIONS = 40
_CALLS = 500
_STEP_S = 0.01
_GOAL = "<= 10"


def run() -> Iterator[BenchmarkRow]:
    """Cost of each part, in microseconds of processor time: other load on the machine does not count."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        os.environ[RUN_DIR_VARIABLE] = folder
        try:
            with ControlRecordWriter(run_dir, Control(version=1, request=RequestSettings())):
                yield from _measure(run_dir)
        finally:
            del os.environ[RUN_DIR_VARIABLE]


def _measure(run_dir: Path) -> Iterator[BenchmarkRow]:
    yield _row("fit of the step time, one step", _observe_steps())
    engines = VirtualEngineFactory(run_dir)
    for running in RUNNING:
        engine = decode(engines, running)
        run_step = make_step(engine)
        yield _row(f"all that a step adds, {running} running", run_step, goal=_GOAL)
        engine.scheduler.publish_interval_s = 0.0
        yield _row(f"the same, of a step that publishes, {running} running", run_step)
        engine.scheduler.shutdown()
    with RankRecordReader(run_dir, 0) as record:
        yield _row("the agent reads a record", record.read)


def decode(engines: VirtualEngineFactory, running: int) -> VirtualEngine:
    """An engine in which `running` requests decode."""
    engine = engines.make(EngineShape(max_num_seqs=running, step_tokens=8192, kv_blocks=8192))
    for index in range(running):
        engine.add(f"r{index}", 20, out=200)
    for _ in range(3):
        engine.step()
    return engine


def make_step(engine: VirtualEngine) -> Callable[[], None]:
    """The work that our scheduler does at a step and vLLM's own does not."""
    scheduler: Any = engine.scheduler
    output = scheduler.schedule()
    scheduler.end_step(output, engine.now_s)

    def run_step() -> None:
        scheduler.take_settings()
        scheduler.begin_step(output, scheduler.prefilling(), engine.now_s)
        engine.now_s += _STEP_S
        scheduler.end_step(output, engine.now_s)

    return run_step


def _observe_steps() -> Callable[[], None]:
    fit = StepTimeFit()
    counter = iter(range(1_000_000_000))

    def observe() -> None:
        step = next(counter)
        fit.observe(prefill_tokens=step % 7 * 100, decoding_requests=step % 64, step_s=0.01 + step % 13 * 0.001)

    return observe


def _row(case: str, call: Callable[[], object], goal: str = "") -> BenchmarkRow:
    values = []
    for _ in range(_REPETITIONS):
        begun_s = time.thread_time()
        for _ in range(_CALLS):
            call()
        values.append((time.thread_time() - begun_s) / _CALLS * 1e6)
    return BenchmarkRow(benchmark="telemetry", case=case, unit="us", values=values, goal=goal)

"""The simulator against the real engine: the same requests at the same times under three orders, TTFT side by side.

Part of `moeserving calibrate --validate`: the engine that is calibrated serves open loops, the simulator serves the
same with the fitted cost. The orders take turns, and so do fitting and comparing, several times, so that what else the
machine does meets all alike; the middle pass of each counts.
They agree when each mean TTFT is within `TOLERANCE` and the orders rank alike, orders that the engine itself cannot
tell apart left out.
"""

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from rich.table import Table

from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, Senders, arrange
from moe_tools.simulator.costs import CostModel
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.saturation import find_saturation
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate
from moe_tools.traces import TraceRequest

TOLERANCE = 0.15
LOADS = (0.5, 0.7, 0.9)
# Of the open loops that are fitted on; other requests than those that are compared.
FITTED_LOADS = (0.5, 0.8, 1.0)
FITTED_REQUESTS = 60
ORDERS = (RequestPolicy.FCFS, RequestPolicy.PRIORITY, RequestPolicy.SJF)
_GUESS = 4.0
# Versions of the control record; the first is written at its creation.
_FIRST_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Mean TTFT under one order at one load, seconds.

    Attributes:
        order: of the queue.
        load: part of the rate at which the simulator's mean TTFT under `fcfs` is five times that of an idle engine.
        passes_s: the engine's, of each pass.
        simulated_s: the simulator's.
    """

    order: RequestPolicy
    load: float
    passes_s: tuple[float, ...]
    simulated_s: float

    @property
    def real_s(self) -> float:
        """The engine's: the middle pass, so that one which the machine's other work held up counts no more than one."""
        return statistics.median(self.passes_s)

    @property
    def holds(self) -> bool:
        """Whether the two are near enough."""
        return abs(self.simulated_s / self.real_s - 1.0) <= TOLERANCE


class Course:
    """One engine's way through open loops: those that are fitted on and those that are compared take turns.

    Args:
        llm: the engine, in this process.
        control: writer of its control record.
        seed: of the requests.
    """

    def __init__(self, llm: Any, control: Any, seed: int) -> None:
        self._llm, self._control, self._seed = llm, control, seed
        self._versions = itertools.count(_FIRST_VERSION)
        self._turns = 0
        self._base: Simulation | None = None
        self._traces: dict[float, Sequence[TraceRequest]] = {}
        self._passes: dict[tuple[float, RequestPolicy], list[float]] = {}

    def serve_open(self, cost: CostModel) -> None:
        """Lets the engine serve open loops, so that its steps are fitted on what they carry in one.

        Args:
            cost: fitted so far; tells what load is high.
        """
        self._turns += 1
        seed = self._seed + self._turns
        base = _simulation(cost, self._llm, FITTED_REQUESTS, seed)
        saturation = _saturation(base, seed)
        for load in FITTED_LOADS:
            self._serve(RequestPolicy.SJF, arrange(base.trace, ArrivalShape.POISSON, load * saturation, seed))

    def plan(self, cost: CostModel, count: int) -> None:
        """Draws the requests to compare with: `count` of them at each load, the same in all turns."""
        self._base = base = _simulation(cost, self._llm, count, self._seed)
        saturation = _saturation(base, self._seed)
        for load in LOADS:
            self._traces[load] = arrange(base.trace, ArrivalShape.POISSON, load * saturation, self._seed)

    def compare(self) -> None:
        """Serves them once under each order, at each load."""
        for load, trace in self._traces.items():
            for order in ORDERS:
                self._passes.setdefault((load, order), []).append(_mean(self._serve(order, trace)))

    def conclude(self, cost: CostModel) -> tuple[Agreement, ...]:
        """Serves them in the simulator, with the cost that was fitted in all turns."""
        assert self._base is not None, "plan() comes first"
        rows = []
        for (load, order), passes_s in self._passes.items():
            request = _request(order)
            simulated_s = _simulated_s(replace(self._base, trace=self._traces[load], cost=cost, request=request))
            rows.append(Agreement(order=order, load=load, passes_s=tuple(passes_s), simulated_s=simulated_s))
        return tuple(rows)

    def _serve(self, order: RequestPolicy, trace: Sequence[TraceRequest]) -> list[float]:
        return serve(self._llm, self._control, order, trace, next(self._versions))


def _request(order: RequestPolicy) -> RequestSettings:
    """An engine in this process takes nothing in while it waits, so it is of no use to schedule late."""
    return RequestSettings(policy=order, defer_scheduling=False)


def _saturation(base: Simulation, seed: int) -> float:
    maker = load_vllm()

    def slowdown(rate: float) -> float:
        trace = arrange(base.trace, ArrivalShape.POISSON, rate, seed)
        figures = simulate(replace(base, trace=trace, request=_request(RequestPolicy.FCFS)), maker).figures
        return figures.ttft_mean / figures.ttft_floor

    return find_saturation(slowdown, _GUESS)


def read_limits(llm: Any) -> EngineLimits:
    """Returns the limits of a running engine: batch, step tokens, KV blocks of 16 tokens, model length."""
    config = llm.llm_engine.vllm_config
    scheduler, cache = config.scheduler_config, config.cache_config
    return EngineLimits(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kv_blocks=cache.num_gpu_blocks * cache.block_size // 16,
        max_model_len=config.model_config.max_model_len,
    )


def _simulation(cost: CostModel, llm: Any, count: int, seed: int) -> Simulation:
    limits = read_limits(llm)
    shape = ShapeSettings(
        count=count, seed=seed, longest_tokens=limits.max_model_len * 3 // 4, median_output_tokens=16,
        longest_output_tokens=limits.max_model_len // 8,
    )  # fmt: skip
    return Simulation(
        trace=build_shape(Shape.TWO_END, shape),
        cost=cost,
        limits=limits,
        dispatch=EngineSettings(policy=DispatchPolicy.ROUND_ROBIN),
        senders=Senders(by_length=True),
        async_scheduling=llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
    )


def _simulated_s(simulation: Simulation) -> float:
    outcome = simulate(simulation, load_vllm())
    return _mean([row.first_token_s - row.arrival_s for row in outcome.requests if row.first_token_s is not None])


def serve(llm: Any, control: Any, order: RequestPolicy, trace: Sequence[TraceRequest], version: int) -> list[float]:
    """Times to first token on the engine; the priority of a request is its prompt's length, as in the simulator."""
    from moe_agent.shared_memory.control_record import Control

    control.write(Control(version=version, request=_request(order)))
    engine = llm.llm_engine
    draw = random.Random(version)
    vocabulary = engine.model_config.get_vocab_size()
    # Drawn before: a client's work is not the engine's.
    prompts = [[draw.randrange(vocabulary) for _ in range(row.prompt_tokens)] for row in trace]
    first_s: dict[int, float] = {}
    coming = 0
    began_s = time.perf_counter()
    while coming < len(trace) or engine.has_unfinished_requests():
        now_s = time.perf_counter() - began_s
        while coming < len(trace) and trace[coming].arrival_s <= now_s:
            _add(engine, f"{version}-{coming}", trace[coming], prompts[coming])
            coming += 1
        if not engine.has_unfinished_requests():
            time.sleep(trace[coming].arrival_s - now_s)
            continue
        for output in engine.step():
            index = int(output.request_id.split("-")[1])
            if output.outputs[0].token_ids:
                first_s.setdefault(index, time.perf_counter() - began_s - trace[index].arrival_s)
    return list(first_s.values())


def _add(engine: Any, name: str, row: TraceRequest, prompt: list[int]) -> None:
    from vllm import SamplingParams

    engine.add_request(
        name,
        {"prompt_token_ids": prompt},
        SamplingParams(max_tokens=row.output_tokens, ignore_eos=True, temperature=0.0),
        priority=row.prompt_tokens,
    )


def agrees(rows: Sequence[Agreement]) -> bool:
    """Whether all hold, and the orders rank alike where the engine itself tells them apart."""
    pairs = [(one, other) for one, other in itertools.combinations(rows, 2) if one.load == other.load]
    return all(row.holds for row in rows) and all(_rank_alike(one, other) for one, other in pairs)


def _rank_alike(one: Agreement, other: Agreement) -> bool:
    """Passes of one turn are compared: another turn may have met another speed of the machine."""
    ratio = statistics.median(mine / theirs for mine, theirs in zip(one.passes_s, other.passes_s, strict=True))
    return abs(ratio - 1.0) <= TOLERANCE or (ratio < 1.0) == (one.simulated_s < other.simulated_s)


def render_agreement(rows: Sequence[Agreement]) -> Table:
    """Returns a table of mean TTFT on the real engine beside that of the simulator."""
    table = Table(title="Mean TTFT", title_justify="left")
    for name in ("load", "order", "real engine", "its passes", "simulator", "ratio", ""):
        table.add_column(name, justify="left" if name in ("order", "") else "right")
    for row in rows:
        ratio = row.simulated_s / row.real_s
        passes = " ".join(f"{value * 1000:,.0f}" for value in row.passes_s)
        cells = (f"{row.real_s * 1000:,.0f} ms", passes, f"{row.simulated_s * 1000:,.0f} ms", f"{ratio:.2f}")
        table.add_row(f"{row.load:.0%}", row.order.value, *cells, "" if row.holds else f"not within {TOLERANCE:.0%}")
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

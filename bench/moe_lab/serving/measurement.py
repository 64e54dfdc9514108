"""The order of a measurement: capacities first, then the same pieces of the workload on both sides, in pairs.

Both sides stand all the time and one of them works at a time; the other is suspended. Idle engines and an idle agent
look around several times a second, which took 0.02 (A) and 0.06 (B) cores of the machine that this was written on: on
two cores near their limit that is enough to favour one. What the suspended side takes of the CPU is measured all the
same.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from moe_tools.compare_command import ComparisonEffort, find_capacity
from moe_tools.comparison import (
    PiecePair,
    Plan,
    Policy,
    Sides,
    build_salt,
    compare,
    measure_with,
    plan_pieces,
    probe_capacity,
)
from moe_tools.replay import Load, ReplayResult, replay_closed
from moe_tools.replay_command import Source, prepare_load, read_source
from moe_tools.streaming import ServerAddress
from moe_tools.traces import TraceRequest, speed_up

from moe_lab.serving.knee import find_knee, read_ttft_s
from moe_lab.serving.processes import read_cpu_s, resume, suspend

WARM_UP_S = 8.0
# After a side goes on: its gateway and its health checks find their engines again.
SETTLE_S = 3.0
# Numbers of pairs that no comparison reaches: the prompts of the warm-up and of the search for the knee are their own.
_WARM_UP = 1 << 18
_KNEE = 1 << 17

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side: its policy for the table, its URL, and its processes (roots of their trees)."""

    policy: Policy
    url: str
    processes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUsage:
    """One run: the side that worked, its duration, and the CPU seconds of both sides."""

    label: str
    wall_s: float
    busy_cpu_s: float
    idle_cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingResult:
    """All that was measured.

    Attributes:
        rate: arrivals a second.
        capacities: requests a second of a closed loop, of A and of B; None when the rate was given.
        alone_s: mean TTFT of requests that A serves one at a time; None when no knee was looked for.
    """

    pairs: tuple[PiecePair, ...]
    rate: float
    capacities: tuple[float, float] | None
    work: tuple[CpuUsage, ...]
    alone_s: float | None = None

    @property
    def idle_cores(self) -> float:
        """Cores that the idle side took, on average over all runs."""
        wall_s = sum(row.wall_s for row in self.work)
        return sum(row.idle_cpu_s for row in self.work) / wall_s if wall_s else 0.0


class Turns:
    """The side that works: sends each run to it, and keeps the CPU seconds of both sides."""

    def __init__(self, stock: Side, ours: Side, load: Load) -> None:
        self._sides = {side.policy.label: side for side in (stock, ours)}
        self._load = load
        self._now = stock.policy.label
        self.work: list[CpuUsage] = []

    async def switch(self, policy: Policy) -> None:
        """Resumes this side and suspends the other."""
        self._now = policy.label
        for label, side in self._sides.items():
            if label != self._now:
                suspend(side.processes)
        resume(self._sides[self._now].processes)
        await asyncio.sleep(SETTLE_S)

    def end(self) -> None:
        """Both go on, so that both can be asked to end."""
        for side in self._sides.values():
            resume(side.processes)

    async def measure(self, piece: Sequence[TraceRequest], salt: int) -> ReplayResult:
        """One run on the side whose turn it is."""
        before = {label: read_cpu_s(side.processes) for label, side in self._sides.items()}
        begun_s = time.monotonic()
        run = await measure_with(self.load_of(self._now))(piece, salt)
        took = {label: read_cpu_s(side.processes) - before[label] for label, side in self._sides.items()}
        busy_s = took.pop(self._now)
        self.work.append(
            CpuUsage(
                label=self._now,
                wall_s=time.monotonic() - begun_s,
                busy_cpu_s=busy_s,
                idle_cpu_s=sum(took.values()),
            )
        )
        return run

    def load_of(self, label: str) -> Load:
        """The load, sent to that side."""
        return replace(self._load, endpoint=ServerAddress.parse(self._sides[label].url))


async def measure(
    stock: Side, ours: Side, engine_url: str, source: Source, effort: ComparisonEffort, say: Say
) -> ServingResult:
    """Everything, in order.

    Args:
        stock: A.
        ours: B.
        engine_url: an engine of A, asked for its model and its tokenizer: vllm-router need not offer them.
        source: the requests.
        effort: how much.
        say: gets a line for each step.
    """
    load, served = await prepare_load(engine_url, None, source.seed)
    fitted = read_source(source, served)
    say(f"{source.trace or 'shape ' + source.shape}: {fitted}")
    turns = Turns(stock, ours, load)
    try:
        return await _measure_in_turns(turns, (stock, ours), fitted.requests, source.seed, effort, say)
    finally:
        turns.end()


async def _measure_in_turns(
    turns: Turns,
    sides: tuple[Side, Side],
    requests: tuple[TraceRequest, ...],
    seed: int,
    effort: ComparisonEffort,
    say: Say,
) -> ServingResult:
    await warm_up(turns, sides, requests, seed, say, effort.in_flight)
    capacities = alone_s = None
    if (rate := effort.rate) is None:
        capacities = await find_capacities(turns, sides, requests, effort, say)
        at, of = capacities[0], "capacity"
        if effort.of_knee:
            alone_s, at = await find_stock_knee(turns, sides[0], requests, capacities[0], seed, effort, say)
            of = "knee"
        rate = at * effort.load
        say(f"arrivals at {effort.load:.0%} of stock's {of}: {rate:.2f} requests/s")
    pieces = plan_pieces(requests, pairs=effort.pairs, piece_s=effort.piece_s, rate=rate, seed=seed)
    policies = Sides(stock=sides[0].policy, ours=sides[1].policy)
    pairs = await compare(Plan(pieces=pieces, seed=seed), turns.switch, turns.measure, say, policies)
    # What the search for the knee took is no part of the pairs.
    work = tuple(turns.work[-2 * len(pairs) :])
    return ServingResult(pairs=pairs, rate=rate, capacities=capacities, work=work, alone_s=alone_s)


async def warm_up(
    turns: Turns, sides: Sequence[Side], requests: tuple[TraceRequest, ...], seed: int, say: Say, in_flight: int
) -> None:
    """A short closed loop on each side, which counts nowhere: an engine's first steps are slower than all others."""
    for side in sides:
        say(f"warming up: {side.policy.label}")
        await turns.switch(side.policy)
        load = turns.load_of(side.policy.label).salted(build_salt(seed, _WARM_UP, 0))
        await probe_capacity(requests, load, WARM_UP_S, in_flight)


async def find_capacities(
    turns: Turns, sides: tuple[Side, Side], requests: tuple[TraceRequest, ...], effort: ComparisonEffort, say: Say
) -> tuple[float, float]:
    """Capacities of A and of B, from the same closed loop."""
    found = []
    for side in sides:
        await turns.switch(side.policy)
        found.append(await find_capacity(requests, turns.load_of(side.policy.label), effort))
        say(f"capacity {found[-1]:.2f} requests/s under {side.policy.brief}")
    return found[0], found[1]


async def find_stock_knee(
    turns: Turns,
    stock: Side,
    requests: tuple[TraceRequest, ...],
    capacity: float,
    seed: int,
    effort: ComparisonEffort,
    say: Say,
) -> tuple[float, float]:
    """A's mean TTFT of requests alone, in seconds, and A's knee, in requests a second.

    Raises:
        NoKnee: none is near the capacity, or a request failed.
    """
    await turns.switch(stock.policy)
    (piece,) = plan_pieces(requests, pairs=1, piece_s=effort.piece_s, rate=capacity, seed=seed + 1)
    salts = (build_salt(seed, _KNEE + number, 0) for number in range(_KNEE))
    # One token each: the answer is no part of the TTFT, and takes most of the time.
    short = [replace(request, output_tokens=1) for request in piece]
    alone, _ = await replay_closed(short, turns.load_of(stock.policy.label).salted(next(salts)), 1, inf)
    alone_s = read_ttft_s(alone)
    say(f"requests alone, under {stock.policy.brief}: mean TTFT {alone_s * 1e3:.0f} ms")

    async def slowdown_at(rate: float) -> float:
        slowdown = read_ttft_s(await turns.measure(speed_up(piece, rate / capacity), next(salts))) / alone_s
        say(f"at {rate:.2f} requests/s {slowdown:.1f} times that")
        return slowdown

    knee = await find_knee(slowdown_at, capacity)
    say(f"knee at {knee:.2f} requests/s, {knee / capacity:.0%} of the capacity")
    return alone_s, knee

"""Measures both routers in alternating pairs and renders the table.

A pair is ours and theirs one directly after the other, in an order that turns with each pair, so that a slow drift of
the machine falls on both alike.
"""

import asyncio
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from moe_operator.local.machine import query_gpus
from moe_tools.report import read_environment
from moe_tools.statistics import Estimate, estimate, percentile_of
from rich import box
from rich.table import Table

from moe_lab.gateway.engine import STEP_S
from moe_lab.gateway.load import ask_in_turns, ask_repeatedly, stream_at_once
from moe_lab.gateway.processes import GatewayProcess, GatewayTestbed
from moe_lab.gateway.streams import IDLE_STREAMS, grow_idle, time_events

CONNECTIONS = 32
STREAMS = 64
WARM_UP_S = 0.5


class TooNoisy(RuntimeError):
    """The machine is too busy for a figure that means anything."""


class Measurement(Enum):
    """Title with its unit, whether more is better, and the goal for the ratio."""

    REQUESTS = ("requests / CPU s", True, 2.0)
    LATENCY = ("added p50, us", False, 0.5)
    EVENTS = ("SSE chunks / CPU s", True, 1.5)
    IDLE = ("memory of an idle stream, B", False, 0.5)
    GAPS = ("p99 between events, us", False, 1.0)
    LARGE_GAPS = ("the same beside 8 MiB bodies, us", False, 1.0)

    def __init__(self, title: str, more_is_better: bool, goal: float) -> None:
        self.title = title
        self.more_is_better = more_is_better
        self.goal = goal


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementPair:
    """One value of each, measured side by side."""

    ours: float
    theirs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayComparison:
    """All pairs of one measurement; the ratio is ours to theirs."""

    measurement: Measurement
    pairs: tuple[MeasurementPair, ...]
    ratio: Estimate

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows."""
        if self.ratio.covers(1.0):
            return "no difference shown: the interval covers 1"
        better = (self.ratio.value > 1.0) == self.measurement.more_is_better
        return "ours is better" if better else "vllm-router is better"

    @property
    def reaches_goal(self) -> bool:
        """Whether the ratio itself, not its interval, reaches the goal."""
        more_is_better, goal = self.measurement.more_is_better, self.measurement.goal
        return self.ratio.value >= goal if more_is_better else self.ratio.value <= goal


def estimate_ratio(pairs: Sequence[MeasurementPair]) -> Estimate:
    """The median of the pairs' ratios, ours to theirs, with its 95 % bootstrap interval."""
    found = estimate([math.log(pair.ours / pair.theirs) for pair in pairs], percentile_of(50))
    return Estimate(value=math.exp(found.value), low=math.exp(found.low), high=math.exp(found.high), count=found.count)


def compare(
    testbed: GatewayTestbed, *, pairs: int, seconds: float, progress: Callable[[str], None]
) -> list[GatewayComparison]:
    """Measures everything; one line for each pair to `progress`."""
    return [_compare_one(testbed, measurement, pairs, seconds, progress) for measurement in Measurement]


def _compare_one(
    testbed: GatewayTestbed, measurement: Measurement, pairs: int, seconds: float, progress: Callable[[str], None]
) -> GatewayComparison:
    if measurement is Measurement.IDLE:
        return _compare_idle(testbed, pairs, progress)
    measure_in_turn(measurement, testbed, (testbed.ours, testbed.theirs), WARM_UP_S)
    measured = []
    for number in range(pairs):
        order = (testbed.ours, testbed.theirs) if number % 2 == 0 else (testbed.theirs, testbed.ours)
        values = measure_in_turn(measurement, testbed, order, seconds)
        pair = MeasurementPair(ours=values[testbed.ours.name], theirs=values[testbed.theirs.name])
        progress(f"{measurement.title}, pair {number + 1} of {pairs}: {pair.ours:,.0f} and {pair.theirs:,.0f}")
        measured.append(pair)
    return GatewayComparison(measurement=measurement, pairs=tuple(measured), ratio=estimate_ratio(measured))


def _compare_idle(testbed: GatewayTestbed, pairs: int, progress: Callable[[str], None]) -> GatewayComparison:
    grown = asyncio.run(grow_idle((testbed.ours, testbed.theirs), pairs))
    measured = tuple(
        MeasurementPair(ours=row.bytes_each[testbed.ours.name], theirs=row.bytes_each[testbed.theirs.name])
        for row in grown
    )
    progress(f"{Measurement.IDLE.title}: {len(measured)} times {IDLE_STREAMS} streams at each router")
    return GatewayComparison(measurement=Measurement.IDLE, pairs=measured, ratio=estimate_ratio(measured))


def measure_in_turn(
    measurement: Measurement, testbed: GatewayTestbed, order: Sequence[GatewayProcess], seconds: float
) -> dict[str, float]:
    """Measures routers one after the other; returns the values by their names.

    Raises:
        TooNoisy: a router seems to add nothing to the latency.
    """
    match measurement:
        case Measurement.REQUESTS:
            return {router.name: asyncio.run(_requests_per_cpu_s(router, seconds)) for router in order}
        case Measurement.LATENCY:
            return asyncio.run(_added_p50_us(testbed.direct_port, order, 2 * seconds))
        case Measurement.EVENTS:
            return {router.name: asyncio.run(_events_per_cpu_s(router, seconds)) for router in order}
        case Measurement.GAPS | Measurement.LARGE_GAPS:
            large = measurement is Measurement.LARGE_GAPS
            return {router.name: asyncio.run(_p99_us(router, seconds, large_bodies=large)) for router in order}
        case Measurement.IDLE:
            raise AssertionError(measurement)


async def _p99_us(router: GatewayProcess, seconds: float, *, large_bodies: bool) -> float:
    gaps_s = sorted(await time_events(router.port, seconds=seconds, large_bodies=large_bodies))
    return gaps_s[len(gaps_s) * 99 // 100] * 1e6


async def _requests_per_cpu_s(router: GatewayProcess, seconds: float) -> float:
    before_s = router.cpu_s()
    answers = await ask_repeatedly(router.port, connections=CONNECTIONS, seconds=seconds)
    return answers.count / (router.cpu_s() - before_s)


async def _events_per_cpu_s(router: GatewayProcess, seconds: float) -> float:
    before_s = router.cpu_s()
    events = max(1, round(seconds / STEP_S))
    answers = await stream_at_once(router.port, streams=STREAMS, events=events, seconds=seconds)
    return answers.count / (router.cpu_s() - before_s)


async def _added_p50_us(direct_port: int, order: Sequence[GatewayProcess], seconds: float) -> dict[str, float]:
    """The median through each router less the median straight to an engine, all three asked in turns.

    Raises:
        TooNoisy: a router seems to add nothing.
    """
    direct, *routed = await ask_in_turns([direct_port, *(router.port for router in order)], seconds=seconds)
    added_us = {}
    for router, answers in zip(order, routed, strict=True):
        added_s = statistics.median(answers.took_s) - statistics.median(direct.took_s)
        if added_s <= 0.0:
            raise TooNoisy(f"{router.name} seems to add nothing to the latency: the machine is too busy to measure it")
        added_us[router.name] = added_s * 1e6
    return added_us


def render_comparison(compared: Sequence[GatewayComparison], environment: Mapping[str, Any]) -> Table:
    """One row for each measurement: medians, the ratio with its interval, the goal."""
    table = Table(
        title="The gateway and vllm-router in front of the same two mock engines",
        caption=_caption(compared, environment),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("measured", "ours", "vllm-router", "ratio [95 % interval]", "goal"):
        table.add_column(heading, justify="left" if heading == "measured" else "right", no_wrap=True)
    for row in compared:
        table.add_row(*_cells(row))
    return table


def _caption(compared: Sequence[GatewayComparison], environment: Mapping[str, Any]) -> str:
    pairs = ", ".join(f"{len(row.pairs)}" for row in compared)
    return (
        f"Medians of {pairs} alternating pairs; the ratio is the median of the pairs' ratios, ours to theirs.\n"
        f"Python {environment['python']}, uvloop {environment['packages']['uvloop']}, vllm-router "
        f"{environment['vllm_router']}; {environment['cpu']}, {environment['cores']} cores, both routers on the same "
        f"one.\nOurs in its default configuration, choosing by predictions; vllm-router with policy "
        f"{environment['vllm_router_policy']} and without its log of requests."
    )


def _cells(row: GatewayComparison) -> tuple[str, ...]:
    ratio, measurement = row.ratio, row.measurement
    return (
        measurement.title,
        f"{statistics.median(pair.ours for pair in row.pairs):,.0f}",
        f"{statistics.median(pair.theirs for pair in row.pairs):,.0f}",
        f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"{measurement.goal:g}",
    )


def describe(row: GatewayComparison) -> str:
    """The conclusion of a measurement, in one line."""
    goal = "reached" if row.reaches_goal else "not reached"
    return f"{row.measurement.title}: {row.verdict}; the goal of {row.measurement.goal:g} is {goal}"


def read_machine(vllm_router: str, policy: str) -> dict[str, Any]:
    """Versions, processor, how busy it was before, and how vllm-router was run."""
    return read_environment() | {
        "cpu": _read_cpu(),
        "gpus": query_gpus("name"),
        "load_average": os.getloadavg()[0],
        "vllm_router": vllm_router,
        "vllm_router_policy": policy,
    }


def warn_if_busy(environment: Mapping[str, Any]) -> list[str]:
    """A line when other work competed for the cores, else none."""
    load, cores = environment["load_average"], environment["cores"]
    if load < cores / 2:
        return []
    return [
        f"the machine was busy (load {load:.1f} on {cores} cores): the latencies are mostly waits for a core, and fall "
        "on the router that computes for longer"
    ]


def _read_cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "processor of unknown model"


def build_document(
    compared: Sequence[GatewayComparison], environment: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Everything measured, raw pairs included."""
    return {
        "environment": dict(environment),
        "settings": {"connections": CONNECTIONS, "streams": STREAMS, "step_s": STEP_S, "seconds": seconds},
        "measurements": [
            {
                "name": row.measurement.name.lower(),
                "goal": row.measurement.goal,
                "reaches_goal": row.reaches_goal,
                "pairs": [asdict(pair) for pair in row.pairs],
                "ratio": asdict(row.ratio),
                "says": row.verdict,
            }
            for row in compared
        ],
    }

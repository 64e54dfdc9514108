"""`moeserving compare`: measures the capacity, sets the load, runs the pairs, prints the table."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_tools.comparison import (
    OURS,
    PROBE_CONCURRENCY,
    SIDES,
    PiecePair,
    Plan,
    Sides,
    compare,
    compare_metrics,
    measure_with,
    plan_pieces,
    probe_capacity,
    render_comparison,
)
from moe_tools.deployment import Deployment
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay import Load
from moe_tools.replay_command import Source, check_source, prepare_load, read_source, write_json
from moe_tools.report import build_document, summarise
from moe_tools.server import run_async
from moe_tools.traces import TraceRequest

PROBE_SALT = 0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonEffort:
    """Extent of a measurement. `load` is the rate of arrivals as a share of the capacity; a `rate` needs no probe.

    `of_knee`: the load is a share of the knee instead (`moe_lab.serving`). `in_flight` requests of a closed loop find
    the capacity: too few to fill the engines, and it is too low. No pair but the first begins after `until_s` (of the
    monotonic clock; None: all are measured): the clock decides how many pairs there are, never what they showed.
    """

    pairs: int = 4
    piece_s: float = 15.0
    load: float = 0.9
    rate: float | None = None
    in_flight: int = PROBE_CONCURRENCY
    of_knee: bool = False
    until_s: float | None = None


def run_compare(
    deployment: Deployment,
    url: str,
    model: str | None,
    source: Source,
    effort: ComparisonEffort,
    json_out: Path | None,
    key: str = "",
) -> None:
    """Runs `moeserving compare`. The deployment is left with our policies."""
    say = ProgressPrinter()
    check_source(source)
    pairs, rate = run_async(measure_pairs(deployment, url, model, source, effort, say, key))
    say.console.print(render_comparison(compare_metrics(pairs), pairs))
    if json_out:
        write_json(json_out, build_comparison_document(pairs, source, effort, rate))


async def measure_pairs(
    deployment: Deployment,
    url: str,
    model: str | None,
    source: Source,
    effort: ComparisonEffort,
    say: Say,
    key: str = "",
) -> tuple[tuple[PiecePair, ...], float]:
    """The pairs, and the rate of arrivals that they were served at."""
    load, served = await prepare_load(url, model, source.seed, key)
    fitted = read_source(source, served)
    say(f"{source.name}: {fitted}")
    await deployment.set(OURS.settings)
    rate = effort.rate or await find_rate(fitted.requests, load, effort, say)
    pieces = plan_pieces(fitted.requests, pairs=effort.pairs, piece_s=effort.piece_s, rate=rate, seed=source.seed)

    async def switch(policy: Any) -> None:
        await deployment.set(policy.settings)

    try:
        plan = Plan(pieces=pieces, seed=source.seed, until_s=effort.until_s)
        pairs = await compare(plan, switch, measure_with(load), say)
    finally:
        await asyncio.shield(deployment.set(OURS.settings))
    return pairs, rate


async def find_capacity(requests: tuple[TraceRequest, ...], load: Load, effort: ComparisonEffort) -> float:
    """Requests a second that a closed loop of `effort.in_flight` requests completes."""
    return await probe_capacity(requests, load.salted(PROBE_SALT), effort.piece_s, effort.in_flight)


async def find_rate(requests: tuple[TraceRequest, ...], load: Load, effort: ComparisonEffort, say: Say) -> float:
    """A share of the measured capacity: only where requests wait does their order matter."""
    capacity = await find_capacity(requests, load, effort)
    rate = capacity * effort.load
    say(
        f"capacity {capacity:.2f} requests/s; arrivals at {effort.load:.0%} of that, {rate:.2f} requests/s: "
        "the order matters only while requests wait"
    )
    return rate


def build_comparison_document(
    pairs: tuple[PiecePair, ...], source: Source, effort: ComparisonEffort, rate: float, sides: Sides = SIDES
) -> dict[str, Any]:
    """Ratios, and each run with its raw rows."""
    return {
        "settings": {**asdict(source), **asdict(effort), "rate": rate},
        "policies": asdict(sides),
        "comparisons": [{**asdict(row), "verdict": row.verdict} for row in compare_metrics(pairs)],
        "pairs": [
            {key: build_document(run, summarise(run), {}) for key, run in (("stock", pair.stock), ("ours", pair.ours))}
            for pair in pairs
        ],
    }

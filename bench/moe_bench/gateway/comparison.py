"""What is measured of both routers, in alternating pairs, and how it is put into a table.

A pair is ours and theirs one directly after the other, in an order that turns with each pair, so that a slow drift of
the machine falls on both alike.
"""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from rich.table import Table

from moe_bench.gateway.engine import STEP_S
from moe_bench.gateway.load import ask_repeatedly, stream_at_once
from moe_bench.gateway.processes import Bed, Router
from moe_bench.report import read_environment
from moe_bench.statistics import Estimate, paired_ratio

CONNECTIONS = 32
STREAMS = 64
WARM_UP_S = 0.5


class Measurement(Enum):
    """Title, unit, whether more is better, and the ratio that is aimed at."""

    REQUESTS = ("requests per CPU second", "1/s", True, 2.0)
    LATENCY = ("added p50, one connection", "us", False, 0.5)
    EVENTS = ("SSE chunks per CPU second", "1/s", True, 1.5)

    def __init__(self, title: str, unit: str, more_is_better: bool, goal: float) -> None:
        self.title = title
        self.unit = unit
        self.more_is_better = more_is_better
        self.goal = goal


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One value of each, measured side by side."""

    ours: float
    theirs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """All pairs of one measurement; the ratio is ours to theirs."""

    measurement: Measurement
    pairs: tuple[Pair, ...]
    ratio: Estimate

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.ratio.covers(1.0):
            return "no difference: covers 1"
        better = (self.ratio.value > 1.0) == self.measurement.more_is_better
        return "ours is better" if better else "vllm-router is better"


def compare(bed: Bed, *, pairs: int, seconds: float, told: Callable[[str], None]) -> list[Compared]:
    """Measures everything; one line for each pair to `told`."""
    return [_compare_one(bed, measurement, pairs, seconds, told) for measurement in Measurement]


def _compare_one(
    bed: Bed, measurement: Measurement, pairs: int, seconds: float, told: Callable[[str], None]
) -> Compared:
    for router in (bed.ours, bed.theirs):
        _measure(measurement, bed, router, WARM_UP_S)
    measured = []
    for number in range(pairs):
        order = (bed.ours, bed.theirs) if number % 2 == 0 else (bed.theirs, bed.ours)
        values = {router.name: _measure(measurement, bed, router, seconds) for router in order}
        pair = Pair(ours=values[bed.ours.name], theirs=values[bed.theirs.name])
        told(f"{measurement.title}, pair {number + 1} of {pairs}: {pair.ours:,.0f} and {pair.theirs:,.0f}")
        measured.append(pair)
    ratio = paired_ratio([(pair.theirs, pair.ours) for pair in measured])
    return Compared(measurement=measurement, pairs=tuple(measured), ratio=ratio)


def _measure(measurement: Measurement, bed: Bed, router: Router, seconds: float) -> float:
    match measurement:
        case Measurement.REQUESTS:
            return asyncio.run(_requests_per_cpu_s(router, seconds))
        case Measurement.LATENCY:
            return asyncio.run(_added_p50_us(bed.direct_port, router, seconds))
        case Measurement.EVENTS:
            return asyncio.run(_events_per_cpu_s(router, seconds))


async def _requests_per_cpu_s(router: Router, seconds: float) -> float:
    before_s = router.cpu_s()
    answers = await ask_repeatedly(router.port, connections=CONNECTIONS, seconds=seconds)
    return answers.count / (router.cpu_s() - before_s)


async def _events_per_cpu_s(router: Router, seconds: float) -> float:
    before_s = router.cpu_s()
    events = max(1, round(seconds / STEP_S))
    answers = await stream_at_once(router.port, streams=STREAMS, events=events, seconds=seconds)
    return answers.count / (router.cpu_s() - before_s)


async def _added_p50_us(direct_port: int, router: Router, seconds: float) -> float:
    """The medians of both halves of the time: straight to an engine, and through the router.

    Raises:
        RuntimeError: the router seems to add nothing, so the machine is too noisy to say what it adds.
    """
    direct = await ask_repeatedly(direct_port, connections=1, seconds=seconds / 2)
    routed = await ask_repeatedly(router.port, connections=1, seconds=seconds / 2)
    added_s = statistics.median(routed.took_s) - statistics.median(direct.took_s)
    if added_s <= 0.0:
        raise RuntimeError(f"{router.name} seems to add nothing to the latency: the machine is too noisy for this")
    return added_s * 1e6


def render_comparison(compared: Sequence[Compared], vllm_router_version: str) -> Table:
    """One row for each measurement: medians, the ratio with its interval, what that says, what is aimed at."""
    environment = read_environment()
    table = Table(
        title=f"Gateway and vllm-router {vllm_router_version} in front of the same two mock engines",
        caption=(
            f"Python {environment['python']}, {environment['cores']} cores, the routers pinned to one. Ours chooses "
            "by its predictions, vllm-router by round robin.\nMedians of the pairs; the ratio is the geometric mean of "
            "the pairs' ratios, ours to theirs, with its 95 % interval."
        ),
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("measured", "ours", "vllm-router", "unit", "pairs", "ratio [95 % interval]", "goal", "says"):
        table.add_column(heading, justify="left" if heading in ("measured", "unit", "says") else "right", no_wrap=True)
    for row in compared:
        table.add_row(*_cells(row))
    return table


def _cells(row: Compared) -> tuple[str, ...]:
    ratio, measurement = row.ratio, row.measurement
    return (
        measurement.title,
        f"{statistics.median(pair.ours for pair in row.pairs):,.0f}",
        f"{statistics.median(pair.theirs for pair in row.pairs):,.0f}",
        measurement.unit,
        f"{len(row.pairs)}",
        f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"{measurement.goal:g}",
        row.verdict,
    )


def build_document(compared: Sequence[Compared], vllm_router_version: str, seconds: float) -> dict[str, Any]:
    """Everything measured, raw pairs included."""
    return {
        "environment": read_environment() | {"vllm_router": vllm_router_version},
        "settings": {"connections": CONNECTIONS, "streams": STREAMS, "step_s": STEP_S, "seconds": seconds},
        "measurements": [
            {
                "name": row.measurement.name.lower(),
                "unit": row.measurement.unit,
                "goal": row.measurement.goal,
                "pairs": [asdict(pair) for pair in row.pairs],
                "ratio": asdict(row.ratio),
                "says": row.verdict,
            }
            for row in compared
        ],
    }

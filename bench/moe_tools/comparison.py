"""Two policies, measured in pairs: the same piece of a trace, their order turned each time.

`moeserving compare` and the demo switch one running deployment through `moeserving set`, the one path that users have;
`moe_lab.serving` turns from one set of engines to another. Each pair serves one piece of the trace under both
policies, A B, then B A with the next piece, so that a slow drift of the machine falls on both alike. Prompts of each
run are other text of the same lengths: no run finds another's prefixes in a cache.

The order of requests matters only while some of them wait, so the load is set from the measured capacity, near
saturation.
"""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from moe_tools.replay import AnsweredRequest, Load, ReplayResult, replay, replay_closed
from moe_tools.statistics import Estimate, paired_ratio
from moe_tools.traces import TraceRequest, cut_piece, mean_rate, speed_up

LONGEST_SHARE = 0.1
PROBE_CONCURRENCY = 32
# A t interval of one or two pairs spans nearly everything.
LEAST_PAIRS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A name for the table, a short one for a sentence, and the settings that bring it about."""

    label: str
    brief: str
    settings: tuple[str, ...] = ()


STOCK = Policy(
    label="vLLM's own order, round robin",
    brief="vLLM's own order",
    settings=("scheduling.request.policy=fcfs", "scheduling.engine.policy=roundRobin"),
)
OURS = Policy(
    label="shortest first, predicted engine",
    brief="ours",
    settings=("scheduling.request.policy=sjf", "scheduling.engine.policy=predicted"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The two policies of a comparison: A (`stock`) and B (`ours`) of the table."""

    stock: Policy = STOCK
    ours: Policy = OURS


SIDES = Sides()

Switch = Callable[[Policy], Awaitable[None]]
Measure = Callable[[Sequence[TraceRequest], int], Awaitable[ReplayResult]]
"""Replays a piece with a salt for its prompts."""
Say = Callable[[str], None]
"""Gets one line of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecePair:
    """One piece under both policies."""

    stock: ReplayResult
    ours: ReplayResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`pieces` are served one a pair, each already at the wanted rate of arrivals.

    No pair but the first begins after `until_s` of the monotonic clock; None: no limit.
    """

    pieces: tuple[tuple[TraceRequest, ...], ...]
    seed: int
    until_s: float | None = None


def plan_pieces(
    requests: Sequence[TraceRequest], *, pairs: int, piece_s: float, rate: float, seed: int
) -> tuple[tuple[TraceRequest, ...], ...]:
    """Pieces of about `piece_s` at `rate` arrivals a second, from places of the trace drawn with the seed.

    Where the trace is too short for pieces apart from each other they overlap.
    """
    count = min(max(2, round(rate * piece_s)), len(requests))
    random = np.random.default_rng(seed)
    slots = len(requests) // count
    if slots >= pairs:
        starts = [int(slot) * count for slot in random.choice(slots, pairs, replace=False)]
    else:
        starts = [int(start) for start in random.integers(0, len(requests) - count + 1, pairs)]
    return tuple(_at_rate(cut_piece(requests, start, count), rate) for start in starts)


async def compare(
    plan: Plan, switch: Switch, measure: Measure, say: Say = lambda _: None, sides: Sides = SIDES
) -> tuple[PiecePair, ...]:
    """Serves each piece under both policies; the policy that begins alternates."""
    pairs: list[PiecePair] = []
    for number, piece in enumerate(plan.pieces):
        if pairs and plan.until_s is not None and time.monotonic() > plan.until_s:
            say(f"time is up: {len(pairs)} of {len(plan.pieces)} pairs")
            break
        order = (sides.stock, sides.ours) if number % 2 == 0 else (sides.ours, sides.stock)
        runs: dict[str, ReplayResult] = {}
        for turn, policy in enumerate(order):
            say(f"pair {number + 1} of {len(plan.pieces)}: {policy.label}, {len(piece)} requests")
            await switch(policy)
            runs[policy.label] = await measure(piece, build_salt(plan.seed, number, turn))
        pairs.append(PiecePair(stock=runs[sides.stock.label], ours=runs[sides.ours.label]))
    return tuple(pairs)


def build_salt(seed: int, number: int, turn: int) -> int:
    """Another number for each run of each comparison."""
    return ((seed & 0xFFFFFFFF) << 20) + number * 2 + turn + 1


async def probe_capacity(
    requests: Sequence[TraceRequest], load: Load, duration_s: float, concurrency: int = PROBE_CONCURRENCY
) -> float:
    """Requests a second that the deployment completes while `concurrency` are always in flight."""
    _, rate = await replay_closed(requests, load, concurrency, duration_s)
    return rate


def measure_with(load: Load) -> Measure:
    """Returns the measurement that replays a piece of a trace against a server."""

    async def run(piece: Sequence[TraceRequest], salt: int) -> ReplayResult:
        return await replay(piece, load.salted(salt))

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric: its mean over the runs of each policy, and the paired ratio ours/stock."""

    metric: str
    unit: str
    stock: float
    ours: float
    ratio: Estimate | None
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or that no difference is shown."""
        if self.ratio is None:
            return "not measured"
        if self.ratio.covers(1.0):
            return "covers 1: unclear"
        better = (self.ratio.value > 1) == self.higher_is_better
        return "better" if better else "worse"


def compare_metrics(pairs: Sequence[PiecePair]) -> tuple[Comparison, ...]:
    """Every metric over the pairs in which both runs have it."""
    return tuple(_compare_metric(metric, unit, read, higher, pairs) for metric, unit, read, higher in _METRICS)


def render_comparison(comparisons: Sequence[Comparison], pairs: Sequence[PiecePair], sides: Sides = SIDES) -> Table:
    """The table that `make demo` ends with; it fits 80 columns."""
    caption = (
        f"A: {sides.stock.label}. B: {sides.ours.label}.\n"
        f"B/A: geometric mean over {len(pairs)} pairs, in brackets its 95 % t interval.\n"
        "Where the interval covers 1, no difference is shown.\n"
        f"{render_failures(pairs, sides)}"
    )
    table = Table(title="What users got", caption=caption, caption_justify="left", title_justify="left")
    table.add_column("")
    for name in ("A", "B", "B/A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("B is")
    for row in comparisons:
        cells = (f"{render_number(value)} {row.unit}" for value in (row.stock, row.ours))
        table.add_row(row.metric, *cells, render_ratio(row.ratio), row.verdict)
    return table


def render_number(value: float) -> str:
    """Three digits, or all before the point."""
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def render_ratio(ratio: Estimate | None) -> str:
    """Returns a ratio with its interval, such as `0.80 [0.71, 0.90]`; `-` without one.

    From fewer than `LEAST_PAIRS` there is no interval of use: `0.80 (1 pair)`.
    """
    if ratio is None:
        return "-"
    if ratio.count < LEAST_PAIRS:
        return f"{ratio.value:.2f} ({ratio.count} pair{'' if ratio.count == 1 else 's'})"
    high = "inf" if math.isinf(ratio.high) else f"{ratio.high:.2f}"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {high}]"


def render_failures(pairs: Sequence[PiecePair], sides: Sides = SIDES) -> str:
    """How many requests failed under each policy."""
    stock = sum(len(pair.stock.failed) for pair in pairs)
    ours = sum(len(pair.ours.failed) for pair in pairs)
    requests = sum(len(pair.stock.outcomes) + len(pair.ours.outcomes) for pair in pairs)
    by_side = f"{stock} under {sides.stock.brief}, {ours} under {sides.ours.brief}"
    return f"Of {requests} requests {stock + ours} failed ({by_side})."


def mean_ttft_ms(run: ReplayResult) -> float | None:
    """Mean time to first token."""
    return _mean([row.ttft_s * 1e3 for row in run.answered])


def p99_ttft_ms(run: ReplayResult) -> float | None:
    """99th percentile of the time to first token."""
    return _p99([row.ttft_s * 1e3 for row in run.answered])


def longest_p99_ttft_ms(run: ReplayResult) -> float | None:
    """The same among the longest tenth of the prompts, which a shortest-first order could starve."""
    return _p99([row.ttft_s * 1e3 for row in select_longest(run.answered)])


def mean_tpot_ms(run: ReplayResult) -> float | None:
    """Mean time per output token after the first."""
    return _mean([row.tpot_s * 1e3 for row in run.answered if row.tpot_s is not None])


def output_tokens_per_s(run: ReplayResult) -> float | None:
    """Returns output tokens of answered requests per second of the run; None without any."""
    tokens = sum(row.output_tokens for row in run.answered)
    return tokens / run.wall_s if tokens else None


def select_longest(answered: Sequence[AnsweredRequest]) -> list[AnsweredRequest]:
    """The requests with the longest tenth of the prompts, at least one where there is any."""
    count = math.ceil(len(answered) * LONGEST_SHARE)
    return sorted(answered, key=lambda row: (-row.prompt_tokens, row.index))[:count]


_METRICS: tuple[tuple[str, str, Callable[[ReplayResult], float | None], bool], ...] = (
    ("TTFT, mean", "ms", mean_ttft_ms, False),
    ("TTFT, p99", "ms", p99_ttft_ms, False),
    ("TTFT, p99, longest tenth", "ms", longest_p99_ttft_ms, False),
    ("TPOT, mean", "ms", mean_tpot_ms, False),
    ("output tokens", "/s", output_tokens_per_s, True),
)


def _compare_metric(
    metric: str, unit: str, read: Callable[[ReplayResult], float | None], higher: bool, pairs: Sequence[PiecePair]
) -> Comparison:
    values = [(read(pair.stock), read(pair.ours)) for pair in pairs]
    usable = [(stock, ours) for stock, ours in values if stock and ours and stock > 0 and ours > 0]
    return Comparison(
        metric=metric,
        unit=unit,
        stock=_mean([stock for stock, _ in usable]) or math.nan,
        ours=_mean([ours for _, ours in usable]) or math.nan,
        ratio=paired_ratio(usable) if usable else None,
        higher_is_better=higher,
    )


def _at_rate(piece: tuple[TraceRequest, ...], rate: float) -> tuple[TraceRequest, ...]:
    own = mean_rate(piece)
    return piece if math.isinf(own) else speed_up(piece, rate / own)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _p99(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 99)) if values else None

"""Rates of the last second, as differences of the gateway's and the engines' counters. Pure.

Only the live page needs them, so nothing is counted for them while a request runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_contract.live_page import TimePoint
from moe_scheduling.signals import EngineSignal, Target

# A longer pause between two looks is no second of the chart.
LONGEST_GAP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """The counters at one moment.

    Attributes:
        at_s: the gateway's clock.
        arrivals: requests that arrived for an engine.
        ttft_counts: first tokens by bucket of the gateway's histogram.
        ttft_total_s: sum of their seconds.
        signals: the newest signal of each rank, where there is one.
    """

    at_s: float
    arrivals: int = 0
    ttft_counts: tuple[int, ...] = ()
    ttft_total_s: float = 0.0
    signals: Mapping[Target, EngineSignal]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRate:
    """One rank in the last second.

    Attributes:
        steps: of its engine; 0 where none is counted.
        step_s: mean seconds of a step while requests ran; None without.
        tokens_per_s: prompt and output tokens that it computed; None where it does not count them.
    """

    steps: int = 0
    step_s: float | None = None
    tokens_per_s: float | None = None


def measure_ranks(before: Counters, after: Counters) -> dict[Target, RankRate]:
    """The rates of the ranks that have a signal at both moments; a restarted engine counts anew and has none."""
    passed_s = after.at_s - before.at_s
    if not 0.0 < passed_s <= LONGEST_GAP_S:
        return {}
    found = {}
    for target, new in after.signals.items():
        old = before.signals.get(target)
        if old is None or new.step < old.step or new.computed_tokens < old.computed_tokens:
            continue
        steps = new.step - old.step
        was_busy = old.running > 0 and new.running > 0
        found[target] = RankRate(
            steps=steps,
            step_s=round(passed_s / steps, 6) if steps and was_busy else None,
            tokens_per_s=round((new.computed_tokens - old.computed_tokens) / passed_s, 1)
            if new.computed_tokens
            else None,
        )
    return found


def measure_point(
    before: Counters,
    after: Counters,
    rates: Mapping[Target, RankRate],
    bounds: Sequence[float],
    *,
    at_s: float,
    held: int,
    in_flight: int,
) -> TimePoint:
    """The second between two moments, which ends at the time of day `at_s`; `bounds` are those of the histogram."""
    passed_s = after.at_s - before.at_s
    if not 0.0 < passed_s <= LONGEST_GAP_S:
        return TimePoint(at_s=round(at_s, 3), held=held, in_flight=in_flight)
    counts = [new - old for old, new in zip(before.ttft_counts, after.ttft_counts, strict=True)]
    first_tokens = sum(counts)
    mean_s = round((after.ttft_total_s - before.ttft_total_s) / first_tokens, 6) if first_tokens else None
    steps = [rate for rate in rates.values() if rate.step_s is not None]
    counted = [rate.tokens_per_s for rate in rates.values() if rate.tokens_per_s is not None]
    return TimePoint(
        at_s=round(at_s, 3),
        ttft_s=mean_s,
        # One alone is known exactly, and not only by its bucket.
        ttft_p95_s=mean_s if first_tokens == 1 else _rounded(find_quantile(0.95, bounds, counts)),
        # Each step counts alike: the mean over tokens of equally full ranks.
        step_s=round(passed_s * len(steps) / sum(rate.steps for rate in steps), 6) if steps else None,
        requests_per_s=round((after.arrivals - before.arrivals) / passed_s, 2),
        tokens_per_s=round(sum(counted), 1) if counted else None,
        held=held,
        in_flight=in_flight,
    )


def find_quantile(part: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The value below which this part of the observations lies, interpolated within a bucket as Prometheus does.

    Args:
        part: 0 to 1.
        bounds: upper bounds of all buckets but the last, ascending, above 0.
        counts: observations of each bucket.

    Returns:
        The value; the last bound where it lies above; None without observations.
    """
    wanted, below, lower = part * sum(counts), 0.0, 0.0
    if not wanted:
        return None
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= wanted:
            return lower + (bound - lower) * (wanted - below) / count
        below, lower = below + count, bound
    return bounds[-1]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)

"""Tokens per second of each engine, from the counts in its states and the times at which the states were taken.

States come at intervals of their own, passes at any time: a rate is over the time between two states, never over that
between two passes. Pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# States that are closer together are not compared: a few milliseconds on the way would change the rate of a short time.
LEAST_SPAN_S = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens that an engine has computed since its start.

    Attributes:
        tokens: the count.
        as_of_s: the time at which it was this number, on the operator's monotonic clock.
    """

    tokens: int
    as_of_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRate:
    """The rate of one engine, and the count from which the next one is measured.

    Attributes:
        since: the count.
        tokens_per_s: mean over the time between `since` and the count before it; None before there were two.
    """

    since: TokenCount
    tokens_per_s: float | None = None


def measure_rates(known: Mapping[str, TokenRate], counts: Mapping[str, TokenCount]) -> dict[str, TokenRate]:
    """The rate of each engine that has a count now, by pod.

    An engine without a newer count keeps its rate. One that began anew counts from zero.

    Args:
        known: the rates as they were, by pod.
        counts: the newest count of each engine, by pod.
    """
    return {pod: _measure(known.get(pod), count) for pod, count in counts.items()}


def sum_rates(rates: Iterable[TokenRate]) -> float | None:
    """Tokens per second of all engines whose rate is known; None without one."""
    values = [rate.tokens_per_s for rate in rates if rate.tokens_per_s is not None]
    return sum(values) if values else None


def _measure(known: TokenRate | None, count: TokenCount) -> TokenRate:
    if known is None:
        return TokenRate(since=count)
    span_s = count.as_of_s - known.since.as_of_s
    if span_s < LEAST_SPAN_S:
        return known
    tokens = count.tokens - known.since.tokens if count.tokens >= known.since.tokens else count.tokens
    return TokenRate(since=count, tokens_per_s=tokens / span_s)

"""How many requests end and how soon answers begin, from looks at the running totals of a gateway. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_operator.local.observation import Observation

WINDOW_S = 10.0

_TTFT = "moeserving_gateway_ttft_seconds_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the gateway has counted since its start, as seen at `at_s`; `ttft_s` is a sum over `answers`."""

    at_s: float
    ended: int
    answers: int
    ttft_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What happened over a window; no TTFT when no answer began in it."""

    requests_per_s: float
    ttft_mean_s: float | None


def read_totals(seen: Observation, at_s: float) -> Totals | None:
    """The totals of one look; None when the gateway gave no answer."""
    if seen.gateway is None:
        return None
    values = dict(
        line.split(" ", 1) for line in seen.metrics.splitlines() if line.startswith(_TTFT) and "{" not in line
    )
    return Totals(
        at_s=at_s,
        ended=seen.gateway.totals.requests,
        answers=int(float(values.get(f"{_TTFT}count", 0))),
        ttft_s=float(values.get(f"{_TTFT}sum", 0)),
    )


def extend_window(window: Sequence[Totals], newest: Totals | None) -> tuple[Totals, ...]:
    """The looks of the last `WINDOW_S`; begun anew where a gateway that restarted counts from zero."""
    if newest is None:
        return ()
    if window and (newest.ended < window[-1].ended or newest.answers < window[-1].answers):
        return (newest,)
    return (*(look for look in window if newest.at_s - look.at_s <= WINDOW_S), newest)


def build_throughput(window: Sequence[Totals]) -> Throughput | None:
    """The pace between the first and the last look; None before there are two."""
    if len(window) < 2 or window[-1].at_s <= window[0].at_s:
        return None
    first, last = window[0], window[-1]
    answers = last.answers - first.answers
    return Throughput(
        requests_per_s=(last.ended - first.ended) / (last.at_s - first.at_s),
        ttft_mean_s=(last.ttft_s - first.ttft_s) / answers if answers else None,
    )

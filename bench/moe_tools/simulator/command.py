"""`moeserving simulate`: one scenario, its table, and its document."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_tools.replay_command import write_json
from moe_tools.report import read_environment
from moe_tools.simulator.outcome import Figures, build_rows
from moe_tools.simulator.scenario import Scenario, build_simulation, cost_of, load_scenario
from moe_tools.simulator.simulation import SimulationResult, load_vllm, simulate


def run_simulate(path: Path, json_out: Path | None) -> None:
    """Simulates the scenario in a file, prints its figures, and writes them as JSON where a path is given."""
    scenario = load_scenario(path)
    simulation = build_simulation(scenario)
    console = Console()
    maker = load_vllm()
    began_s = time.perf_counter()
    outcome = simulate(simulation, maker)
    took_s = time.perf_counter() - began_s
    console.print(render_figures(scenario, outcome))
    console.print(f"{outcome.totals.now_s:.1f} virtual seconds in {took_s:.1f} s", highlight=False)
    if json_out is not None:
        write_json(json_out, build_document(scenario, outcome))


def build_document(scenario: Scenario, outcome: SimulationResult) -> dict[str, Any]:
    """What depends on the scenario and the versions alone."""
    environment = read_environment()
    return {
        "scenario": json.loads(scenario.model_dump_json(by_alias=True, exclude_unset=True)),
        "cost": cost_of(scenario).source,
        "versions": {"python": environment["python"], **environment["packages"]},
        "figures": {name: _finite(value) for name, value in asdict(outcome.figures).items()},
        "tenants": [asdict(row) for row in outcome.tenants],
        "totals": asdict(outcome.totals),
        "requests": build_rows(outcome.requests),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def render_figures(scenario: Scenario, outcome: SimulationResult) -> Table:
    """The figures that decide, for people."""
    figures = outcome.figures
    table = Table(
        title=scenario.name or "Simulation",
        caption=f"Step time: {cost_of(scenario).source}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("", justify="right")
    for label, value in _lines(figures):
        table.add_row(label, value)
    return table


def _lines(figures: Figures) -> list[tuple[str, str]]:
    return [
        ("requests, failed", f"{figures.requests}, {figures.failed}"),
        ("TTFT mean / p50 / p99", _seconds(figures.ttft_mean, figures.ttft_p50, figures.ttft_p99)),
        ("TTFT p99, longest tenth", _seconds(figures.ttft_p99_longest)),
        ("TTFT alone on an idle engine, mean", _seconds(figures.ttft_floor)),
        ("TPOT mean / p99", _seconds(figures.tpot_mean, figures.tpot_p99)),
        ("end to end, mean", _seconds(figures.end_mean)),
        ("output tokens/s, requests/s", f"{figures.output_tokens_per_s:,.0f}, {figures.requests_per_s:.2f}"),
        ("Jain index: requests, tenants", f"{figures.jain:.3f}, {figures.jain_tenants:.3f}"),
        ("prompt tokens found in caches", f"{figures.cached_share:.1%}"),
        ("preemptions", f"{figures.preemptions}"),
        ("engines busy", f"{figures.busy_share:.1%}"),
    ]


def _seconds(*values: float) -> str:
    return " / ".join("-" if math.isnan(value) else f"{value * 1000:,.1f}" for value in values) + " ms"

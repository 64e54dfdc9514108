"""What a soak found, as a table for people and as a JSON document."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from moe_lab.soak.deliveries import SoakOutcome
from moe_lab.soak.soak import SoakResult


def build_document(result: SoakResult, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was counted, as a JSON object."""
    settings = asdict(result.settings)
    return {
        "environment": dict(environment),
        "settings": settings | {"model": None if result.settings.model is None else "tiny"},
        "requests": result.deliveries.finished,
        "official_clients": result.official,
        "load_s": round(result.load_s, 1),
        "requests_per_s": round(result.deliveries.finished / result.load_s, 1),
        "outcomes": {outcome.value: result.deliveries.outcomes[outcome] for outcome in SoakOutcome},
        "traffic": dict(sorted(result.deliveries.traffic.items())),
        "faults": {kind.value: count for kind, count in result.faults.items()},
        "overlapping_faults": result.overlaps,
        "given_to_two_engines": result.records.repeated,
        "computed_twice": result.records.computed_twice,
        "gateways": [asdict(gateway) for gateway in result.gateways],
        "problems": result.problems,
        "examples": result.deliveries.examples,
    }


def render_result(result: SoakResult) -> Table:
    """The table: a row for each guarantee, then how requests ended."""
    table = Table(title="The soak", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("counted", no_wrap=True)
    table.add_column("number", justify="right")
    for name, value in _rows(result):
        table.add_row(name, value)
    return table


def _rows(result: SoakResult) -> list[tuple[str, str]]:
    steady = next(gateway for gateway in result.gateways if gateway.is_steady)
    outcomes = result.deliveries.outcomes
    mib = 2**20
    return [
        ("requests", f"{result.deliveries.finished:,}"),
        ("of them from the official clients", f"{result.official:,}"),
        ("faults", f"{result.faults.total():,}"),
        ("of them begun during another one", f"{result.overlaps:,}"),
        *((outcome.value, f"{outcomes[outcome]:,}") for outcome in SoakOutcome),
        ("given to a second engine", f"{result.records.repeated:,}"),
        ("in flight at the end", f"{sum(gateway.in_flight + gateway.held for gateway in result.gateways)}"),
        ("memory", f"{steady.memory_start_bytes / mib:.0f} -> {steady.memory_end_bytes / mib:.0f} MiB"),
        ("descriptors", f"{steady.descriptors_start} -> {steady.descriptors_end}"),
        ("requests a second", f"{result.deliveries.finished / result.load_s:,.0f}"),
    ]

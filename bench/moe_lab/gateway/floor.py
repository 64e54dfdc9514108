"""`python -m moe_lab.gateway.floor --vllm-router PATH`: what any proxy in Python costs, beside ours and vllm-router.

Each round measures all of them, one directly after the other, in an order that turns; ratios are to vllm-router at
`round_robin` in the same round.
"""

import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.user_errors import report_user_errors
from rich import box
from rich.table import Table

from moe_lab.gateway.__main__ import read_version
from moe_lab.gateway.comparison import (
    WARM_UP_S,
    Measurement,
    MeasurementPair,
    TooNoisy,
    estimate_ratio,
    measure_in_turn,
    read_machine,
)
from moe_lab.gateway.processes import GatewayTestbed, running
from moe_lab.gateway.relay import RelayKind

POLICY = "round_robin"
MEASURED = (Measurement.REQUESTS, Measurement.LATENCY, Measurement.EVENTS)

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorRow:
    """One measurement of all proxies: their values in each round, by their names."""

    measurement: Measurement
    rounds: tuple[Mapping[str, float], ...]


@app.command()
@report_user_errors
def main(
    vllm_router: Annotated[Path, typer.Option("--vllm-router", help="The program vllm-router.")],
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each measurement.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of one measurement.")] = 1.0,
) -> None:
    """Measure relays that do next to nothing, our gateway and vllm-router."""
    machine = read_machine(read_version(vllm_router), POLICY)
    progress = ProgressPrinter()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-floor-") as folder,
            running(vllm_router, Path(folder), POLICY, relays=list(RelayKind)) as testbed,
        ):
            rows = [_measure(testbed, measurement, rounds, seconds, progress) for measurement in MEASURED]
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    progress.console.print(render_floor(rows, machine))


def _measure(
    testbed: GatewayTestbed, measurement: Measurement, rounds: int, seconds: float, progress: ProgressPrinter
) -> FloorRow:
    routers = [*testbed.relays, testbed.ours, testbed.theirs]
    measure_in_turn(measurement, testbed, routers, WARM_UP_S)
    measured: list[Mapping[str, float]] = []
    for number in range(rounds):
        shift = number % len(routers)
        try:
            values = measure_in_turn(measurement, testbed, [*routers[shift:], *routers[:shift]], seconds)
        except TooNoisy as error:
            progress(f"{measurement.title}, round {number + 1} of {rounds} does not count: {error}")
            continue
        measured.append(values)
        shown = ", ".join(f"{router.name} {values[router.name]:,.0f}" for router in routers)
        progress(f"{measurement.title}, round {number + 1} of {rounds}: {shown}")
    if len(measured) < 2:
        raise TooNoisy(f"{measurement.title}: fewer than two rounds could be measured")
    return FloorRow(measurement=measurement, rounds=tuple(measured))


def render_floor(rows: Sequence[FloorRow], machine: Mapping[str, Any]) -> Table:
    """One line for each proxy: the median of each measurement, and the ratio to vllm-router with its interval."""
    rounds = ", ".join(str(len(row.rounds)) for row in rows)
    table = Table(
        title="Relays that do next to nothing, the gateway and vllm-router in front of the same two mock engines",
        caption=f"Medians of {rounds} rounds; in brackets the ratio to vllm-router, 95 % interval. Python "
        f"{machine['python']}, uvloop {machine['packages']['uvloop']}, vllm-router {machine['vllm_router']}, policy "
        f"{POLICY}; {machine['cpu']}, {machine['cores']} cores, load {machine['load_average']:.1f}.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("proxy")
    for row in rows:
        table.add_column(row.measurement.title, justify="right")
    for name in rows[0].rounds[0]:
        table.add_row(name, *(_cell(row, name) for row in rows))
    return table


def _cell(row: FloorRow, name: str) -> str:
    ratio = estimate_ratio([MeasurementPair(ours=values[name], theirs=values["vllm-router"]) for values in row.rounds])
    median = statistics.median(values[name] for values in row.rounds)
    return f"{median:,.0f}\n{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


if __name__ == "__main__":
    app()

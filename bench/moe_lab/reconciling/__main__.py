"""`python -m moe_lab.reconciling --kubeconfig FILE`: many resources under one operator; prints the table."""

import asyncio
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.api_server import LoginError
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.report import read_environment
from moe_tools.statistics import estimate, percentile_of
from moe_tools.user_errors import report_user_errors
from rich.table import Table

from moe_lab.reconciling.cluster import connect, stand_in
from moe_lab.reconciling.measurement import BenchmarkPhase, ReconcilingResult, measure

app = typer.Typer(add_completion=False)
MIB = 1 << 20


@app.command()
@report_user_errors
def main(
    kubeconfig: Annotated[Path, typer.Option(help="An API server of its own: it is filled and emptied.")],
    resources: Annotated[int, typer.Option(min=1, max=30_000, help="How many.")] = 1000,
    changes: Annotated[int, typer.Option(min=1, help="Changes of single resources, one after the other.")] = 50,
    idle: Annotated[float, typer.Option(min=1.0, help="Seconds of idleness that are looked at.")] = 60.0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Time to converge, length of a pass, memory, and calls of the operator under many resources."""
    progress = ProgressPrinter()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-operator-") as folder:
            measured = asyncio.run(_run(kubeconfig, Path(folder, "operator.log"), resources, changes, idle, progress))
    except LoginError as error:
        raise InvalidInput([InputError("--kubeconfig", str(error))]) from None
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    progress.console.print(render(measured))
    for line in describe(measured):
        progress.console.print(line, highlight=False, soft_wrap=True)
    if json_out is not None:
        json_out.write_text(json.dumps(build_document(measured), indent=1) + "\n", "utf-8")


async def _run(
    kubeconfig: Path, log: Path, resources: int, changes: int, idle_s: float, progress: ProgressPrinter
) -> ReconcilingResult:  # fmt: skip
    async with connect(kubeconfig) as cluster, stand_in(cluster.pods) as port:
        return await measure(
            cluster, kubeconfig, log, port, resources=resources, changes=changes, idle_s=idle_s, progress=progress
        )


def render(measured: ReconcilingResult) -> Table:
    """The table, one phase in each row."""
    environment = read_environment()
    table = Table(
        title=f"The operator under {measured.resources} resources",
        caption=f"Python {environment['python']}, {environment['cores']} cores, shared with the API server and etcd",
        caption_justify="left",
        title_justify="left",
    )
    for heading in ("phase", "s", "passes", "p50 ms", "p99 ms", "writes", "failed", "CPU s", "memory MiB"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase in measured.phases:
        table.add_row(*_cells(phase))
    return table


def _cells(phase: BenchmarkPhase) -> tuple[str, ...]:
    return (
        phase.name,
        f"{phase.seconds:.1f}",
        f"{phase.passes}",
        f"{phase.p50_s * 1e3:.0f}",
        f"{phase.p99_s * 1e3:.0f}",
        f"{phase.writes}",
        f"{phase.failed}",
        f"{phase.cpu_s:.1f}",
        f"{phase.memory_bytes / MIB:.0f}",
    )


def describe(measured: ReconcilingResult) -> Iterable[str]:
    """What the table has no room for."""
    half, most = (estimate(measured.changes_s, percentile_of(percent)) for percent in (50, 99))
    yield (
        f"from a change to its Deployment: p50 {half.value * 1e3:.0f} ms "
        f"[{half.low * 1e3:.0f}, {half.high * 1e3:.0f}], p99 {most.value * 1e3:.0f} ms, {half.count} changes"
    )
    for phase in measured.phases:
        if phase.name == "idle":
            calls = {f"{verb} {kind}": count * 60 / phase.seconds for (verb, kind), count in phase.calls.items()}
            rows = ", ".join(f"{name} {count:.0f}" for name, count in sorted(calls.items()) if count)
            yield f"idle, API calls a minute: {sum(calls.values()):.0f} ({rows or 'none'})"


def build_document(measured: ReconcilingResult) -> dict[str, object]:
    """All figures as a JSON document."""
    document = asdict(measured)
    for phase in document["phases"]:
        phase["calls"] = {f"{verb} {kind}": count for (verb, kind), count in phase["calls"].items()}
    return {"environment": read_environment(), **document}


if __name__ == "__main__":
    app()

"""`python -m moe_lab.soak`: starts everything, soaks, prints the table; exit status 1 where a guarantee was broken."""

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.report import read_environment
from moe_tools.user_errors import report_user_errors

from moe_lab.soak.processes import DidNotStart
from moe_lab.soak.report import build_document, render_result
from moe_lab.soak.soak import SoakSettings, run_soak

app = typer.Typer(add_completion=False)


@app.command()
@report_user_errors
def main(
    requests: Annotated[int, typer.Option(min=1, help="Least number of requests.")] = 1_000_000,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="End after this time at the latest.")] = None,
    seed: Annotated[int, typer.Option(help="Requests and faults follow from it.")] = 0,
    connections: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 48,
    fault_every: Annotated[int, typer.Option(min=1, help="Requests between two faults.")] = 500,
    long_faults: Annotated[
        bool, typer.Option(help="Some faults last until an engine is taken for stalled, half a minute each.")
    ] = True,
    real_engine: Annotated[
        Path | None, typer.Option(help="Folder of the tiny model: a real vLLM engine on the CPU is among the engines.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep logs and records in this folder.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all counts here.")] = None,
) -> None:
    """Mixed traffic through gateways while engines and gateways fail; each request is accounted for."""
    settings = SoakSettings(
        requests=requests,
        minutes=minutes,
        seed=seed,
        connections=connections,
        fault_every=fault_every,
        model=real_engine,
        has_long_faults=long_faults,
    )
    progress = ProgressPrinter()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    # The usual signal that ends this process ends the processes that it started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            place = Path(folder) if logs is None else logs
            place.mkdir(parents=True, exist_ok=True)
            result = asyncio.run(run_soak(settings, place, progress))
    except DidNotStart as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    progress.console.print(render_result(result))
    for problem in result.problems:
        progress.console.print(f"broken: {problem}", highlight=False, markup=False, soft_wrap=True)
    if json_out is not None:
        json_out.write_text(json.dumps(build_document(result, read_environment()), indent=1) + "\n", "utf-8")
    if result.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()

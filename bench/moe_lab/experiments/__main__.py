"""`python -m moe_lab.experiments run|report`: makes the runs of the simulator's experiments, and `docs/results/` of
them.
"""

from pathlib import Path
from typing import Annotated

import typer
from moe_tools.user_errors import report_user_errors

from moe_lab.experiments.plan import Selection
from moe_lab.experiments.raw import RAW_RESULTS, RawResults
from moe_lab.experiments.report import write_report
from moe_lab.experiments.runner import run_experiments
from moe_lab.experiments.workloads import KEPT_APART

app = typer.Typer(no_args_is_help=True)


@app.callback()
def experiments() -> None:
    """Experiments on the simulator, one command each."""


@app.command("run")
@report_user_errors
def experiments_run(
    only: Annotated[list[str] | None, typer.Option("--only", help="Experiment; may be given again.")] = None,
    workload: Annotated[list[str] | None, typer.Option("--workload", help="Workload; may be given again.")] = None,
    variant: Annotated[list[str] | None, typer.Option("--variant", help="Variant; may be given again.")] = None,
    load: Annotated[list[float] | None, typer.Option("--load", help="Part of the saturation; repeatable.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 4,
    first_seed: Annotated[
        int, typer.Option("--first-seed", min=1, help=f"Below {KEPT_APART} for tuning, in no report.")
    ] = KEPT_APART,
    count: Annotated[int, typer.Option("--count", min=20, help="Requests of a run.")] = 600,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes; each needs 1 GiB.")] = 1,
    traces: Annotated[Path | None, typer.Option("--traces", help="Folder with the public traces.")] = None,
    raw: RawResults = RAW_RESULTS,
) -> None:
    """Make the runs that are missing; interrupted, it goes on where it was."""
    selection = Selection(
        only=tuple(only or ()), workloads=tuple(workload or ()), variants=tuple(variant or ()),
        loads=tuple(load or ()), seeds=seeds, first_seed=first_seed, count=count,
    )  # fmt: skip
    run_experiments(selection, workers=workers, traces=traces, out=raw)


@app.command("report")
@report_user_errors
def experiments_report(
    raw: RawResults = RAW_RESULTS,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("docs/results"),
) -> None:
    """Make tables and plots of the runs that are there."""
    write_report(raw, folder)
    typer.echo(folder / "README.md")


if __name__ == "__main__":
    app()

"""`python -m moe_lab.disaggregation run|report`: makes the runs of the comparison, and tables of them."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.input_errors import InvalidInput, unknown_choice
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_tools.advisor.clocks import CLOCKS
from moe_tools.user_errors import report_user_errors

from moe_lab.disaggregation.arrangements import CLOCK, REFERENCE, arrangements
from moe_lab.disaggregation.matrix import Run, run_all
from moe_lab.disaggregation.report import render
from moe_lab.disaggregation.workloads import NAMES, Folders
from moe_lab.experiments.runner import read_records

RawFile = Annotated[Path, typer.Option("--raw", help="File of raw results, one JSON line for each run.")]
_RAW = Path(".cache/experiments/disaggregation.jsonl")
app = typer.Typer(no_args_is_help=True)


@app.callback()
def disaggregation() -> None:
    """Prefill and decode together and apart on the same GPUs. Modelled: docs/simulator.md."""


@app.command("run")
@report_user_errors
def run_command(
    gpus: Annotated[list[int] | None, typer.Option(min=2, max=16, help="Repeatable; 8 without.")] = None,
    clock: Annotated[str, typer.Option(help="Step times, by GPU and model.")] = CLOCK,
    workload: Annotated[list[str] | None, typer.Option(help="Repeatable; twoEnd without.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Part of stock vLLM's saturation; 1 without.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Arrangements by their names; all without.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 4,
    first_seed: Annotated[int, typer.Option(min=1)] = 1,
    count: Annotated[int, typer.Option(min=20, help="Requests of a run.")] = 600,
    weight: Annotated[float, typer.Option(min=0, help="Seconds of TTFT that a second of an answer is worth.")] = 1.0,
    growth: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Part by which the TTFT of a pair may exceed the soonest whole one's; repeatable."),
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(min=0.001, help="Declared bound of TTFT (s), for the choice of each request.")
    ] = None,
    full_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second of a full load, instead of the saturation.")
    ] = None,
    traces: Annotated[Path | None, typer.Option(help="Folder with the public traces.")] = None,
    sessions: Annotated[Path | None, typer.Option(help="Folder with the agents' sessions.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; each needs 1 GiB.")] = 1,
    raw: RawFile = _RAW,
) -> None:
    """Make the runs that are missing; interrupted, it goes on where it was."""
    _check_names(workload, clock)
    runs = [
        run
        for seed, number, name, part in product(
            range(first_seed, first_seed + seeds), gpus or [8], workload or ["twoEnd"], load or [1.0]
        )
        for run in _list_runs(
            Run(
                gpus=number,
                workload=name,
                load=part,
                count=count,
                seed=seed,
                arrangement=REFERENCE,
                clock=clock,
                targets=LatencyTargets(answer_weight=weight, ttft_s=ttft),
            ),
            only,
            growth,
        )
    ]
    folders = Folders(traces=traces, sessions=sessions)
    run_all(runs, folders=folders, out=raw, workers=workers, say=typer.echo, full_rate=full_rate)


def _check_names(workloads: list[str] | None, clock: str) -> None:
    bad = [unknown_choice("--workload", name, NAMES) for name in workloads or () if name not in NAMES]
    if clock not in CLOCKS:
        bad.append(unknown_choice("--clock", clock, CLOCKS))
    if bad:
        raise InvalidInput(bad)


def _list_runs(like: Run, only: list[str] | None, growth: list[float] | None) -> list[Run]:
    """Returns the runs of the chosen arrangements; the objective matters where each request goes whole or as a pair."""
    ways, usual = arrangements(like.gpus, like.clock), LatencyTargets()
    if unknown := [unknown_choice("--only", way, ways) for way in only or () if way not in ways]:
        raise InvalidInput(unknown)
    found = []
    for way in only or ways:
        if ways[way].moves:
            objectives = [replace(like.targets, ttft_growth=each) for each in growth or [usual.ttft_growth]]
        else:
            objectives = [usual]
        found += [replace(like, arrangement=way, targets=targets) for targets in objectives]
    return found


@app.command("report")
@report_user_errors
def report_command(
    raw: RawFile = _RAW,
    base: Annotated[str, typer.Option(help="Arrangement that the others are compared with.")] = REFERENCE,
) -> None:
    """Print tables of the runs that are there."""
    typer.echo(render(read_records(raw), base))


if __name__ == "__main__":
    app()

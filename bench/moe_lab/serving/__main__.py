"""`python -m moe_lab.serving [--vllm-router PATH]`: starts both sides, measures, prints the table.

With `--roles` it is another run: requests split between engines that fail (`moe_lab.split_requests`).
"""

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_tools.cli import Format, InFlight, JsonOut, MaxTokens, Scale, Seed, ShapeName, Trace
from moe_tools.compare_command import ComparisonEffort
from moe_tools.comparison import Sides
from moe_tools.deployment import find_checkout, stopped_by_signals
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay_command import Source, check_source, write_json
from moe_tools.server import run_async
from moe_tools.tiny import ensure_tiny_model
from moe_tools.user_errors import report_user_errors

from moe_lab.gateway.__main__ import read_version
from moe_lab.gateway.comparison import read_machine
from moe_lab.gateway.processes import DEFAULT_POLICY, POLICIES
from moe_lab.serving.knee import NoKnee
from moe_lab.serving.measurement import measure
from moe_lab.serving.processes import DoesNotServe
from moe_lab.serving.report import build_document, describe, render
from moe_lab.serving.stock import StockRouter
from moe_lab.serving.testbed import TestbedPlan, plan_testbed, running_testbed
from moe_lab.soak.processes import DidNotStart
from moe_lab.split_requests.report import build_document as build_split_document
from moe_lab.split_requests.report import render_result
from moe_lab.split_requests.run import SplitSettings, run_split

GENERATED_REQUESTS = 6000
"""Of a generated shape: enough that pieces need not overlap."""

NOT_USED = ("not used", "not used")
"""Version and policy of a router that is not there."""

OF_COMPARISON = ("transfers",)
"""Parameters that a comparison does not have."""
OF_ROLES = (
    "policy", "manifest", "trace", "trace_format", "shape", "pairs", "piece_s", "load", "knee", "rate", "in_flight",
    "scale", "max_tokens",
)  # fmt: skip
"""Parameters that do not go with `--roles`."""

app = typer.Typer(add_completion=False)


@app.command()
@report_user_errors
def main(
    context: typer.Context,
    vllm_router: Annotated[
        Path | None, typer.Option("--vllm-router", help="The program vllm-router; one engine needs none.")
    ] = None,
    policy: Annotated[str, typer.Option(help=f"Policy of vllm-router: {', '.join(POLICIES)}.")] = DEFAULT_POLICY,
    manifest: Annotated[Path | None, typer.Option("-f", help="The resource; else that of `make demo`.")] = None,
    trace: Trace = None,
    trace_format: Format = None,
    shape: ShapeName = "random",
    pairs: Annotated[int, typer.Option(min=1, help="Pieces of the workload, each on both sides.")] = 8,
    piece_s: Annotated[float, typer.Option("--piece-s", min=1, help="Seconds of arrivals in a piece.")] = 40.0,
    load: Annotated[
        float | None,
        typer.Option(min=0.05, max=2, help="Arrivals as a share of stock's capacity (0.9) or of its knee (1.0)."),
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Find the rate at which stock's mean TTFT is 5 times that of requests alone.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="Arrivals a second, instead of a measured load.")] = None,
    in_flight: InFlight = 32,
    seed: Seed = 0,
    scale: Scale = 1.0,
    max_tokens: MaxTokens = None,
    json_out: JsonOut = None,
    roles: Annotated[
        bool, typer.Option("--roles", help="Split requests between engines that fail, and account for each.")
    ] = False,
    transfers: Annotated[int, typer.Option(min=20, help="With --roles: answers that need KV blocks of others.")] = 1000,
) -> None:
    """Compare MoEServing with stock vLLM behind vllm-router, on real engines, in alternating pairs."""
    check_options(context, OF_ROLES if roles else OF_COMPARISON)
    if roles:
        run_roles(SplitSettings(transfers=transfers, seed=seed), json_out)
        return
    if policy not in POLICIES:
        raise InvalidInput([unknown_choice("--policy", policy, POLICIES)])
    environment = read_machine(read_version(vllm_router), policy) if vllm_router else read_machine(*NOT_USED)
    if knee and rate is not None:
        raise InvalidInput([InputError("--rate", "is given, so --knee has none to find; leave out one of them")])
    source = Source(
        trace=trace, trace_format=trace_format, shape=shape, limit=None if trace else GENERATED_REQUESTS, seed=seed,
        scale=scale, max_tokens=max_tokens,
    )  # fmt: skip
    check_source(source)
    effort = ComparisonEffort(
        pairs=pairs, piece_s=piece_s, load=load or (1.0 if knee else 0.9), rate=rate, in_flight=in_flight, of_knee=knee
    )
    plan = plan_testbed(manifest, StockRouter(program=vllm_router, policy=policy), piece_s)
    run(plan, source, effort, environment, json_out)


def check_options(context: typer.Context, of_other_run: Collection[str]) -> None:
    """Refuses options of the other run.

    Raises:
        InvalidInput: they are on the command line.
    """
    sources = {name: context.get_parameter_source(name) for name in of_other_run}
    wrong = sorted(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")
    if wrong:
        with_roles = "goes with --roles alone" if of_other_run is OF_COMPARISON else "does not go with --roles"
        raise InvalidInput([InputError(f"--{name.replace('_', '-')}", with_roles) for name in wrong])


def run_roles(settings: SplitSettings, json_out: Path | None) -> None:
    """Splits requests between engines that fail, prints the table and writes the JSON.

    Raises:
        typer.Exit: an engine does not serve, or a guarantee was broken.
    """
    say, environment, checkout = ProgressPrinter(), read_machine(*NOT_USED), find_checkout()
    folder = checkout / ".cache" / "split-requests"
    folder.mkdir(parents=True, exist_ok=True)
    model = ensure_tiny_model(checkout / ".cache" / "models" / "tiny")
    try:
        with stopped_by_signals():
            result = asyncio.run(run_split(settings, model, folder, say))
    except DidNotStart as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    say.console.print(render_result(result, environment))
    for line in (*result.problems, *result.outcomes.examples):
        say.console.print(line, highlight=False, markup=False, soft_wrap=True)
    if json_out:
        write_json(json_out, build_split_document(result, environment))
    if result.problems:
        raise typer.Exit(1)


def run(
    plan: TestbedPlan, source: Source, effort: ComparisonEffort, environment: Mapping[str, Any], json_out: Path | None
) -> None:
    """Starts both sides, measures, prints the table and writes the JSON.

    Raises:
        typer.Exit: a side does not serve, or there is no knee.
    """
    say = ProgressPrinter()
    try:
        with stopped_by_signals(), running_testbed(plan, say) as testbed:
            sides = Sides(stock=testbed.stock.policy, ours=testbed.ours.policy)
            measured = run_async(measure(testbed.stock, testbed.ours, testbed.engine_url, source, effort, say))
    except (DoesNotServe, NoKnee) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    say.console.print(render(measured, sides, environment))
    for line in describe(measured, environment):
        say.console.print(line, highlight=False, soft_wrap=True)
    if json_out:
        commands = {program.name: program.command for program in testbed.programs}
        write_json(json_out, build_document(measured, sides, source, effort, environment, commands))


if __name__ == "__main__":
    app()

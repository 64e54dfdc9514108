"""`python -m moe_lab.experts serve`: a real group of two ranks on this machine, measured before and after a move."""

import os
from pathlib import Path
from typing import Annotated

import typer
from moe_operator.local.failure import Failure
from moe_tools.deployment import stopped_by_signals
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay_command import write_json
from moe_tools.report import read_environment
from moe_tools.server import run_async
from moe_tools.user_errors import report_user_errors
from rich.console import Console

from moe_lab.experts.group import MODEL, RunningGroup, plan_group, standing
from moe_lab.experts.recording import TOPICS
from moe_lab.experts.serve_report import build_document, describe, render_decisions, render_pairs
from moe_lab.experts.serving import ExpertServingEffort, ExpertServingResult, Start, measure
from moe_lab.experts.waves import WaveSettings, check_topic, prepare_waves

MOST_USERS = 128
"""The sample's `--max-num-seqs`, on both ranks: more would wait."""

_WIDTH = 160


@report_user_errors
def serve_command(
    model: Annotated[Path | None, typer.Argument(help=f"Folder of an MoE model; else {MODEL}.")] = None,
    topic: Annotated[str, typer.Option(help=f"Kind of text: {', '.join(TOPICS)}.")] = "prose",
    start: Annotated[Start, typer.Option(help="Where the experts are at first; crowded: the hottest on one rank.")] = (
        Start.INITIAL
    ),
    pairs: Annotated[int, typer.Option(min=1, max=100, help="Windows of each placement.")] = 8,
    window_s: Annotated[float, typer.Option("--window-s", min=1, max=600, help="Seconds of a window.")] = 10.0,
    active_s: Annotated[float, typer.Option("--active-s", min=0, max=3600, help="Seconds in the mode active.")] = 60.0,
    interval: Annotated[int, typer.Option(min=1, help="Steps between two decisions.")] = 300,
    window: Annotated[int, typer.Option(min=1, help="Steps of load that a decision looks at.")] = 300,
    users: Annotated[int, typer.Option(min=1, max=MOST_USERS, help="Requests in flight.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write raw rows and versions here.")] = None,
) -> None:
    """Measure steps of a real group before and after experts are moved, and what the mode active does by itself."""
    check_topic(topic)
    settings = WaveSettings(users=users, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    effort = ExpertServingEffort(pairs=pairs, window_s=window_s, active_s=active_s, start=start, seed=seed)
    environment = read_environment() | {"load_average": os.getloadavg()[0]}
    plan = plan_group(model, interval_steps=interval, window_steps=window)
    say = ProgressPrinter()

    async def work(group: RunningGroup) -> ExpertServingResult:
        load = await prepare_waves(plan.url, topic, settings, seed)
        return await measure(group, load, settings, effort, say)

    try:
        with stopped_by_signals(), standing(plan, say) as group:
            measured = run_async(work(group))
    except Failure as error:
        typer.echo("\n".join((str(error), *error.details)), err=True)
        raise typer.Exit(1) from None
    console = Console(width=_WIDTH)
    if measured.decisions:
        console.print(render_decisions(measured))
    if measured.pairs:
        console.print(render_pairs(measured))
    for line in describe(measured, environment):
        say.console.print(line, highlight=False, soft_wrap=True)
    if json_out:
        write_json(json_out, build_document(measured, settings, topic, effort, environment))

"""`python -m moe_lab.experts routed DATA`: placements under real routing, timed by measured kernels."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_tools.report import read_environment
from moe_tools.user_errors import report_user_errors
from rich.console import Console
from rich.table import Table

from moe_lab.experts.routed import EXPERTS, FLOOR, CopiesBound, RoutedRow, bound_copies, fit_kernels, run_all

_GPUS = ("h100", "h200")
_WIDTH = 200


@report_user_errors
def routed_command(
    data: Annotated[Path, typer.Argument(help="Folder with `routing` and `step_time`.")],
    gpu: Annotated[str, typer.Option(help="Whose kernels: h100 or h200.")] = "h200",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the group; they divide the 64 experts.")] = 8,
    redundant: Annotated[str, typer.Option(help="Slots beside one for each expert, by commas.")] = "0,8,16",
    rounds: Annotated[int, typer.Option(min=4, help="Rounds of 3,000 steps.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed in each round, of each size.")] = 8,
    move_s: Annotated[float, typer.Option(min=0.0, help="Seconds of one expert moved.")] = 8e-4,
    seed: Annotated[int, typer.Option(help="Seed of the steps' tokens.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rows and versions here.")] = None,
) -> None:
    """Time placements of real routing by measured kernels, in small and in large steps."""
    if gpu not in _GPUS:
        raise InvalidInput([unknown_choice("--gpu", gpu, _GPUS)])
    if EXPERTS % ranks:
        raise InvalidInput([InputError("--ranks", f"{ranks} does not divide the {EXPERTS} experts")])
    groups = _read_groups(redundant, ranks)
    kernels = fit_kernels(data, gpu)
    rows = list(run_all(data, gpu, ranks=ranks, redundant=groups, rounds=rounds, steps=steps, move_s=move_s, seed=seed))
    console = Console(width=_WIDTH)
    console.print(render_routed(rows))
    if bounds := bound_copies(rows):
        console.print(render_bounds(bounds, ranks))
    console.print(
        f"Modelled from {kernels.rows} measured rows of {gpu} (median error {kernels.median_error:.1%}); "
        f"{steps} steps a round and size, {rounds} rounds, seed {seed}"
    )
    if json_out is not None:
        document = {
            "environment": read_environment(),
            "kernels": asdict(kernels),
            "routed": [asdict(row) for row in rows],
        }
        json_out.write_text(json.dumps(document) + "\n", "utf-8")


def _read_groups(text: str, ranks: int) -> list[int]:
    try:
        groups = [int(word) for word in text.split(",")]
    except ValueError:
        raise InvalidInput([InputError("--redundant", f"{text!r} is no list of numbers such as 0,8,16")]) from None
    if any(count < 0 or count % ranks for count in groups):
        raise InvalidInput([InputError("--redundant", f"each must be a multiple of the {ranks} ranks")])
    return groups


def render_routed(rows: list[RoutedRow]) -> Table:
    """Against the best of the three others at each size, the better of the two balancers, and the floor."""
    table = Table(title=f"Time of the experts in a step, ms, {rows[0].ranks} ranks", title_justify="left")
    for heading in ("copies", "tokens", "steps", "static", "vLLM", "DeepSeek", "by tokens", "ours", "floor"):
        table.add_column(heading, justify="right")
    for heading in (
        "to the better balancer",
        "floor to it",
        "worst size, to the best",
        "moves: vLLM, DeepSeek, ours",
        "with moves",
    ):
        table.add_column(heading, justify="right")
    for key in dict.fromkeys((row.redundant, row.mix, row.run) for row in rows):
        same = {row.policy: row for row in rows if (row.redundant, row.mix, row.run) == key}
        ours, balancers = same["ours"], [same["vLLM"], same["DeepSeek, global"]]
        better = min(balancers, key=lambda row: row.step_ms)
        best = {size: min(row.by_size[size] for row in [same["static"], *balancers]) for size in ours.by_size}
        worst = max(ours.by_size, key=lambda size: ours.by_size[size] / best[size])
        table.add_row(
            *map(str, key),
            *(f"{row.step_ms:.3f}" for row in same.values()),
            f"{ours.step_ms / better.step_ms - 1:+.1%}",
            f"{same[FLOOR].step_ms / better.step_ms - 1:+.1%}",
            f"{ours.by_size[worst] / best[worst] - 1:+.1%} at {worst}",
            ", ".join(f"{row.moves:,}" for row in [*balancers, ours]),
            f"{ours.run_s / min(row.run_s for row in balancers) - 1:+.1%}",
        )
    return table


def render_bounds(bounds: list[CopiesBound], ranks: int) -> Table:
    """What the choice of copies by the size of a step could win at most."""
    table = Table(
        title="Each size as with its best policy: copies in no step, in all, by size; ms", title_justify="left"
    )
    for heading in ("copies", "tokens", "steps", "without", "with", "by size", "to the better of both"):
        table.add_column(heading, justify="right")
    for bound in bounds:
        table.add_row(
            str(bound.redundant),
            bound.mix,
            bound.run,
            *(f"{value:.3f}" for value in (bound.without_ms, bound.with_ms, bound.by_size_ms)),
            f"{bound.by_size_ms / min(bound.without_ms, bound.with_ms) - 1:+.1%}",
        )
    return table

"""`python -m moe_lab.experts`: the comparison and the replay, as tables and as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_scheduling.expert.decision import ExpertLoad, ExpertSettings
from moe_tools.report import read_environment
from moe_tools.user_errors import report_user_errors
from rich.console import Console

from moe_lab.experts.compare import COSTS, compare, render_compared
from moe_lab.experts.loads import DRIFTS, GroupSizes, make_sequence, read_sequence
from moe_lab.experts.overhead import measure_overhead, render_overhead
from moe_lab.experts.recording import SCENARIOS, record
from moe_lab.experts.replay import render_decided, render_replayed, replay
from moe_lab.experts.routed_command import routed_command
from moe_lab.experts.serve_command import serve_command

app = typer.Typer(no_args_is_help=True, add_completion=False)
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write rows and versions here.")]
_WIDTH = 200
_REPLAYED = GroupSizes(layers=8, experts=128, ranks=8, nodes=2, redundant=16)


@app.command("compare")
def compare_command(
    seeds: Annotated[int, typer.Option(min=1, help="Loads of each kind.")] = 3, json_out: JsonOut = None
) -> None:
    """Ask each policy once, on skewed loads of several sizes."""
    rows = list(compare(seeds))
    Console(width=_WIDTH).print(render_compared(rows))
    _write(json_out, {"compared": [asdict(row) for row in rows]})


@app.command("replay")
@report_user_errors
def replay_command(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of a made sequence.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the loads and of their noise.")] = 0,
    move_s: Annotated[float, typer.Option(help="Seconds of one expert moved.")] = COSTS.move_s,
    token_s: Annotated[float, typer.Option(help="Seconds of a rank's work on a token.")] = COSTS.token_s,
    recorded: Annotated[
        Path | None,
        typer.Option(
            help="npz with load[round, source, layer, expert], in tokens a step, and pairs if it has them, instead."
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="With --recorded: ranks of the group.")] = 2,
    nodes: Annotated[int, typer.Option(min=1, help="With --recorded: nodes of the group.")] = 1,
    redundant: Annotated[int, typer.Option(min=0, help="With --recorded: slots beside one for each expert.")] = 0,
    show_decisions: Annotated[bool, typer.Option("--decisions", help="List our decisions.")] = False,
    json_out: JsonOut = None,
) -> None:
    """Let each policy follow loads that change, and pay for what it moves."""
    costs, settings = replace(COSTS, move_s=move_s, token_s=token_s), ExpertSettings()
    scenarios: dict[str, Iterable[ExpertLoad]] = {}
    group = _REPLAYED
    if recorded is not None:
        loads = read_sequence(recorded)
        group = _group_of(loads[0], ranks, nodes, redundant)
        scenarios[recorded.stem] = loads
    else:
        scenarios = {name: make_sequence(name, group, rounds=rounds, seed=seed) for name in DRIFTS}
    rows, decided = [], []
    for name, sequence in scenarios.items():
        more, judged = replay(name, sequence, group, costs, settings, seed=seed, noise=recorded is None)
        rows += more
        decided += judged
    console = Console(width=_WIDTH)
    console.print(render_replayed(rows))
    if show_decisions:
        console.print(render_decided(decided))
    _write(json_out, {"replayed": [asdict(row) for row in rows], "decided": [asdict(row) for row in decided]})


@app.command("record")
@report_user_errors
def record_command(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, such as moeserving model tiny makes.")],
    out: Annotated[Path, typer.Argument(help="npz to write, for replay --recorded.")],
    scenario: Annotated[str, typer.Option(help="Which topics come when: " + ", ".join(SCENARIOS))] = "drift",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the sequence.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of which text is read in which round.")] = 0,
) -> None:
    """Record where a trained model routes texts of different topics, from two sources."""
    if scenario not in SCENARIOS:
        raise InvalidInput([unknown_choice("--scenario", scenario, SCENARIOS)])
    routed = record(model, scenario, rounds, seed)
    np.savez_compressed(out, load=routed.tokens, pairs=routed.pairs)
    load = routed.tokens
    shares = load.sum(axis=(0, 1))
    typer.echo(
        f"{out}: {load.shape}; hottest expert of a layer / mean: {(shares.max(axis=1) / shares.mean(axis=1)).round(2)}"
    )


app.command("serve")(serve_command)
app.command("routed")(routed_command)


@app.command("overhead")
def overhead_command(
    requests: Annotated[int, typer.Option(min=1, help="Decoding requests of each rank.")] = 64,
    passes: Annotated[int, typer.Option(min=1, help="Passes of a repetition; a decision comes each 3,000.")] = 6000,
    repetitions: Annotated[int, typer.Option(min=1, help="Measured repetitions.")] = 5,
    json_out: JsonOut = None,
) -> None:
    """Measure what the expert layer adds to a step in its default mode, at the shapes of two models."""
    shapes = ("h100-qwen3-30b-a3b", "h100-deepseek-v3")
    rows = [measure_overhead(name, requests=requests, passes=passes, repetitions=repetitions) for name in shapes]
    Console(width=_WIDTH).print(render_overhead(rows))
    _write(json_out, {"overhead": [asdict(row) for row in rows]})


def _group_of(load: ExpertLoad, ranks: int, nodes: int, redundant: int) -> GroupSizes:
    group = GroupSizes(layers=load.layers, experts=load.experts, ranks=ranks, nodes=nodes, redundant=redundant)
    if ranks % len(load.tokens):
        raise InvalidInput([InputError("--ranks", f"{len(load.tokens)} sources do not divide {ranks} ranks evenly")])
    try:
        assert group.start
    except ValueError as error:
        raise InvalidInput([InputError("--redundant", str(error))]) from None
    return group


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({"environment": read_environment()} | document, default=str) + "\n", "utf-8")


if __name__ == "__main__":
    app()

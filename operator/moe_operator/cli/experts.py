"""`moeserving experts`: shows the experts of a running deployment, plans and applies moves, rolls a move back.

As with a rebalance in Kafka's operators: plan, look, apply, and roll back if it did not help. With `--namespace` or
`--context` the deployment is in a cluster, else on this machine.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from moe_contract.experts_state import FIRST_PLACEMENT, AffinityPart, ExpertsState
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_scheduling.expert.decision import ExpertSettings, count_moves, plan_experts

from moe_operator.cli.output import (
    AsJson,
    Output,
    OutputFormat,
    choose_format,
    is_document,
    print_document,
    print_table,
)
from moe_operator.cli.place import (
    FAILED,
    INVALID,
    Context,
    Name,
    Namespace,
    StateDir,
    errors_shown,
    find_folder,
    require_name,
)
from moe_operator.cli.validate import one_line
from moe_operator.experts.calls import fetch_experts, fetch_settings, send_directive, wait_for_directive
from moe_operator.experts.files import ASSUMED_COSTS, find_placement, read_load_file
from moe_operator.experts.load import balance_of, read_load, read_placement
from moe_operator.experts.planned import decision_document, plan_document, render_decision
from moe_operator.experts.reach import Agent, Cluster, Reached, reach_cluster, reach_local
from moe_operator.local.failure import Failure

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_LOOK_EVERY_S = 0.25

EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="One engine of several, by its name in `show`.", show_default="all, or the only one"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.0, help="Seconds to wait until the engine has done it.")]


@app.callback()
def experts() -> None:
    """Show where the load of a running deployment's experts is; move them, and undo it."""


@app.command(short_help="Show the load by layer and rank, and the hottest experts.")
def show(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    engine: EngineName = None,
    output: Output = OutputFormat.TABLE,
    as_json: AsJson = False,
    png: Annotated[Path | None, typer.Option("--png", help="Also draw the load of one engine there.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the load of one engine there.")] = None,
    affinity: Annotated[
        bool,
        typer.Option("--affinity", help="Record which experts of neighbouring layers tokens take, and show it."),
    ] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.0, help="With --affinity: seconds to record.")] = 60.0,
) -> None:
    """Show the load of the experts by layer and rank, the hottest experts and the last decisions."""
    with errors_shown(), reach(name, state_dir, namespace, context) as reached:
        if affinity:
            _show_affinity(reached, engine, timeout)
            return
        documents = _choose(asyncio.run(fetch_experts(reached)), engine)
        for path, kind in ((png, "png"), (svg, "svg")):
            if path is not None:
                _draw(documents, path, kind)
        form = choose_format(output, as_json=as_json)
        if is_document(form):
            print_document({name: row.model_dump(mode="json") for name, row in documents.items()}, form)
        else:
            _print(documents)


@app.command(short_help="Show what moving experts would bring; touches nothing.")
def plan(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    engine: EngineName = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the plan there, for `experts apply`.")] = None,
    load: Annotated[
        Path | None,
        typer.Option("--load", help="npz file with load[source, layer, expert], in tokens a step; no engine is asked."),
    ] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="With --load: ranks of the group.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="With --load: nodes that they are on.")] = None,
    redundant: Annotated[
        int | None, typer.Option("--redundant", min=0, help="With --load: slots beside one for each expert.")
    ] = None,
    current: Annotated[
        Path | None,
        typer.Option("--current", help="With --load: JSON of the present placement.", show_default="vLLM's first"),
    ] = None,
) -> None:
    """Decide here, from the load of a running engine or of a file, what moving experts would bring; touches nothing."""
    if load is not None:
        running = {"NAME": name, "--state-dir": state_dir, "--namespace": namespace, "--context": context}
        with errors_shown():
            _refuse(running | {"--engine": engine}, "is of a running engine; leave it out with --load")
            if ranks is None:
                raise InvalidInput([InputError("--ranks", "is needed with --load")])
            _plan_file(load, current, {"ranks": ranks, "nodes": nodes or 1, "redundant": redundant or 0}, output)
        return
    with errors_shown():
        given = {"--ranks": ranks, "--nodes": nodes, "--redundant": redundant, "--current": current}
        _refuse(given, "needs --load; the group of a running engine is known")
    with errors_shown(), reach(name, state_dir, namespace, context) as reached:
        chosen, document = _only(asyncio.run(fetch_experts(reached)), engine)
        settings = asyncio.run(fetch_settings(_agent(reached, chosen)))
        started_s = time.perf_counter()
        decision = plan_document(document, settings)
        seconds = time.perf_counter() - started_s
        if output is not None:
            output.write_text(json.dumps(decision_document(decision, seconds)) + "\n", encoding="utf-8")
        typer.echo(f"{chosen}, load of the last {document.load.steps:.0f} steps:\n{render_decision(decision)}")


def _refuse(given: Mapping[str, object], message: str) -> None:
    errors = [InputError(name, message) for name, value in given.items() if value is not None]
    if errors:
        raise InvalidInput(errors)


def _plan_file(path: Path, current: Path | None, group: dict[str, int], output: Path | None) -> None:
    load = read_load_file(path)
    placement = find_placement(current, load, **group)
    started_s = time.perf_counter()
    decision = plan_experts(load, placement, ASSUMED_COSTS, ExpertSettings(), whole=True)
    seconds = time.perf_counter() - started_s
    if output is not None:
        output.write_text(json.dumps(decision_document(decision, seconds)) + "\n", encoding="utf-8")
    typer.echo(render_decision(decision))
    typer.echo(
        f"decided in {seconds * 1e3:.1f} ms, with the costs of DeepSeek-V3 on H100s; a running engine has its own"
    )


@app.command(short_help="Put experts where a plan or the engine says.")
def apply(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    engine: EngineName = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="File of `experts plan --json`.", show_default="what the engine would do itself"),
    ] = None,
    yes: Yes = False,
    timeout: Timeout = 60.0,
) -> None:
    """Put experts where a plan says, or where the engine's own last decision would put them."""
    with errors_shown(), reach(name, state_dir, namespace, context) as reached:
        chosen, document = _only(asyncio.run(fetch_experts(reached)), engine)
        slots = _planned(document) if plan_file is None else read_plan(plan_file)
        typer.echo(f"{chosen}: {describe_change(document, slots)}")
        _ask(yes)
        agent = _agent(reached, chosen)
        asyncio.run(_direct(reached, agent, {"action": "apply", "physical_to_logical": slots}, timeout))


@app.command()
def rollback(
    name: Name = None,
    state_dir: StateDir = None,
    namespace: Namespace = None,
    context: Context = None,
    engine: EngineName = None,
    yes: Yes = False,
    timeout: Timeout = 60.0,
) -> None:
    """Roll back the last move."""
    with errors_shown(), reach(name, state_dir, namespace, context) as reached:
        chosen, document = _only(asyncio.run(fetch_experts(reached, brief=True)), engine)
        if document.placement.version <= FIRST_PLACEMENT:
            raise Failure(f"{chosen}: nothing was moved since the engine's start, so there is nothing to roll back")
        typer.echo(f"{chosen}: back to the placement before {document.placement.version}")
        _ask(yes)
        asyncio.run(_direct(reached, _agent(reached, chosen), {"action": "rollback"}, timeout))


@contextmanager
def reach(name: str | None, state_dir: Path | None, namespace: str | None, context: str | None) -> Iterator[Reached]:
    """Yields the agents of a deployment on this machine or in a cluster."""
    if namespace is None and context is None:
        yield reach_local(find_folder(name, state_dir, in_cluster=True))
        return
    with reach_cluster(require_name(name), Cluster(namespace=namespace, context=context)) as reached:
        yield reached


def describe_change(document: ExpertsState, rows: Any) -> str:
    """Returns a sentence about what a placement changes. Pure.

    Raises:
        InvalidInput: the group cannot have it.
    """
    after = read_placement(rows, document)
    if after is None:
        sizes = f"{document.layers} layers of {document.ranks * document.slots_per_rank} slots"
        message = f"{sizes} are needed, in each every expert from 0 to {document.experts - 1}"
        raise InvalidInput([InputError("physical_to_logical", message)])
    before = read_placement(document.placement.physical_to_logical, document)
    if before is None:
        raise Failure("the agent does not say where the experts are")
    words = f"{count_moves(before, after).sum()} experts move"
    if (load := read_load(document)) is None:
        return f"{words}; its gain is not known, no load is recorded"
    old, new = (balance_of(load, placement) for placement in (before, after))
    return f"{words}, balance {old:.2f} -> {new:.2f} under the load of the last {document.load.steps:.0f} steps"


def read_plan(path: Path) -> list[list[int]]:
    """Returns the placement in a file of `experts plan --json`.

    Raises:
        InvalidInput: the file cannot be read, or has none.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(
            [InputError(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}")]
        ) from None
    except ValueError as error:
        raise InvalidInput([InputError(str(path), f"is not JSON: {error}")]) from None
    slots = document.get("physical_to_logical") if isinstance(document, dict) else None
    if not isinstance(slots, list):
        raise InvalidInput(
            [InputError(str(path), "has no physical_to_logical; `moeserving experts plan --json` writes it")]
        )
    return slots


def _show_affinity(reached: Reached, engine: str | None, timeout_s: float) -> None:
    """Has one engine record the inter-layer affinity, and shows it.

    Raises:
        Failure: the engine refuses, or has recorded nothing within the time.
    """
    from moe_operator.experts.heat import render_affinity

    chosen, _ = _only(asyncio.run(fetch_experts(reached, brief=True)), engine)
    agent = _agent(reached, chosen)
    version = asyncio.run(send_directive(agent, reached.tokens, {"action": "affinity"}))
    found = asyncio.run(_record_affinity(reached, chosen, version, timeout_s))
    if found is None or not found.passes:
        raise Failure(
            f"{chosen}: no pass was recorded within {timeout_s:g} s. An engine without requests makes none; on a GPU "
            "only passes outside CUDA graphs count, which are those with more tokens than the largest captured batch "
            "(long prompts)"
        )
    if found.passes < found.wanted_passes:
        typer.echo(f"{chosen}: {found.passes} of {found.wanted_passes} passes were recorded within {timeout_s:g} s")
    print_table(render_affinity(chosen, found))


async def _record_affinity(reached: Reached, engine: str, version: int, timeout_s: float) -> AffinityPart | None:
    """Waits until the affinity that a directive asked for is complete or the time is over, and returns it."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        found = (await fetch_experts(reached, brief=True))[engine].affinity
        found = None if found is None or found.directive < version else found
        if (found is not None and found.passes >= found.wanted_passes) or time.monotonic() >= give_up_s:
            return found
        await asyncio.sleep(_LOOK_EVERY_S)


def _planned(document: ExpertsState) -> list[list[int]]:
    newest = document.newest
    if newest is None or newest.physical_to_logical is None:
        how = "make one with `moeserving experts plan NAME --json FILE` and name it with --plan"
        raise Failure(f"the engine has no plan of its own at the moment; {how}")
    return [list(row) for row in newest.physical_to_logical]


def _choose(documents: dict[str, ExpertsState], engine: str | None) -> dict[str, ExpertsState]:
    if engine is None:
        return documents
    if engine not in documents:
        raise InvalidInput([unknown_choice("--engine", engine, documents)])
    return {engine: documents[engine]}


def _only(documents: dict[str, ExpertsState], engine: str | None) -> tuple[str, ExpertsState]:
    chosen = _choose(documents, engine)
    if len(chosen) > 1:
        raise InvalidInput([InputError("--engine", f"name one; known: {', '.join(chosen)}")])
    return next(iter(chosen.items()))


def _agent(reached: Reached, engine: str) -> Agent:
    return next(agent for agent in reached.agents if agent.engine == engine)


def _ask(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidInput([InputError("--yes", "is needed where nobody can be asked; nothing was changed")])
    if not typer.confirm("Move them now?"):
        typer.echo("nothing was changed")
        raise typer.Exit(INVALID)


async def _direct(reached: Reached, agent: Agent, body: dict[str, Any], timeout_s: float) -> None:
    """Sends a directive, waits for it and prints its result."""
    version = await send_directive(agent, reached.tokens, body)
    document = await wait_for_directive(agent, version, timeout_s)
    if document is None:
        typer.echo(
            f"{agent.engine}: taken as directive {version}, not carried out within {timeout_s:g} s; an engine without "
            "requests makes no steps and moves nothing"
        )
        raise typer.Exit(FAILED)
    newest = document.newest
    result = "" if newest is None else f": {newest.outcome}" + (f" ({newest.reason})" if newest.reason else "")
    typer.echo(one_line(f"{agent.engine}: placement {document.placement.version}{result}"))
    if newest is not None and newest.outcome == "failed":
        raise typer.Exit(FAILED)


def _draw(documents: dict[str, ExpertsState], path: Path, kind: str) -> None:
    from moe_operator.experts.picture import draw_experts

    engine, document = _only(documents, None)
    draw_experts(engine, document, path, kind)


def _print(documents: dict[str, ExpertsState]) -> None:
    from moe_operator.experts.heat import render_experts

    print_table(*(render_experts(engine, document) for engine, document in documents.items()))

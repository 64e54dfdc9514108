"""`moeserving plan --advise`: hands over to the shape advisor of the tools, which the operator does not import."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.cli.rooms import GROUP, explain_missing

ENTRY, COMMAND, NAME = "bench", "advise", "plan --advise"
Advise = Annotated[
    bool, typer.Option("--advise", help="Simulate the shapes that fit the file's GPUs, and show them side by side.")
]
Trace = Annotated[
    Path | None, typer.Option(help="With --advise: trace file of the requests.", show_default="a generated shape")
]
TraceFormat = Annotated[
    str | None, typer.Option("--format", help="With --advise: azure, mooncake or jsonl.", show_default="by its lines")
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="With --advise: random, central, descending, twoEnd or average prompt lengths.", show_default="random"
    ),
]
Rate = Annotated[float | None, typer.Option(help="With --advise: requests a second.", show_default="the trace's own")]
Requests = Annotated[
    int | None, typer.Option(help="With --advise: requests that each shape serves.", show_default="300")
]
AnswerTokens = Annotated[
    int | None, typer.Option(min=1, help="With --advise: median answer of a generated shape.", show_default="64")
]
Cost = Annotated[str | None, typer.Option(help="With --advise: preset of step times.", show_default="by the model")]
Ttft = Annotated[
    float | None,
    typer.Option(help="With --advise: bound of a good request's TTFT (s).", show_default="the file's target, or 2"),
]
InterToken = Annotated[
    float | None,
    typer.Option(
        help="With --advise: bound of its time between tokens (s).", show_default="the file's target, or 0.05"
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="With --advise: seed of the shape.", show_default="0")]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="With --advise: table or json.", show_default="table")
]


def advise(file: Path, options: Mapping[str, Any]) -> None:
    """Runs the advisor on a resource.

    Args:
        file: of the resource.
        options: of the advisor by their names on the command line; None: its default.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == ENTRY]
    if not found:
        explain_missing(NAME, None)
    try:
        command = getattr(typer.main.get_command(found[0].load()), "commands", {})[COMMAND]
        words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        status = command.main(["-f", str(file), *words], prog_name="moeserving plan --advise", standalone_mode=False)
        if status:
            raise typer.Exit(status)
    except ModuleNotFoundError as error:
        explain_missing(NAME, error)


def name_options(**values: Any) -> Mapping[str, Any]:
    """Returns values by the names of their options on the command line."""
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuses options of the advisor where there is no `--advise`.

    Raises:
        InvalidInput: one is given.
    """
    if given := [InputError(name, "is only with --advise") for name, value in options.items() if value is not None]:
        raise InvalidInput(given)

"""Commands that only read: `validate` and `crd`. The command line registers these functions.

Errors in a file go to stderr, one line each, and the status is 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.input_errors import InvalidInput

from moe_operator.api import load_document, parse_resource_of
from moe_operator.api.crd import render_crd
from moe_operator.api.refused_nulls import find_refused_nulls
from moe_operator.plan import Defaults, Observed, plan_cluster
from moe_operator.plan.ignored import find_nulls, find_short_graces

INVALID = 2

File = Annotated[Path, typer.Option("--file", "-f", help="YAML file of a MoEServing.", show_default=False)]


def validate(file: File) -> None:
    """Check a file: status 0 when it is valid, 2 with one line per error when not.

    What only a plan for a cluster shows is checked too, such as a volume that clashes with one of the operator's own.
    What is valid here and changes on its way into a cluster is a note on stderr.
    """
    with input_errors_shown():
        document = load_document(file)
        resource = parse_resource_of(file, document)
        plan_cluster(resource, "default", Observed(tokens=("",)), Defaults())
        refused = find_refused_nulls(document)
    for path in refused:
        advice = "a null is refused by `kubectl apply --server-side`, which Flux uses; leave the field out"
        typer.echo(one_line(f"note: {path}: {advice}"), err=True)
    for path in find_nulls(resource):
        advice = "a null reaches the cluster with `kubectl apply --server-side` alone; `$patch: delete` always does"
        typer.echo(one_line(f"note: {path}: {advice}"), err=True)
    for path, text in find_short_graces(resource):
        typer.echo(one_line(f"note: {path}: {text}"), err=True)
    typer.echo(f"{one_line(str(file))}: valid")


def crd() -> None:
    """Print the CustomResourceDefinition of MoEServing."""
    typer.echo(render_crd(), nl=False)


@contextmanager
def input_errors_shown() -> Iterator[None]:
    """Turns invalid input into one line per error on stderr and status 2."""
    try:
        yield
    except InvalidInput as error:
        for row in error.errors:
            typer.echo(one_line(str(row)), err=True)
        raise typer.Exit(INVALID) from None


def one_line(text: str) -> str:
    """The text with what would break or hide a line of a terminal written out (`\\n`, `\\x1b`)."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

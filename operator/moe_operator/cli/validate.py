"""Commands that only read: `validate`, `plan` and `crd`. The command line registers these functions.

What is wrong with a file goes to stderr, one line per error, and the status is 2.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer
import yaml
from moe_scheduling.problems import InvalidInput

from moe_operator.api import load_resource
from moe_operator.api.crd import render_crd
from moe_operator.plan import LocalPlan, LocalSite, plan_local, ports_needed

INVALID = 2
FIRST_SHOWN_PORT = 8000

File = Annotated[Path, typer.Option("--file", "-f", help="YAML file of a MoEServing.", show_default=False)]


def validate(file: File) -> None:
    """Check a file: status 0 when it is valid, 2 with one line per error when not."""
    with problems_shown():
        load_resource(file)
    typer.echo(f"{one_line(str(file))}: valid")


def plan(
    file: File,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of the machine.", show_default="this one's")] = None,
    gpus: Annotated[int, typer.Option(min=0, max=4096, help="GPUs of the machine.")] = 0,
) -> None:
    """Show which agents and which gateway a file would start on a machine, without starting anything."""
    with problems_shown():
        resource = load_resource(file)
        site = LocalSite(
            state_dir=Path("STATE_DIR"),
            token_file=Path("STATE_DIR/token"),
            ports=tuple(range(FIRST_SHOWN_PORT, FIRST_SHOWN_PORT + ports_needed(resource))),
            cpus=cpus or len(os.sched_getaffinity(0)),
            memory_bytes=psutil.virtual_memory().total,
            gpus=tuple(str(index) for index in range(gpus)),
        )
        wanted = plan_local(resource, site)
    typer.echo("# Ports and the state folder are chosen at the start; those shown are examples.")
    typer.echo(render_plan(wanted), nl=False)


def crd() -> None:
    """Print the CustomResourceDefinition of MoEServing."""
    typer.echo(render_crd(), nl=False)


def render_plan(wanted: LocalPlan) -> str:
    """The YAML of a plan, as the configuration files would hold it."""
    document = {
        "agents": [agent.model_dump(mode="json") for agent in wanted.agents],
        "gateway": wanted.gateway.model_dump(mode="json"),
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


@contextmanager
def problems_shown() -> Iterator[None]:
    """Turns invalid input into one line per error on stderr and status 2."""
    try:
        yield
    except InvalidInput as error:
        for problem in error.problems:
            typer.echo(one_line(str(problem)), err=True)
        raise typer.Exit(INVALID) from None


def one_line(text: str) -> str:
    """The text with what would break or hide a line of a terminal written out (`\\n`, `\\x1b`)."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

"""The one command `moeserving`."""

from typing import Annotated

import typer

from moe_operator.cli.rooms import Commands
from moe_operator.cli.version import show_version

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve Mixture-of-Experts models from one YAML.",
)


@app.callback()
def moeserving(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the versions, vLLM's too.")
    ] = False,
) -> None:
    """All commands are in the group's own table."""

"""The one command `moeserving`."""

import typer

from moe_operator.cli.rooms import Commands

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
def moeserving() -> None:
    """All commands are in the group's own table."""

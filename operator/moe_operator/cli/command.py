"""The one command `moeserving`: the operator's commands, and by name those of the other rooms."""

from collections.abc import Callable

import typer

from moe_operator.cli.rooms import Commands
from moe_operator.cli.running import down, logs, set_fields, status
from moe_operator.cli.up import up
from moe_operator.cli.validate import crd, plan, validate

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serve Mixture-of-Experts models from one YAML.",
)
COMMANDS: dict[str, Callable[..., None]] = {
    "up": up,
    "down": down,
    "status": status,
    "logs": logs,
    "set": set_fields,
    "validate": validate,
    "plan": plan,
    "crd": crd,
}
for name, function in COMMANDS.items():
    app.command(name)(function)

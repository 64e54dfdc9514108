"""Commands of the other rooms, which the operator does not import: found through an entry point when one is called.

Their names and words stand here, so that `--help` is quick and a command whose extra is not installed can say so.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "moeserving.commands"


@dataclass(frozen=True, slots=True)
class Room:
    """Where a command comes from: entry point, the extra that it needs, its help in a line."""

    entry: str
    extra: str
    help: str


ROOMS = {
    "model": Room("bench", "bench", "Models made on this machine."),
    "replay": Room("bench", "bench", "Replay a trace and report what users got."),
    "compare": Room("bench", "bench", "Compare policies on a running deployment."),
    "demo": Room("bench", "bench", "Make a small model, serve it, chat, and compare."),
    "agent": Room("agent", "agent", "Run one engine and its node agent (`up` does)."),
    "gateway": Room("gateway", "gateway", "Run a gateway in front of engines (`up` does)."),
}


class Commands(TyperGroup):
    """The operator's own commands, and those of the other rooms."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return [*super().list_commands(ctx), *ROOMS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command for the help page: of another room only its name and words."""
        if cmd_name in ROOMS:
            return TyperCommand(name=cmd_name, help=ROOMS[cmd_name].help)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command that is about to run."""
        if args and args[0] in ROOMS:
            return args[0], load_command(args[0]), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs; a package that is missing is named together with the extra that has it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            room = ROOMS.get(ctx.invoked_subcommand or "")
            explain_missing(ctx.invoked_subcommand or "", room.extra if room else "operator", error)


def load_command(name: str) -> Any:
    """The command of another room."""
    room = ROOMS[name]
    found = [entry for entry in entry_points(group=GROUP) if entry.name == room.entry]
    if not found:
        explain_missing(name, room.extra, None)
    try:
        command = typer.main.get_command(found[0].load())
    except ModuleNotFoundError as error:
        explain_missing(name, room.extra, error)
    commands = getattr(command, "commands", {})
    return commands.get(name, command)


def explain_missing(name: str, extra: str, error: ModuleNotFoundError | None) -> Any:
    """Ends with the extra to install."""
    package = f"the package {error.name}" if error is not None and error.name else "a part"
    typer.echo(f"moeserving {name}: {package} is missing: pip install 'moeserving[{extra}]'", err=True)
    sys.exit(1)

"""All commands by name and words; what one needs is imported when it is called.

So `--help` is quick, and a command whose extra is not installed says so while the others work. Those of the other
rooms, which the operator does not import, are found through an entry point.
"""

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

GROUP = "moeserving.commands"


@dataclass(frozen=True, slots=True)
class Own:
    """A command of the operator: module and name of its function or of its group of commands, its help in a line."""

    module: str
    function: str
    help: str


@dataclass(frozen=True, slots=True)
class Room:
    """Where a command comes from: entry point, the extra that it needs, its help in a line."""

    entry: str
    extra: str
    help: str


OWN = {
    "up": Own("up", "up", "Serve a file on this machine until Ctrl-C (or `down`)."),
    "down": Own("running", "down", "Stop a deployment once its streams have ended."),
    "status": Own("running", "status", "Show engines, policies in force, restarts."),
    "logs": Own("running", "logs", "Show logs, also of a deployment that has stopped."),
    "top": Own("top", "top", "Show engines, queue, times and rates, live."),
    "roles": Own("roles", "roles", "Show which engines compute prompts and which answers."),
    "drain": Own("drain", "drain", "Empty one engine without losing a stream, or undo it."),
    "explain": Own("explain", "explain", "Show why a request waited, and why at its engine."),
    "ui": Own("ui", "ui", "Open the live page of a deployment in the browser."),
    "doctor": Own("doctor", "doctor", "Look for problems of a cluster or machine; say what to do."),
    "set": Own("running", "set_fields", "Change policies of a running deployment."),
    "experts": Own("experts", "app", "Show where the load of experts is; move them, and undo it."),
    "validate": Own("validate", "validate", "Check a file: status 0 when it is valid, else 2."),
    "plan": Own("plan", "plan", "Show what a file would make in a cluster or on a machine."),
    "completion": Own("completion", "completion", "Print a script with which a shell completes this command."),
    "operator": Own("operator", "operator", "Make the MoEServings of a cluster real."),
    "crd": Own("validate", "crd", "Print the CustomResourceDefinition of MoEServing."),
}
ROOMS = {
    "model": Room("bench", "bench", "Models made on this machine."),
    "replay": Room("bench", "bench", "Replay a trace and report what users got."),
    "compare": Room("bench", "bench", "Compare policies on a running deployment."),
    "demo": Room("bench", "bench", "Make a small model, serve it, chat, and compare."),
    "simulate": Room("bench", "bench", "Serve a scenario on real schedulers in virtual time."),
    "calibrate": Room("bench", "bench", "Fit the step time of a real engine on this machine."),
    "agent": Room("agent", "agent", "Run one engine and its node agent (`up` does)."),
    "gateway": Room("gateway", "gateway", "Run a gateway in front of engines (`up` does)."),
    "epp": Room("epp", "epp", "Pick engines for another proxy, such as Envoy (ext-proc)."),
}
# Extras of what a command of the operator hands over to.
_EXTRAS = {"plan --advise": "bench"}


# What is done in a cluster in place of a command that is for one machine.
_IN_A_CLUSTER = {
    "up": "`kubectl apply -f FILE`",
    "down": "`kubectl delete moes NAME`",
    "status": "`kubectl describe moes NAME`, or `kubectl moeserving top NAME -n NAMESPACE`",
    "logs": "`kubectl logs POD`",
    "set": "`kubectl patch moes NAME --type=merge -p PATCH`",
}
_OF_A_CLUSTER = frozenset(("-n", "--namespace", "--context"))


class Commands(TyperGroup):
    """The group of all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, those of other rooms included."""
        return [*OWN, *ROOMS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command for the help text, with its name and summary alone."""
        command = OWN.get(cmd_name) or ROOMS.get(cmd_name)
        return TyperCommand(name=cmd_name, help=command.help) if command else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """A command that is about to run."""
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            ctx.fail(_describe_unknown(args[0], self.list_commands(ctx)))
        name, shown, rest = super().resolve_command(ctx, args)
        command = load_command(name) if name else shown
        if name in _IN_A_CLUSTER:
            _refuse_a_cluster(name, command, rest)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Runs; a package that is missing is named together with the extra that has it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            explain_missing(ctx.invoked_subcommand or "", error)


def _describe_unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name[:100], known, n=1)
    nearest = f" Did you mean {near[0]}?" if near else ""
    return f"No such command {name!r:.80}.{nearest} Known: {', '.join(known)}."


def _refuse_a_cluster(name: str, command: Any, words: list[str]) -> None:
    """Ends with the command for a cluster where one for this machine is given an option that others have for it."""
    own = {option for parameter in command.params for option in parameter.opts}
    if any(word.partition("=")[0] in _OF_A_CLUSTER - own for word in words):
        typer.echo(f"moeserving {name} is for this machine; in a cluster: {_IN_A_CLUSTER[name]}", err=True)
        sys.exit(2)


def load_command(name: str) -> Any:
    """The command itself, with its options."""
    try:
        return _load_own(name, OWN[name]) if name in OWN else _load_other(name, ROOMS[name])
    except ModuleNotFoundError as error:
        explain_missing(name, error)


def _load_own(name: str, own: Own) -> Any:
    function = getattr(import_module(f"moe_operator.cli.{own.module}"), own.function)
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name)(function)
    return typer.main.get_command(app)


def _load_other(name: str, room: Room) -> Any:
    found = [entry for entry in entry_points(group=GROUP) if entry.name == room.entry]
    if not found:
        explain_missing(name, None)
    command = typer.main.get_command(found[0].load())
    return getattr(command, "commands", {}).get(name, command)


def explain_missing(name: str, error: ModuleNotFoundError | None) -> NoReturn:
    """Ends with the extra to install."""
    extra = ROOMS[name].extra if name in ROOMS else _EXTRAS.get(name, "operator")
    package = f"the package {error.name}" if error is not None and error.name else "a part"
    typer.echo(f"moeserving {name}: {package} is missing: pip install 'moeserving[{extra}]'", err=True)
    sys.exit(1)

"""What the commands on a deployment share: its options, which one is meant, and errors in single lines."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api import MoEServing
from moe_operator.cli.completion import complete_names
from moe_operator.cli.validate import INVALID, input_errors_shown, one_line
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, default_state_dir, known_names
from moe_operator.plan.ignored import find_idle

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Folder of all deployments.", show_default="$XDG_STATE_HOME/moeserving"),
]
Name = Annotated[
    str | None,
    typer.Argument(
        help="Name of the deployment; may be left out while there is one.",
        show_default=False,
        autocompletion=complete_names,
    ),
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace of a deployment in a cluster.", show_default=False)
]
Context = Annotated[
    str | None,
    typer.Option("--context", help="Context of kubectl; the deployment is in a cluster.", show_default=False),
]


def root_of(state_dir: Path | None) -> Path:
    """The folder of all deployments, absolute: processes with other working folders use it."""
    return (state_dir or default_state_dir()).absolute()


def find_folder(name: str | None, state_dir: Path | None, *, stopped: bool = False, in_cluster: bool = False) -> Folder:
    """The deployment that is meant.

    Args:
        name: as it was given.
        state_dir: as it was given.
        stopped: whether one that has stopped is meant as well.
        in_cluster: whether the command can also look into a cluster, which an error then says.

    Raises:
        InvalidInput: there is none, or several and none is named.
    """
    root = root_of(state_dir)
    known = known_names(root, stopped=stopped)
    if name is None and len(known) == 1:
        return Folder(root=root, name=known[0])
    if name is not None and name in known:
        return Folder(root=root, name=name)
    elsewhere = "; for one in a cluster add --namespace" if in_cluster else ""
    if not known:
        message = f"no deployment runs on this machine; `moeserving up -f FILE` starts one (looked in {root})"
    elif name is None:
        message = f"several deployments run on this machine, name one; known: {', '.join(known)}"
    else:
        message = f"no deployment {name!r} on this machine; known: {', '.join(known)}"
    raise InvalidInput([InputError("NAME", message + elsewhere)])


def require_name(name: str | None) -> str:
    """The name of a deployment in a cluster.

    Raises:
        InvalidInput: none is named.
    """
    if name is None:
        raise InvalidInput([InputError("NAME", "name the deployment; `kubectl get moes` lists them")])
    return name


@contextmanager
def errors_shown() -> Iterator[None]:
    """Prints each error as a line and exits with 2 for wrong input, with 1 for a failure."""
    try:
        with input_errors_shown():
            yield
    except Failure as failure:
        show_failure(failure)
        raise typer.Exit(FAILED) from None
    except BrokenPipeError:  # as in `logs | head`; buffered output would raise once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(one_line(f"{where}{(error.strerror or str(error)).lower()}"), err=True)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def tell_idle(resource: MoEServing) -> None:
    """Names settings of experts that mean nothing, since no experts are spread."""
    for path in find_idle(resource):
        typer.echo(f"{path}: without effect without spec.engine.parallelism.expert", err=True)


def show_failure(failure: Failure) -> None:
    """The line, then the log's."""
    typer.echo(one_line(str(failure)), err=True)
    for line in failure.details:
        typer.echo(f"  | {one_line(line)}", err=True)


__all__ = [
    "FAILED",
    "INTERRUPTED",
    "INVALID",
    "Context",
    "Name",
    "Namespace",
    "StateDir",
    "errors_shown",
    "find_folder",
    "require_name",
    "root_of",
    "show_failure",
    "tell_idle",
]

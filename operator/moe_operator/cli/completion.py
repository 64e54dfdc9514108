"""Shell completion: `moeserving completion SHELL`, `kubectl_complete-moeserving` and names of deployments."""

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from moe_operator.cli import COMPLETE_VARIABLE, PROGRAM

# kubectl then completes names of files where no word fits.
_FILES_ELSE = ":0"
_ANSWER_TIMEOUT_S = 15.0


class Shell(StrEnum):
    """The shells for which there is completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="The shell that reads the script.")]) -> None:
    """Print a script for a shell that completes `moeserving`; `kubectl moeserving` needs none."""
    from moe_operator.cli.command import app

    know_shells()
    # The same way as a shell takes: typer prints the script and ends.
    os.environ[COMPLETE_VARIABLE] = f"source_{shell.value}"
    app(prog_name=PROGRAM)


def know_shells() -> None:
    """Has typer know the shells, which it else does for a group with its own options for completion alone."""
    from typer.completion import get_completion_inspect_parameters

    get_completion_inspect_parameters()


def complete_for_kubectl() -> None:
    """Entry point of `kubectl_complete-moeserving`, which kubectl calls with the words behind `kubectl moeserving`.

    The last word is the one to be completed. A line for each completion, then kubectl's directive.
    """
    from moe_operator.cli.command import app

    words = [PROGRAM, *(sys.argv[1:] or [""])]
    os.environ |= {
        "COMP_WORDS": shlex.join(words),
        "COMP_CWORD": str(len(words) - 1),
        COMPLETE_VARIABLE: "complete_bash",
    }
    know_shells()
    found = io.StringIO()
    with contextlib.redirect_stdout(found), contextlib.suppress(SystemExit):
        app(prog_name=PROGRAM)
    # Where nothing fits, an empty line would be a word for kubectl.
    print(*found.getvalue().split("\n")[:-1] if found.getvalue().strip() else (), _FILES_ELSE, sep="\n")


def complete_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The deployments on this machine, or those of a cluster where `--namespace` or `--context` stands before."""
    given = ctx.params
    if given.get("namespace") is None and given.get("context") is None:
        from moe_operator.cli.place import root_of
        from moe_operator.local.folder import known_names

        found: Sequence[str] = known_names(root_of(given.get("state_dir")))
    else:
        found = _fetch_names(given)
    return [name for name in found if name.startswith(incomplete)]


def _fetch_names(given: dict[str, Any]) -> list[str]:
    """What kubectl lists; nothing where it fails, for a completion has no place for errors."""
    from moe_operator.api.crd import GROUP, PLURAL
    from moe_operator.experts.reach import Cluster

    cluster = Cluster(namespace=given.get("namespace"), context=given.get("context"))
    command = cluster.command("get", f"{PLURAL}.{GROUP}", "--output", "name")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rpartition("/")[2] for line in done.stdout.split()]

"""Shell completion: `moeserving completion SHELL`, `kubectl_complete-moeserving` and names of deployments."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from moe_operator.cli import COMPLETE_VARIABLE, PROGRAM

# kubectl then completes names of files where no word fits.
_FILES_ELSE = ":0"
# Whoever presses Tab waits for it.
_ANSWER_TIMEOUT_S = 3.0


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

        found: Sequence[str] = []
        with contextlib.suppress(OSError, RuntimeError):  # a folder that is not readable, a user without a home
            found = known_names(root_of(given.get("state_dir")))
    else:
        found = _fetch_names(given)
    return [name for name in found if name.startswith(incomplete)]


def _fetch_names(given: dict[str, Any]) -> list[str]:
    """What kubectl lists; nothing where it fails, for a completion has no place for errors."""
    from moe_operator.api.crd import GROUP, PLURAL
    from moe_operator.experts.reach import Cluster

    cluster = Cluster(namespace=given.get("namespace"), context=given.get("context"))
    command = cluster.command("get", f"{PLURAL}.{GROUP}", "--output", "name")
    text = _run_briefly(command)
    return [line.rpartition("/")[2] for line in text.split()]


def _run_briefly(command: Sequence[str]) -> str:
    """What a command prints; nothing where it fails or takes long. What it started ends with it.

    kubectl starts programs that log in, which would hold its output open, or ask at the terminal.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    except OSError:
        return ""
    with process:
        try:
            printed, _ = process.communicate(timeout=_ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return printed if process.returncode == 0 else ""

"""The command `moeserving`, which is also a plugin of kubectl."""

import io
import os
import sys
from pathlib import Path

PROGRAM, PLUGIN = "moeserving", "kubectl-moeserving"
# A shell that completes a line starts the program with this variable.
COMPLETE_VARIABLE = "_MOESERVING_COMPLETE"


def main() -> None:
    """Entry point of the commands `moeserving` and `kubectl-moeserving`."""
    try:
        from moe_operator.cli.command import app
    except ModuleNotFoundError as error:
        sys.exit(f"moeserving: the package {error.name} is missing: pip install 'moeserving[operator]'")
    if COMPLETE_VARIABLE in os.environ:
        from moe_operator.cli.completion import know_shells

        know_shells()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows `?` for a letter that it lacks.
            stream.reconfigure(errors="replace")
    app(prog_name=name_program(sys.argv[0]))


def name_program(path: str) -> str:
    """The name in help texts of the program that was started: as kubectl's user calls the plugin, else `moeserving`."""
    return f"kubectl {PROGRAM}" if Path(path).stem == PLUGIN else PROGRAM

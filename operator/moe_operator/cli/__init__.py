"""The command `moeserving`, which is also a plugin of kubectl."""

import errno
import io
import os
import sys
from pathlib import Path

_OUTPUT_FULL = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)
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
    _open_closed_outputs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows `?` for a letter that it lacks.
            stream.reconfigure(errors="replace")
    try:
        app(prog_name=name_program(sys.argv[0]))
    except OSError as error:
        if error.errno not in _OUTPUT_FULL:
            raise
        sys.exit(f"moeserving: the output cannot be written: {(error.strerror or str(error)).lower()}")


def _open_closed_outputs() -> None:
    """Gives a program whose output a shell has closed (`>&-`) one that takes all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115


def name_program(path: str) -> str:
    """The name in help texts of the program that was started: as kubectl's user calls the plugin, else `moeserving`."""
    return f"kubectl {PROGRAM}" if Path(path).stem == PLUGIN else PROGRAM

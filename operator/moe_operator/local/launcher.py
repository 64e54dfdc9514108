"""`python -I -S launcher.py PARENT COMMAND...`: becomes the command, which is asked to end when its parent ends.

The supervisor and its processes are started through it, so that nothing goes on without an owner, however that one
ends. It runs as a file of its own, and not as a hook between fork and exec, which is unsafe beside threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ties itself to its parent, then becomes the command; both outlive the exec."""
    parent, *command = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the tie was made
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Runs the engine as a child that cannot outlive the agent: `python launcher.py COMMAND...`, started by the supervisor.

Standard library alone, run as a file, so that it starts in milliseconds and holds no memory worth mention. It leads a
process group of its own, in which the engine and all its workers live.

Contract: standard input is a pipe whose other end only the agent holds; when it ends, the agent is gone and the whole
group is killed. SIGTERM goes on to the engine alone, which then drains its own workers. The exit status is the engine's
(128 + signal when a signal ended it); what a crashed engine leaves of the group is the supervisor's to kill, by the
group's id, which is the launcher's process id.
"""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType


def main(command: list[str]) -> None:
    """Runs `command` and never returns."""
    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def forward(number: int, frame: FrameType | None) -> None:
        engine.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_agent, daemon=True).start()
    status = engine.wait()
    # Not sys.exit: the interpreter would wait for the thread's lock on standard input.
    os._exit(status if status >= 0 else 128 - status)


def _wait_for_agent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])

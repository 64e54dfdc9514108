"""Processes of a test cluster, for the cluster modules.

Each carries its state folder and its part in its environment, so that a later command finds all of them,
also when the one that started them was killed before it could write anything down.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from cluster_problem import ClusterProblem

CLUSTER = "MOESERVING_TEST_CLUSTER"
PART = "MOESERVING_TEST_CLUSTER_PART"
LOG_TAIL_CHARACTERS = 2000
# While a process takes on a program that comes from a slow disk, its environment reads as empty.
EXEC_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Parts of the cluster in `state_dir`; `tied` ones end with the process that starts them, however it ends."""

    state_dir: Path
    tied: bool = False

    def log(self, part: str) -> Path:
        return self.state_dir / "log" / f"{part}.log"

    def start(self, part: str, command: Sequence[str | Path]) -> None:
        """Starts a part in a session of its own; its output goes to its log."""
        words = [str(word) for word in command]
        if self.tied:
            words = ["setpriv", "--pdeathsig", "KILL", *words]
        self.log(part).parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {CLUSTER: str(self.state_dir), PART: part}
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        output = (os.POSIX_SPAWN_OPEN, 1, str(self.log(part)), append, 0o644)
        quiet = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        both = (os.POSIX_SPAWN_DUP2, 1, 2)
        os.posix_spawnp(words[0], words, environment, file_actions=[quiet, output, both], setsid=True)

    def all(self) -> Iterator[tuple[str, psutil.Process]]:
        """Part and process of all that live, those that a part started itself included."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get(CLUSTER) == str(self.state_dir):
                yield environment.get(PART, ""), process

    def find(self, part: str) -> list[psutil.Process]:
        """The processes of a part, without those that it has set apart itself, such as containerd's shims."""
        return [process for name, process in self.all() if name == part and is_of_first_group(process)]

    def running(self) -> set[str]:
        """Names of the parts that run now."""
        return {name for name, process in self.all() if is_of_first_group(process)}

    def stop(self, part: str, *, kill: bool = False, patience_s: float = 30.0) -> None:
        """Ends a part: politely, and after `patience_s` or with `kill` at once by SIGKILL."""
        end(self.find(part), kill=kill, patience_s=patience_s)

    def kill_all(self) -> None:
        """SIGKILL until none is left: a part may start another one in the meantime."""
        while left := [process for _, process in self.all()]:
            end(left, kill=True)

    def wait(self, part: str, what: str, condition: Callable[[], bool], *, patience_s: float = 120.0) -> None:
        """Polls until the condition holds; gives up when the part that must make it true has ended."""
        deadline_s = time.monotonic() + patience_s
        while not condition():
            self.check(part)
            if time.monotonic() > deadline_s:
                raise ClusterProblem(f"not within {patience_s:.0f} s: {what}; log: {self.log(part)}")
            time.sleep(0.05)

    def check(self, part: str) -> None:
        """Raises when the part has ended, with the end of its log."""
        deadline_s = time.monotonic() + EXEC_S
        while not self.find(part):
            if time.monotonic() > deadline_s:
                log = self.log(part)
                tail = log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:] if log.exists() else "(no log)"
                raise ClusterProblem(f"{part} ended; its log {log} ends with\n{tail}")
            time.sleep(0.05)


def is_of_first_group(process: psutil.Process) -> bool:
    """True in the process group that `start` made together with its session."""
    try:
        return os.getpgid(process.pid) == os.getsid(process.pid)
    except ProcessLookupError:
        return False


def end(processes: list[psutil.Process], *, kill: bool = False, patience_s: float = 30.0) -> None:
    """Returns when all have ended; one that still stands after SIGKILL is a problem."""
    send(processes, signal.SIGKILL if kill else signal.SIGTERM)
    send(left := wait_for_end(processes, patience_s), signal.SIGKILL)
    if stuck := wait_for_end(left, patience_s):
        raise ClusterProblem(f"cannot end {', '.join(str(process.pid) for process in stuck)}")


def wait_for_end(processes: list[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """Those that still live after that time."""
    deadline_s = time.monotonic() + patience_s
    while (left := [process for process in processes if not has_ended(process)]) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return left


def has_ended(process: psutil.Process) -> bool:
    """True for a zombie too: its parent, which may be another process than this one, has not asked for it yet.

    Not for one whose threads are still on their way out: they keep its ports.
    """
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    try:
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not process.is_running() or (is_zombie and process.num_threads() <= 1)
    except psutil.NoSuchProcess:
        return True


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue

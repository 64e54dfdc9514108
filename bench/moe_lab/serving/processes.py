"""Runs A's processes; suspends the side that does not work, and reads the CPU time of both.

Every process is a child of the agent's launcher and leads a group of its own: Ctrl-C at the terminal does not reach it,
and it cannot outlive this process, however that ends. B is a deployment of `moeserving up` (`moe_tools.deployment`).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from moe_agent.supervisor import launcher

from moe_lab.serving.stock import Program

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.5
_LOG_END = 2000


class DoesNotServe(RuntimeError):
    """A process ended, or never answered; the message has its log's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A program that was started."""

    program: Program
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def running(programs: Sequence[Program], folder: Path, *, timeout_s: float = START_TIMEOUT_S) -> Iterator[list[int]]:
    """Starts all at once and waits until each answers; gives their process ids. Logs are in `folder`.

    Raises:
        DoesNotServe: one of them ended, or does not answer in time.
    """
    with starting(programs, folder) as started:
        wait_until_serving(started, timeout_s)
        yield [each.process.pid for each in started]


@contextlib.contextmanager
def starting(programs: Sequence[Program], folder: Path) -> Iterator[list[Started]]:
    """Starts all at once and waits for none; ends them, however the block ends."""
    started: list[Started] = []
    try:
        for program in programs:
            started.append(_start(program, folder))
        yield started
    finally:
        # The router before the engines.
        for each in reversed(started):
            _ask_to_end(each.process)
        for each in reversed(started):
            _end(each.process)


def _start(program: Program, folder: Path) -> Started:
    log = folder / f"{program.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", launcher.__file__, *program.command],
            env=dict(program.environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(program=program, process=process, log=log)


def wait_until_serving(started: Sequence[Started], timeout_s: float = START_TIMEOUT_S) -> None:
    """Until each answers.

    Raises:
        DoesNotServe: one of them ended, or does not answer in time.
    """
    until_s = time.monotonic() + timeout_s
    waiting = list(started)
    while waiting:
        for each in started:
            if each.process.poll() is not None:
                raise _failure(each, f"ended with status {each.process.returncode}")
        waiting = [each for each in waiting if not _serves(each.program.url)]
        if waiting and time.monotonic() > until_s:
            raise _failure(waiting[0], f"does not serve after {timeout_s:.0f} s")
        time.sleep(_POLL_S if waiting else 0.0)


def _failure(each: Started, what: str) -> DoesNotServe:
    words = each.log.read_text(errors="replace")[-_LOG_END:]
    return DoesNotServe(f"{each.program.name} {what}; the end of its log:\n{words}")


def _serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _ask_to_end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    # The launcher kills its group when its standard input ends; what a crashed engine left is ended here.
    process.stdin.close()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def suspend(roots: Iterable[int]) -> None:
    """Stops all that descends from these processes, but not themselves, nor a launcher.

    Those stay able to end the others when their own parent is gone: a stopped process would notice nothing.
    """
    for process in _find_workers(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()


def resume(roots: Iterable[int]) -> None:
    """Lets all that descends from these processes go on."""
    for process in _find_workers(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _find_workers(roots: Iterable[int]) -> list[psutil.Process]:
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(root).children(recursive=True)
    return [process for process in found if not _is_launcher(process)]


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return launcher.__file__ in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def read_cpu_s(roots: Iterable[int]) -> float:
    """CPU seconds, user and system, of these processes and of all that descend from them; ended ones count nothing."""
    total = 0.0
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    total += times.user + times.system
    return total

"""The processes of a soak: mock engines, a real engine with its agent, and gateways, each with a launcher.

The agent's launcher makes each a group of its own that cannot outlive this process, however it ends.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from moe_agent.supervisor import launcher

from moe_lab.soak.page import EnginePage

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.02


class DidNotStart(RuntimeError):
    """A process ended or never answered; the message has the end of its log."""


class Launched:
    """A program that can be killed, suspended and started again.

    Attributes:
        log: where its output goes.
        starts: how often it was started.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-I", "-S", launcher.__file__, *command]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self.log = log
        self.starts = 0

    def start(self) -> None:
        """Starts it; it may take a while until it serves."""
        self.starts += 1
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether its launcher runs, and so the program."""
        return self._process is not None and self._process.poll() is None

    def find_program(self) -> psutil.Process:
        """The program itself, below its launcher.

        Raises:
            DidNotStart: it does not run.
        """
        until_s = time.monotonic() + START_TIMEOUT_S
        while self.is_running and time.monotonic() < until_s:
            assert self._process is not None
            with contextlib.suppress(psutil.NoSuchProcess):
                if children := psutil.Process(self._process.pid).children():
                    return children[0]
            time.sleep(_POLL_S)
        raise DidNotStart(f"{' '.join(self._command[4:7])} does not run; its log ends with:\n{self.log_end()}")

    def log_end(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """Kills it and all that it has started in its group, and waits until none of them listens any more."""
        if self._process is None:
            return
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(below, timeout=STOP_TIMEOUT_S)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def ask_to_end(self) -> None:
        """Sends SIGTERM, which the launcher passes on."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def send(self, number: int) -> None:
        """Sends a signal to the program itself."""
        with contextlib.suppress(psutil.NoSuchProcess, DidNotStart):
            self.find_program().send_signal(number)


@dataclass(slots=True, kw_only=True)
class MockProcess:
    """A mock engine.

    Attributes:
        name: in the gateways.
        port: of its HTTP server.
        agent_port: of the agent that the soak runs for it; None for a plain server.
        page: steers it.
        record: the file of what it was given and has computed.
        launched: its process.
    """

    name: str
    port: int
    agent_port: int | None
    page: EnginePage
    record: Path
    launched: Launched

    @property
    def address(self) -> dict[str, Any]:
        """Its row in a gateway's configuration."""
        agent_url = None if self.agent_port is None else f"http://127.0.0.1:{self.agent_port}"
        return {"name": self.name, "url": f"http://127.0.0.1:{self.port}", "agent_url": agent_url}


class SoakGateway:
    """A gateway.

    Attributes:
        name: for the report.
        port: for clients.
        kills: how often it was killed.
        ends: how often it was asked to end.
        changed_s: when that was last.
        is_steady: whether it is never ended, so that its memory and descriptors can be compared with the start.
    """

    def __init__(self, name: str, folder: Path, engines: Sequence[dict[str, Any]], policy: str, steady: bool) -> None:
        self.name = name
        self.is_steady = steady
        self.kills = self.ends = 0
        self.changed_s = -math.inf
        self.port, self.admin_port = free_ports(2)
        config = {
            "listen": {"port": self.port},
            "admin": {"port": self.admin_port},
            "token_file": str(folder / "token"),
            "engines": list(engines),
            "dispatch": {"policy": policy},
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config), "utf-8")
        self.launched = Launched([sys.executable, "-m", "moe_gateway", "--config", str(path)], folder / f"{name}.log")

    @property
    def admin_url(self) -> str:
        """Address of its metrics and its state."""
        return f"http://127.0.0.1:{self.admin_port}"

    def note_kill(self) -> None:
        """Notes that it is killed now."""
        self.kills += 1
        self.changed_s = time.monotonic()

    def note_end(self) -> None:
        """Notes that it is asked to end now."""
        self.ends += 1
        self.changed_s = time.monotonic()

    def read_memory_bytes(self) -> int:
        """Its own resident memory, without that of the process that parses large bodies."""
        return int(self.launched.find_program().memory_info().rss)

    def count_descriptors(self) -> int:
        """Its open files and connections."""
        return int(self.launched.find_program().num_fds())


def start_mock(name: str, folder: Path, *, with_agent: bool) -> MockProcess:
    """Starts a mock engine; it may take a second until it serves."""
    port, agent_port = free_ports(2)
    page, record = EnginePage(folder / f"{name}.page"), folder / f"{name}.record"
    command = [sys.executable, "-m", "moe_lab.soak.engine", str(port), str(page.path), str(record)]
    launched = Launched(command, folder / f"{name}.log")
    launched.start()
    return MockProcess(
        name=name,
        port=port,
        agent_port=agent_port if with_agent else None,
        page=page,
        record=record,
        launched=launched,
    )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback on which nothing listens, below those that the kernel gives to connections."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            port = 10_000 + int.from_bytes(os.urandom(2), "big") % 9_000
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found

"""The processes of the comparison: two mock engines and the two routers in front of them, each with its cores.

Everything started here ends with the `GatewayTestbed`. A router's cost is the CPU time of its process.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_contract.input_errors import InputError, InvalidInput

from moe_lab.gateway.load import build_request
from moe_lab.gateway.relay import RelayKind

ENGINES = 2
START_TIMEOUT_S = 60.0
# The control token of our gateway.
TOKEN = "bench"
# The default of vllm-router. Like our own default it looks at prefixes and load.
DEFAULT_POLICY = "cache_aware"
# Those that need nothing but engines.
POLICIES = ("cache_aware", "consistent_hash", "power_of_two", "random", "round_robin", "sticky_least_loaded")
# CPUCLOCK_SCHED of Linux.
_SCHEDULED_TIME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayProcess:
    """A running process of a gateway or router, with its port."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of all threads since it started."""
        # The clock of another process's CPU time, as clock_getcpuclockid(3) makes it: /proc counts in steps of 10 ms,
        # which is some percent of what a measurement takes.
        return time.clock_gettime(((~self.process.pid) << 3) | _SCHEDULED_TIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayTestbed:
    """All processes that run; `direct_port` is that of the first engine."""

    ours: GatewayProcess
    theirs: GatewayProcess
    direct_port: int
    relays: tuple[GatewayProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Which cores the routers run on, and which the engines and the load."""

    router: frozenset[int]
    rest: frozenset[int]


def share_cores(available: Sequence[int]) -> Cores:
    """The last core for the routers, which take turns; the others for the rest. On one core all share it."""
    return Cores(router=frozenset(available[-1:]), rest=frozenset(available[:-1] or available))


@contextlib.contextmanager
def running(
    vllm_router: Path, folder: Path, policy: str = DEFAULT_POLICY, *, relays: Sequence[RelayKind] = ()
) -> Iterator[GatewayTestbed]:
    """Starts everything and waits until both routers answer a chat request; logs are in `folder`.

    `policy` is vllm-router's; ours runs in its default configuration. Beside them run relays of these kinds.

    Raises:
        InvalidInput: vllm-router cannot be started.
        RuntimeError: a process does not answer in time; the message names its log.
    """
    cores = share_cores(sorted(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(_engine(cores.rest)) for _ in range(ENGINES)]
        ours_port, admin_port, theirs_port, metrics_port = _free_ports(4)
        config = _write_config(folder, ours_port, admin_port, engines)
        ours = [sys.executable, "-m", "moe_gateway", "--config", str(config)]
        theirs = vllm_router_command(vllm_router, policy, theirs_port, metrics_port, engines)
        testbed = GatewayTestbed(
            ours=stack.enter_context(_router("moeserving", ours, ours_port, cores.router, folder)),
            theirs=stack.enter_context(_router("vllm-router", theirs, theirs_port, cores.router, folder)),
            direct_port=engines[0],
            relays=tuple(stack.enter_context(_relay(kind, engines, cores.router, folder)) for kind in relays),
        )
        stack.enter_context(_pinned(cores.rest))
        yield testbed


@contextlib.contextmanager
def running_alone(folder: Path) -> Iterator[tuple[GatewayProcess, int]]:
    """Starts two mock engines and our gateway alone; yields it and its admin port, once it answers a chat request.

    Raises:
        RuntimeError: it does not answer in time; the message names its log.
    """
    cores = share_cores(sorted(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(_engine(cores.rest)) for _ in range(ENGINES)]
        port, admin_port = _free_ports(2)
        config = _write_config(folder, port, admin_port, engines)
        command = [sys.executable, "-m", "moe_gateway", "--config", str(config)]
        ours = stack.enter_context(_router("moeserving", command, port, cores.router, folder))
        stack.enter_context(_pinned(cores.rest))
        yield ours, admin_port


def _write_config(folder: Path, port: int, admin_port: int, engines: Sequence[int]) -> Path:
    token = folder / "token"
    token.write_text(f"{TOKEN}\n", "utf-8")
    config = {
        "listen": {"port": port},
        "admin": {"port": admin_port},
        "token_file": str(token),
        "engines": [{"name": f"mock-{i}", "url": f"http://127.0.0.1:{engine}"} for i, engine in enumerate(engines)],
    }
    path = folder / "gateway.json"
    path.write_text(json.dumps(config), "utf-8")
    return path


def vllm_router_command(program: Path, policy: str, port: int, metrics_port: int, engines: Sequence[int]) -> list[str]:
    """How vllm-router is started. Without its log of each request: ours writes none either."""
    urls = [f"http://127.0.0.1:{engine}" for engine in engines]
    return [
        *(str(program), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)),
        *("--policy", policy, "--log-level", "warning", "--worker-startup-check-interval", "1"),
        *("--worker-urls", *urls),
    ]


@contextlib.contextmanager
def _engine(cores: frozenset[int]) -> Iterator[int]:
    command = [sys.executable, "-m", "moe_lab.gateway.engine"]
    with _started(command, cores, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


@contextlib.contextmanager
def _relay(kind: RelayKind, engines: Sequence[int], cores: frozenset[int], folder: Path) -> Iterator[GatewayProcess]:
    (port,) = _free_ports(1)
    command = [sys.executable, "-m", "moe_lab.gateway.relay", kind.value, str(port), *map(str, engines)]
    with _router(f"relay, {kind.value}", command, port, cores, folder) as relay:
        yield relay


@contextlib.contextmanager
def _router(name: str, command: list[str], port: int, cores: frozenset[int], folder: Path) -> Iterator[GatewayProcess]:
    log = folder / f"{name}.log"
    with log.open("wb") as output, _started(command, cores, stdout=output, stderr=output) as process:
        _wait_until_serving(name, process, port, log)
        yield GatewayProcess(name=name, port=port, process=process)


@contextlib.contextmanager
def _started(command: list[str], cores: frozenset[int], **streams: object) -> Iterator[subprocess.Popen[bytes]]:
    with _pinned(cores):
        try:
            # The affinity of this process is inherited by all threads of the child. In a session of its own the child
            # does not get Ctrl-C: it is ended below, for whatever reason this process ends.
            process = subprocess.Popen(  # type: ignore[call-overload]
                command, stdin=subprocess.DEVNULL, start_new_session=True, **streams
            )
        except OSError as error:
            raise InvalidInput([InputError("--vllm-router", f"cannot run {command[0]}: {error.strerror}")]) from None
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _pinned(cores: frozenset[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait_until_serving(name: str, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while not _serves(port):
        if process.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"{name} does not serve; its last words:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def _serves(port: int) -> bool:
    body = build_request().partition(b"\r\n\r\n")[2]
    # It does not ask to close the connection, which a relay would pass on to its engine.
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    try:
        client.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        return client.getresponse().status == 200
    except (http.client.HTTPException, OSError):
        return False
    finally:
        client.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
